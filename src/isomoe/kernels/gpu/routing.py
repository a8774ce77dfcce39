"""The choice of experts, in one launch.

T: rows   E: experts of all ranks   K: experts a row
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.launch import overlapped

Scoring = Literal["softmax", "sigmoid"]


def route(
    logits: Tensor,
    k: int,
    renormalize: bool,
    first: int = 0,
    stop: int | None = None,
    real: Tensor | None = None,
    *,
    scoring: Scoring = "softmax",
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The k experts of highest score, highest first; ties go to the lower index.

    logits: [T, E] fp32 or bf16; real: [T] bool, or None if no row is padding; bias: [E] fp32,
    added to the scores for the choice only. Returns weights [T, K] fp32 (the scores; with
    `renormalize` divided by their sum; times `scale`) and ids [T, K] int32, local to the experts
    first..stop of this rank: -1 for the others, and in padding rows, whose weights are 0.
    """
    rows, experts = logits.shape
    weights = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, k), dtype=torch.int32, device=logits.device)
    if rows == 0:
        return weights, ids
    _route[(rows,)](
        logits,
        logits if bias is None else bias,
        logits if real is None else real,
        weights,
        ids,
        logits.stride(0),
        first,
        experts if stop is None else stop,
        scale,
        EXPERTS=experts,
        TOP_K=k,
        RENORMALIZE=renormalize,
        SIGMOID=scoring == "sigmoid",
        HAS_BIAS=bias is not None,
        HAS_REAL=real is not None,
        BLOCK_E=max(32, triton.next_power_of_2(experts)),
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=1,
        **overlapped(),
    )
    return weights, ids


@triton.jit
def _ordered(value):  # type: ignore[no-untyped-def]
    """int32 keys in the order of fp32 values; NaN is the largest, both zeros are equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, keys)


@triton.jit
def _value_of(keys):  # type: ignore[no-untyped-def]
    """`_ordered`'s argument."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "stop"])  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    real_ptr,
    weights_ptr,
    ids_ptr,
    logits_stride,
    first,
    stop,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < EXPERTS
    logits = tl.load(logits_ptr + row * logits_stride + expert, mask=inside, other=float("-inf"))
    logits = logits.to(tl.float32)

    if SIGMOID:
        scores = tl.sigmoid(logits)
    elif HAS_BIAS or not RENORMALIZE:
        powers = tl.where(inside, tl.exp(logits - tl.max(logits, axis=0)), 0.0)
        scores = powers / tl.sum(powers, axis=0)
    else:
        # Only the ratios of the chosen matter.
        scores = logits
    if HAS_BIAS:
        keys = _ordered(scores + tl.load(bias_ptr + expert, mask=inside, other=0.0).to(tl.float32))
    else:
        # Scores are in the order of logits, which tell more of them apart.
        keys = _ordered(logits)

    # Integer reductions: one instruction a warp, and NaN, which they order, gives K distinct ids.
    GONE: tl.constexpr = -0x80000000
    keys = tl.where(inside, keys, GONE)
    slot = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        index = tl.min(tl.where(keys == best, expert, BLOCK_E), axis=0)
        if HAS_BIAS or SIGMOID or not RENORMALIZE:
            weight = tl.sum(tl.where(expert == index, scores, 0.0), axis=0)
        else:
            weight = _value_of(best)
        keys = tl.where(expert == index, GONE, keys)
        ids = tl.where(slot == k, index, ids)
        weights = tl.where(slot == k, weight, weights)

    wanted = slot < TOP_K
    if RENORMALIZE:
        if not SIGMOID and not HAS_BIAS:
            # The first is the largest.
            weights = tl.exp(weights - tl.sum(tl.where(slot == 0, weights, 0.0), axis=0))
        weights = tl.where(wanted, weights, 0.0)
        # Sigmoids may all be 0.
        weights /= tl.sum(weights, axis=0) + (1e-20 if SIGMOID else 0.0)
    weights *= scale
    local = tl.where((ids >= first) & (ids < stop), ids - first, -1)
    if HAS_REAL:
        real = tl.load(real_ptr + row) != 0
        local = tl.where(real, local, -1)
        weights = tl.where(real, weights, 0.0)
    tl.store(weights_ptr + row * TOP_K + slot, weights, mask=wanted)
    tl.store(ids_ptr + row * TOP_K + slot, local, mask=wanted)
