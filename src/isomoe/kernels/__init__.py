"""Kernels: plain torch on CPUs, Triton on GPUs, behind the same names."""

from isomoe.kernels.attention import (
    AttentionBatch,
    Heads,
    allocate_kv_cache,
    split_heads,
)
from isomoe.kernels.dispatch import (
    add_rms_norm,
    attend,
    chosen_logprobs,
    fused_experts,
    gated,
    greedy,
    latent_attention,
    lightning_attention,
    linear,
    on_gpu,
    paged_attention,
    rms_norm,
    route,
    sample,
    write_kv,
)
from isomoe.kernels.experts import ExpertForm, PackedExperts, pack_experts, packed_experts
from isomoe.kernels.ffn import SWIGLU, Activation, ClampedSwiGlu, SwiGlu, silu_and_mul
from isomoe.kernels.linear import PackedLinear, pack_linear, packs
from isomoe.kernels.paged_rows import PagedRows
from isomoe.kernels.rope import (
    LinearScaling,
    Llama3,
    Scaling,
    Yarn,
    frequencies,
    rope_rows,
    rope_table,
    rotate,
)
from isomoe.kernels.routing import Routing, choose
from isomoe.kernels.sampling import RowSampling, logprobs, top_logprobs, uniform
from isomoe.kernels.span import CAUSAL, Span

__all__ = [
    "CAUSAL",
    "SWIGLU",
    "Activation",
    "AttentionBatch",
    "ClampedSwiGlu",
    "ExpertForm",
    "Heads",
    "LinearScaling",
    "Llama3",
    "PackedExperts",
    "PackedLinear",
    "PagedRows",
    "Routing",
    "RowSampling",
    "Scaling",
    "Span",
    "SwiGlu",
    "Yarn",
    "add_rms_norm",
    "allocate_kv_cache",
    "attend",
    "choose",
    "chosen_logprobs",
    "frequencies",
    "fused_experts",
    "gated",
    "greedy",
    "latent_attention",
    "lightning_attention",
    "linear",
    "logprobs",
    "on_gpu",
    "pack_experts",
    "pack_linear",
    "packed_experts",
    "packs",
    "paged_attention",
    "rms_norm",
    "rope_rows",
    "rope_table",
    "rotate",
    "route",
    "sample",
    "silu_and_mul",
    "split_heads",
    "top_logprobs",
    "uniform",
    "write_kv",
]
