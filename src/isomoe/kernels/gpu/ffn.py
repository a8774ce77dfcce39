"""Activations of gated feed-forward layers.

T: rows   I: intermediate size
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.ffn import Activation, ClampedSwiGlu
from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.launch import overlapped

SILU = "silu_and_mul"
_PLAIN, _LIMITED, _CLAMPED = 0, 1, 2


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [..., 2I], gate first, bf16 or fp32; returns [..., I] in x's dtype.

    silu is computed in fp32 and rounded to x's dtype before the product.
    """
    size = x.shape[-1] // 2
    rows = x if x.dim() == 2 else x.reshape(-1, 2 * size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    count = rows.shape[0]
    if out.numel():
        config = find(SILU, (size,), count, _default(count, size))
        grid = (triton.cdiv(count, config["ROWS"]), triton.cdiv(size, config["BLOCK_I"]))
        _silu_and_mul[grid](rows, out, count, rows.stride(0), I=size, **config, **overlapped())
    return out


def activation_kind(activation: Activation) -> dict[str, float]:
    """Compile-time numbers of an activation, for `activated`."""
    if isinstance(activation, ClampedSwiGlu):
        return {"KIND": _CLAMPED, "LIMIT": activation.limit, "ALPHA": activation.alpha}
    if activation.limit is not None:
        return {"KIND": _LIMITED, "LIMIT": activation.limit, "ALPHA": 0.0}
    return {"KIND": _PLAIN, "LIMIT": 0.0, "ALPHA": 0.0}


def _default(rows: int, size: int) -> Config:
    block = min(1024, triton.next_power_of_2(size))
    # A smaller tile that divides I leaves no lane idle.
    while block > 128 and size % block:
        block //= 2
    if rows * size < 1 << 20:
        return {"ROWS": 1, "BLOCK_I": block, "num_warps": max(1, block // 256)}
    return {"ROWS": max(1, 2048 // block), "BLOCK_I": block, "num_warps": 4}


def candidates(rows: int, size: int) -> Iterator[Config]:
    """For the tuner."""
    for block in (128, 256, 512, 1024, 2048):
        for tile in (1, 2, 4, 8, 16):
            if (block > 128 and block >= 2 * size) or tile > rows:
                continue
            for warps in (1, 2, 4, 8):
                if 4 <= block * tile // (32 * warps) <= 32:
                    yield {"ROWS": tile, "BLOCK_I": block, "num_warps": warps}


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _silu_and_mul(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    rows,
    x_stride,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (row < rows)[:, None] & (unit < I)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate_at = x_ptr + row[:, None] * x_stride + unit[None, :]
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + I, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    out_at = out_ptr + row[:, None] * I + unit[None, :]
    tl.store(out_at, (gated * up).to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def activated(gate, up, KIND: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):  # type: ignore[no-untyped-def]
    """`kernels.ffn.gated` of fp32 gate and up, in fp32."""
    if KIND == 0:
        out = gate / (1.0 + tl.exp(-gate)) * up
    elif KIND == 1:
        silu = gate / (1.0 + tl.exp(-gate))
        out = tl.minimum(silu, LIMIT) * tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    else:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        out = gate / (1.0 + tl.exp(-gate * ALPHA)) * (up + 1.0)
    return out
