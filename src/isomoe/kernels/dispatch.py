"""Each kernel on whatever its input lies: plain torch on CPUs, Triton on GPUs.

The plain modules beside this one say what the Triton kernels in `gpu/` must compute. Triton is
imported when the first tensor on a GPU comes by, so that hosts without one do without it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isomoe.kernels import experts, ffn, norm, routing, sampling
from isomoe.kernels import linear as dense
from isomoe.kernels.linear import PackedLinear
from isomoe.kernels.paged_rows import PagedRows
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


def silu_and_mul(x: Tensor) -> Tensor:
    """As `kernels.ffn.silu_and_mul`."""
    if on_gpu(x):
        from isomoe.kernels import gpu

        return gpu.silu_and_mul(x)
    return ffn.silu_and_mul(x)


def linear(x: Tensor, weight: PackedLinear | Tensor) -> Tensor:
    """As `kernels.linear.linear`."""
    if on_gpu(x) and isinstance(weight, Tensor):
        from isomoe.kernels import gpu

        return gpu.linear(x, weight)
    return dense.linear(x, weight)


def route(
    logits: Tensor,
    k: int,
    renormalize: bool,
    first: int = 0,
    stop: int | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.routing.route`."""
    if on_gpu(logits):
        from isomoe.kernels import gpu

        return gpu.route(logits, k, renormalize, first, stop, real)
    return routing.route(logits, k, renormalize, first, stop, real)


def fused_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """As `kernels.experts.fused_experts`, but in x's dtype on a GPU."""
    if on_gpu(x):
        from isomoe.kernels import gpu

        return gpu.fused_experts(x, gate_up, down, topk_ids, topk_weights)
    return experts.fused_experts(x, gate_up, down, topk_ids, topk_weights)


def attend(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor, float] | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    scale: float,
) -> Tensor:
    """On GPUs alone: `rms_norm` of queries and keys, `rotate`, `write_kv` and `paged_attention`.

    qkv: [T, (heads + 2 kv) d], may be overwritten; norms: weights [d] of queries and keys, and
    eps; cos, sin: the tables of `rope_table`. Returns [T, heads, d].
    """
    from isomoe.kernels import gpu

    return gpu.attend(qkv, num_heads, num_kv_heads, norms, cos, sin, kv_cache, rows, scale)


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
