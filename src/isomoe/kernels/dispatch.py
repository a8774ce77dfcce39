"""Each kernel on whatever its input lies: plain torch on CPUs, Triton on GPUs.

The plain modules beside this one say what the Triton kernels in `gpu/` must compute. Triton is
imported when the first tensor on a GPU comes by, so that hosts without one do without it.
"""

from collections.abc import Sequence
from typing import Any

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
    return _gpu().rms_norm(x, weight, eps) if on_gpu(x) else norm.rms_norm(x, weight, eps)


def add_rms_norm(
    residual: Tensor, addend: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.norm.add_rms_norm`; on a GPU the sum takes the residual's place."""
    if on_gpu(residual):
        return _gpu().add_rms_norm(residual, addend, weight, eps)
    return norm.add_rms_norm(residual, addend, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """As `kernels.ffn.silu_and_mul`."""
    return _gpu().silu_and_mul(x) if on_gpu(x) else ffn.silu_and_mul(x)


def linear(x: Tensor, weight: PackedLinear | Tensor) -> Tensor:
    """As `kernels.linear.linear`."""
    return _gpu().linear(x, weight) if on_gpu(x) else dense.linear(x, weight)


def route(
    logits: Tensor,
    k: int,
    renormalize: bool,
    first: int = 0,
    stop: int | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.routing.route`."""
    module = _gpu() if on_gpu(logits) else routing
    return module.route(logits, k, renormalize, first, stop, real)


def fused_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """As `kernels.experts.fused_experts`, but in x's dtype on a GPU."""
    module = _gpu() if on_gpu(x) else experts
    return module.fused_experts(x, gate_up, down, topk_ids, topk_weights)


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
    found: Tensor = _gpu().attend(
        qkv, num_heads, num_kv_heads, norms, cos, sin, kv_cache, rows, scale
    )
    return found


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.sampling.greedy`."""
    return _gpu().greedy(logits) if on_gpu(logits) else sampling.greedy(logits)


def sample(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """As `kernels.sampling.sample`."""
    if not on_gpu(logits):
        return sampling.sample(logits, rows)
    columns = [
        (row.temperature, row.top_k, row.top_p, row.min_p, sampling.uniform(row.seed, row.position))
        for row in rows
    ]
    table = torch.tensor(columns, dtype=torch.float64, pin_memory=logits.is_cuda)
    temperature, top_k, top_p, min_p, number = table.to(logits.device, non_blocking=True).unbind(1)
    return _gpu().draw(
        logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), number
    )


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """As `kernels.sampling.chosen_logprobs`."""
    module = _gpu() if on_gpu(logits) else sampling
    return module.chosen_logprobs(logits, ids)


def _gpu() -> Any:
    from isomoe.kernels import gpu

    return gpu
