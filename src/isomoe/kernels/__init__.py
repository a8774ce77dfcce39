"""Kernels in plain torch: the specification and test of the Triton kernels, and the CPU's path."""

from isomoe.kernels.attention import (
    AttentionBatch,
    allocate_kv_cache,
    paged_attention,
    write_kv,
)
from isomoe.kernels.experts import PackedExperts, fused_experts, pack_experts, packed_experts
from isomoe.kernels.ffn import silu_and_mul
from isomoe.kernels.linear import PackedLinear, linear, pack_linear, packs
from isomoe.kernels.norm import rms_norm
from isomoe.kernels.rope import apply_rope, rope_table, rotate
from isomoe.kernels.routing import topk_softmax
from isomoe.kernels.sampling import RowSampling, logprobs, sample, top_logprobs, uniform

__all__ = [
    "AttentionBatch",
    "PackedExperts",
    "PackedLinear",
    "RowSampling",
    "allocate_kv_cache",
    "apply_rope",
    "fused_experts",
    "linear",
    "logprobs",
    "pack_experts",
    "pack_linear",
    "packed_experts",
    "packs",
    "paged_attention",
    "rms_norm",
    "rope_table",
    "rotate",
    "sample",
    "silu_and_mul",
    "top_logprobs",
    "topk_softmax",
    "uniform",
    "write_kv",
]
