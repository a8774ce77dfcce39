"""The weighted sum of a row's experts.

T: rows   K: experts a row   P: pairs, T x K   H: hidden size
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.launch import overlapped


def combine(
    outputs: Tensor,
    slots: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    *,
    sorted_order: bool,
    weighted: bool = True,
) -> Tensor:
    """[T, H] in `dtype`: each row's weighted sum of its pairs' outputs, in the order of its ids.

    outputs: [P, H] by pair or, `sorted_order`, [.., H] by slot; slots: [P], -1: absent (its
    output is not read); weights: [T, K] fp32, taken for ones if not `weighted`.
    """
    rows, top_k = weights.shape
    hidden = outputs.shape[1]
    out = torch.empty((rows, hidden), dtype=dtype, device=outputs.device)
    block = min(2048 if rows >= 132 else 512, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, block))](
        outputs,
        slots,
        weights,
        out,
        TOP_K=top_k,
        H=hidden,
        SORTED=sorted_order,
        WEIGHTED=weighted,
        BLOCK_H=block,
        num_warps=4 if block > 512 else 2,
        **overlapped(),
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    outputs_ptr,
    slots_ptr,
    weights_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = unit < H
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = row * TOP_K + k
        slot = tl.load(slots_ptr + pair)
        source = slot.to(tl.int64) if SORTED else pair
        here = slot >= 0
        value = tl.load(outputs_ptr + source * H + unit, mask=inside & here, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            # The weight of an absent expert may be anything, NaN too.
            value *= tl.where(here, tl.load(weights_ptr + pair), 0.0)
        total += value
    tl.store(out_ptr + row * H + unit, total.to(out_ptr.dtype.element_ty), mask=inside)
