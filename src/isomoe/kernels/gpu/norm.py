"""RMS norm, alone or with the residual's addition, in one launch.

T: rows   H: normed (last) dim
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.launch import overlapped

NORM = "rms_norm"
ADD_NORM = "add_rms_norm"

_MANY_ROWS = 1024
"""From here on programs take several rows: the loads under way are the limit, not latency."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales each row to unit root mean square, then by `weight`; see the plain twin.

    x: [..., H], any float dtype; weight: [H], or [heads, H] for x of [T, heads, H]. Returns
    [..., H] in weight's dtype.
    """
    hidden = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, hidden)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch(NORM, rows, None, weight, out, eps)
    return out


def add_rms_norm(
    residual: Tensor, addend: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + addend, which takes the residual's place, and its RMS norm.

    residual: [T, H], overwritten; addend: [T, H]; both any float dtype; weight: [H]. The sum is
    fp32 and rounded to residual's dtype, of which the norm is taken. Returns the residual and
    the normed rows, [T, H] in weight's dtype.
    """
    out = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    _launch(ADD_NORM, residual, addend, weight, out, eps)
    return residual, out


def _launch(
    kernel: str, x: Tensor, addend: Tensor | None, weight: Tensor, out: Tensor, eps: float
) -> None:
    rows, hidden = x.shape
    if rows == 0 or hidden == 0:
        return
    config = find(kernel, (hidden,), rows, _default(rows, hidden))
    _norm[(triton.cdiv(rows, config["ROWS"]),)](
        x,
        x if addend is None else addend,
        weight,
        out,
        rows,
        x.stride(0),
        0 if addend is None else addend.stride(0),
        eps,
        H=hidden,
        HEADS=1 if weight.dim() == 1 else weight.shape[0],
        ADD=addend is not None,
        BLOCK_H=triton.next_power_of_2(hidden),
        **config,
        **overlapped(),
    )


def _default(rows: int, hidden: int) -> Config:
    block = triton.next_power_of_2(hidden)
    if rows < _MANY_ROWS:
        return {"ROWS": 1, "num_warps": min(16, max(1, block // 256))}
    return {
        "ROWS": max(1, min(32, 4096 // block)),
        "num_warps": min(16, max(4, block // 1024)),
    }


def candidates(rows: int, hidden: int) -> Iterator[Config]:
    """For the tuner, of both kernels."""
    block = triton.next_power_of_2(hidden)
    for tile in (1, 2, 4, 8, 16, 32):
        if tile > 1 and (tile * block > 16384 or tile > rows):
            continue
        for warps in (1, 2, 4, 8, 16):
            # Values a thread: fewer than 4 waste its loads, more than 64 its registers.
            values = tile * block // (32 * warps)
            if values <= 64 and (values >= 4 or warps == 1):
                yield {"ROWS": tile, "num_warps": warps}


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    x_ptr,
    addend_ptr,
    weight_ptr,
    out_ptr,
    rows,
    x_stride,
    addend_stride,
    eps,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS whole rows. PDL (with launch_pdl): starts before the kernel ahead has ended."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_H)
    within = column < H
    inside = (row < rows)[:, None] & within[None, :]
    if HEADS == 1:
        weight = tl.load(weight_ptr + column, mask=within, other=0.0)[None, :]
    else:
        head = (row % HEADS)[:, None] * H
        weight = tl.load(weight_ptr + head + column[None, :], mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = x_ptr + row[:, None] * x_stride + column[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        addend_at = addend_ptr + row[:, None] * addend_stride + column[None, :]
        x += tl.load(addend_at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(x_ptr.dtype.element_ty)
        tl.store(at, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / H) + eps)
    # Rounded before the product with the weight, as the twin is; an fp32 product of two bf16
    # values is exact, so the second rounding is the only other one.
    normed = (x * scale[:, None]).to(weight.dtype).to(tl.float32)
    out = (normed * weight.to(tl.float32)).to(weight.dtype)
    tl.store(out_ptr + row[:, None] * H + column[None, :], out, mask=inside)
