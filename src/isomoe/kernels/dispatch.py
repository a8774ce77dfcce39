"""Each kernel on whatever its input lies: plain torch on CPUs, Triton on GPUs.

The plain modules beside this one say what the Triton kernels in `gpu/` must compute. Triton is
imported when the first tensor on a GPU comes by, so that hosts without one do without it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isomoe.kernels import attention, experts, ffn, lightning, mla, norm, packed_rows, sampling
from isomoe.kernels import linear as dense
from isomoe.kernels import routing as choice
from isomoe.kernels.attention import AttentionBatch, Heads
from isomoe.kernels.block_fp8 import ExpertMatrices, ExpertRows, Fp8Rows
from isomoe.kernels.experts import PLAIN, ExpertForm
from isomoe.kernels.ffn import SWIGLU, Activation
from isomoe.kernels.linear import PackedLinear
from isomoe.kernels.paged_rows import PagedRows
from isomoe.kernels.routing import Routing
from isomoe.kernels.sampling import RowSampling

interpreted = False
"""Tests set this: Triton's interpreter then runs the GPU's kernels on the CPU."""


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`."""
    return x.is_cuda or interpreted


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.norm.rms_norm`."""
    if on_gpu(x):
        from isomoe.kernels import gpu

        return gpu.rms_norm(x, weight, eps)
    return norm.rms_norm(x, weight, eps)


def add_rms_norm(
    residual: Tensor, addend: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.norm.add_rms_norm`; on a GPU the sum takes the residual's place."""
    if on_gpu(residual):
        from isomoe.kernels import gpu

        return gpu.add_rms_norm(residual, addend, weight, eps)
    return norm.add_rms_norm(residual, addend, weight, eps)


def gated(x: Tensor, activation: Activation = SWIGLU) -> Tensor:
    """As `kernels.ffn.gated`."""
    if on_gpu(x) and activation == SWIGLU:
        from isomoe.kernels import gpu

        return gpu.silu_and_mul(x)
    return ffn.gated(x, activation)


def linear(x: Tensor, weight: PackedLinear | Tensor) -> Tensor:
    """As `kernels.linear.linear`."""
    if on_gpu(x) and isinstance(weight, Tensor):
        from isomoe.kernels import gpu

        return gpu.linear(x, weight)
    return dense.linear(x, weight)


def route(
    logits: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    first: int = 0,
    stop: int | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.routing.route`."""
    if on_gpu(logits) and routing.num_groups == 1:
        from isomoe.kernels import gpu

        return gpu.route(
            logits,
            routing.top_k,
            routing.renormalize,
            first,
            stop,
            real,
            scoring=routing.scoring,
            bias=bias,
            scale=routing.scale,
        )
    return choice.route(logits, routing, bias, first, stop, real)


def fused_experts(
    x: ExpertRows,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """As `kernels.experts.fused_experts`, but in x's dtype on a GPU."""
    if on_gpu(x.codes if isinstance(x, Fp8Rows) else x):
        from isomoe.kernels import gpu

        return gpu.fused_experts(x, gate_up, down, topk_ids, topk_weights, form)
    return experts.fused_experts(x, gate_up, down, topk_ids, topk_weights, form)


def pack_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.packed_rows.pack_fp8`."""
    if on_gpu(x):
        from isomoe.kernels import gpu

        return gpu.pack_fp8(x)
    return packed_rows.pack_fp8(x)


def unpack_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `kernels.packed_rows.unpack_fp8`."""
    if on_gpu(codes):
        from isomoe.kernels import gpu

        return gpu.unpack_fp8(codes, scales, dtype)
    return packed_rows.unpack_fp8(codes, scales, dtype)


def pack_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.packed_rows.pack_nvfp4`."""
    if on_gpu(x):
        from isomoe.kernels import gpu

        return gpu.pack_nvfp4(x)
    return packed_rows.pack_nvfp4(x)


def unpack_nvfp4(
    codes: Tensor, run_scales: Tensor, row_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """As `kernels.packed_rows.unpack_nvfp4`."""
    if on_gpu(codes):
        from isomoe.kernels import gpu

        return gpu.unpack_nvfp4(codes, run_scales, row_scales, dtype)
    return packed_rows.unpack_nvfp4(codes, run_scales, row_scales, dtype)


def write_kv(
    k: Tensor, v: Tensor | None, kv_cache: Tensor, batch: AttentionBatch | PagedRows
) -> None:
    """As `kernels.attention.write_kv`."""
    if isinstance(batch, PagedRows):
        from isomoe.kernels import gpu

        gpu.write_kv(k, v, kv_cache, batch)
    else:
        attention.write_kv(k, v, kv_cache, batch)


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch | PagedRows,
    heads: Heads,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `kernels.attention.paged_attention`."""
    if isinstance(batch, PagedRows):
        from isomoe.kernels import gpu

        return gpu.paged_attention(q, kv_cache, batch, heads, sinks)
    return attention.paged_attention(q, kv_cache, batch, heads, sinks)


def latent_attention(
    q: Tensor, latents: Tensor, batch: AttentionBatch | PagedRows, up: Tensor, heads: Heads
) -> Tensor:
    """As `kernels.mla.latent_attention`."""
    if isinstance(batch, PagedRows):
        from isomoe.kernels import gpu

        return gpu.latent_attention(q, latents, batch, up, heads)
    return mla.latent_attention(q, latents, batch, up, heads)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    decay: Tensor,
    batch: AttentionBatch | PagedRows,
) -> Tensor:
    """As `kernels.lightning.lightning_attention`; of `PagedRows` a request's slot is its row of
    the block tables."""
    if isinstance(batch, PagedRows):
        from isomoe.kernels import gpu

        return gpu.lightning_attention(q, k, v, states, decay, batch)
    return lightning.lightning_attention(q, k, v, states, decay, batch)


def attend(
    qkv: Tensor,
    heads: Heads,
    norms: tuple[Tensor, Tensor, float] | None,
    turns: tuple[Tensor, Tensor],
    kv_cache: Tensor,
    rows: PagedRows,
    sinks: Tensor | None = None,
) -> Tensor:
    """On GPUs alone: `rms_norm` of queries and keys, `rotate`, `write_kv` and `paged_attention`.

    For values of as many dims as keys, and rope in halves. qkv: [T, (heads + 2 kv) d], may be
    overwritten; norms: weights [d] of queries and keys, and eps; turns: cos and sin, [P, r], at
    every position. Returns [T, heads, d].
    """
    from isomoe.kernels import gpu

    return gpu.attend(qkv, heads, norms, *turns, kv_cache, rows, sinks)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.sampling.greedy`."""
    if on_gpu(logits):
        from isomoe.kernels import gpu

        return gpu.greedy(logits)
    return sampling.greedy(logits)


def sample(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """As `kernels.sampling.sample`."""
    if not on_gpu(logits):
        return sampling.sample(logits, rows)
    from isomoe.kernels import gpu

    columns = [
        (row.temperature, row.top_k, row.top_p, row.min_p, sampling.uniform(row.seed, row.position))
        for row in rows
    ]
    table = torch.tensor(columns, dtype=torch.float64, pin_memory=logits.is_cuda)
    temperature, top_k, top_p, min_p, number = table.to(logits.device, non_blocking=True).unbind(1)
    return gpu.draw(
        logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), number.contiguous()
    )


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """As `kernels.sampling.chosen_logprobs`."""
    if on_gpu(logits):
        from isomoe.kernels import gpu

        return gpu.chosen_logprobs(logits, ids)
    return sampling.chosen_logprobs(logits, ids)
