"""Kernels: plain torch on CPUs, Triton on GPUs, behind the same names."""

from isomoe.kernels.attention import (
    AttentionBatch,
    allocate_kv_cache,
    paged_attention,
    write_kv,
)
from isomoe.kernels.dispatch import (
    add_rms_norm,
    attend,
    chosen_logprobs,
    fused_experts,
    greedy,
    linear,
    on_gpu,
    rms_norm,
    route,
    sample,
    silu_and_mul,
)
from isomoe.kernels.experts import PackedExperts, pack_experts, packed_experts
from isomoe.kernels.linear import PackedLinear, pack_linear, packs
from isomoe.kernels.paged_rows import PagedRows
from isomoe.kernels.rope import apply_rope, rope_table, rotate
from isomoe.kernels.routing import topk_softmax
from isomoe.kernels.sampling import RowSampling, logprobs, top_logprobs, uniform

__all__ = [
    "AttentionBatch",
    "PackedExperts",
    "PackedLinear",
    "PagedRows",
    "RowSampling",
    "add_rms_norm",
    "allocate_kv_cache",
    "apply_rope",
    "attend",
    "chosen_logprobs",
    "fused_experts",
    "greedy",
    "linear",
    "logprobs",
    "on_gpu",
    "pack_experts",
    "pack_linear",
    "packed_experts",
    "packs",
    "paged_attention",
    "rms_norm",
    "rope_table",
    "rotate",
    "route",
    "sample",
    "silu_and_mul",
    "top_logprobs",
    "topk_softmax",
    "uniform",
    "write_kv",
]
