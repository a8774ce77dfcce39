"""Rows packed before they travel between ranks, and unpacked, in one launch each.

The same bits as the plain twin's: division is IEEE's, and codes are made by integer operations,
since conversions to E4M3 need sm_89, those to E2M1 sm_100, and Triton's interpreter has neither.

T: rows   H: hidden size
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.packed_rows import FP8_RUN, NVFP4_RUN, nvfp4_runs

_COLUMNS = 1024
"""Of a program, where a row may be split."""


def pack_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales each run of 128 columns of a row to the range of E4M3; see the plain twin.

    x: [T, H] fp32 or bf16, finite. Returns codes [T, H] float8_e4m3fn and scales
    [T, ceil(H / 128)] fp32.
    """
    x = _dense_rows(x)
    rows, hidden = x.shape
    runs = triton.cdiv(hidden, FP8_RUN)
    codes = torch.empty((rows, hidden), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, runs), dtype=torch.float32, device=x.device)
    if codes.numel():
        tile = _COLUMNS // FP8_RUN
        _pack_fp8[(rows, triton.cdiv(runs, tile))](
            x,
            codes.view(torch.uint8),
            scales,
            x.stride(0),
            H=hidden,
            RUN=FP8_RUN,
            BLOCK_RUNS=tile,
            num_warps=4,
            **overlapped(),
        )
    return codes, scales


def unpack_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack_fp8` made of rows, as [T, H] in dtype; see the plain twin."""
    rows, hidden = codes.shape
    out = torch.empty((rows, hidden), dtype=dtype, device=codes.device)
    if out.numel():
        _unpack_fp8[(rows, triton.cdiv(hidden, _COLUMNS))](
            codes.contiguous().view(torch.uint8),
            scales.contiguous(),
            out,
            H=hidden,
            RUN=FP8_RUN,
            BLOCK_H=_COLUMNS,
            num_warps=4,
            **overlapped(),
        )
    return out


def pack_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales each row and each run of its 16 columns to the range of E2M1; see the plain twin.

    x: [T, H] fp32 or bf16, finite. Returns codes [T, H / 2] uint8, two a byte, run scales
    [T, H / 16] float8_e4m3fn and row scales [T, 1] fp32.

    Raises:
        ValueError: H is no multiple of 16.
    """
    x = _dense_rows(x)
    rows, hidden = x.shape
    runs = nvfp4_runs(hidden)
    codes = torch.empty((rows, hidden // 2), dtype=torch.uint8, device=x.device)
    run_scales = torch.empty((rows, runs), dtype=torch.float8_e4m3fn, device=x.device)
    row_scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if codes.numel():
        tile = triton.next_power_of_2(runs)
        _pack_nvfp4[(rows,)](
            x,
            codes,
            run_scales.view(torch.uint8),
            row_scales,
            x.stride(0),
            RUNS=runs,
            RUN=NVFP4_RUN,
            BLOCK_RUNS=tile,
            num_warps=min(16, max(1, tile // 32)),
            **overlapped(),
        )
    return codes, run_scales, row_scales


def unpack_nvfp4(
    codes: Tensor, run_scales: Tensor, row_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """What `pack_nvfp4` made of rows, as [T, H] in dtype; see the plain twin."""
    rows, pairs = codes.shape
    out = torch.empty((rows, 2 * pairs), dtype=dtype, device=codes.device)
    if out.numel():
        _unpack_nvfp4[(rows, triton.cdiv(2 * pairs, _COLUMNS))](
            codes.contiguous(),
            run_scales.contiguous().view(torch.uint8),
            row_scales.contiguous(),
            out,
            PAIRS=pairs,
            RUN=NVFP4_RUN,
            BLOCK_PAIRS=_COLUMNS // 2,
            num_warps=4,
            **overlapped(),
        )
    return out


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit  # type: ignore[untyped-decorator]
def _encode(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes, int32, of fp32 x in a float of so many bits: nearest, ties to even, saturating.

    (E4M3's largest code is NaN, as PyTorch's of values beyond 464: scales keep them away.)
    """
    bits = x.to(tl.int32, bitcast=True)
    # The fp32 exponent of the float's smallest normal, which its subnormals share.
    LOWEST: tl.constexpr = 129 - (1 << (EXPONENT - 1))
    exponent = tl.maximum((bits >> 23) & 0xFF, LOWEST)
    # In units of the last place, which is exact. At 2^23 fp32 has no fraction: the sum rounds.
    unit = ((254 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    units = (tl.abs(x) * unit + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    # Rounded up to the next power of two, units carry into the exponent.
    size = ((exponent - LOWEST) << MANTISSA) + units
    size = tl.minimum(size, (1 << (EXPONENT + MANTISSA)) - 1)
    return size | (((bits >> 31) & 1) << (EXPONENT + MANTISSA))


@triton.jit  # type: ignore[untyped-decorator]
def _decode(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 values of such codes, which are int32."""
    SIGN: tl.constexpr = EXPONENT + MANTISSA
    size = (codes & ((1 << SIGN) - 1)) << (23 - MANTISSA)
    value = (size | ((codes >> SIGN) << 31)).to(tl.float32, bitcast=True)
    # Too small by the difference of the biases; so fp32's subnormals stand for the float's.
    return value * (2.0 ** (128 - (1 << (EXPONENT - 1))))


@triton.jit  # type: ignore[untyped-decorator]
def _scale(largest, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    scale = tl.div_rn(largest, MOST)
    return tl.where(scale < 1.1754943508222875e-38, 1.0, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _pack_fp8(  # type: ignore[no-untyped-def]
    x_ptr,
    codes_ptr,
    scales_ptr,
    x_stride,
    H: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    column = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    inside = column < H
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(x), axis=1), 448.0)
    codes = _encode(tl.div_rn(x, scale[:, None]), 4, 3)
    tl.store(codes_ptr + row * H + column, codes.to(tl.uint8), mask=inside)
    RUNS: tl.constexpr = (H + RUN - 1) // RUN
    tl.store(scales_ptr + row * RUNS + run, scale, mask=run < RUNS)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_fp8(  # type: ignore[no-untyped-def]
    codes_ptr,
    scales_ptr,
    out_ptr,
    H: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    codes = tl.load(codes_ptr + row * H + column, mask=inside, other=0).to(tl.int32)
    RUNS: tl.constexpr = (H + RUN - 1) // RUN
    scale = tl.load(scales_ptr + row * RUNS + column // RUN, mask=inside, other=0.0)
    out = (_decode(codes, 4, 3) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * H + column, out, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _pack_nvfp4(  # type: ignore[no-untyped-def]
    x_ptr,
    codes_ptr,
    run_scales_ptr,
    row_scales_ptr,
    x_stride,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, BLOCK_RUNS)
    inside = run < RUNS
    column = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    row_scale = _scale(tl.max(largest, axis=0), 448.0 * 6.0)
    run_codes = _encode(tl.div_rn(tl.div_rn(largest, 6.0), row_scale), 4, 3)
    step = _decode(run_codes, 4, 3) * row_scale
    step = tl.where(step == 0.0, float("inf"), step)
    codes = _encode(tl.div_rn(x, step[:, None]), 2, 1)
    low, high = tl.split(tl.reshape(codes, (BLOCK_RUNS, RUN // 2, 2)))
    pair = run[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    codes_at = codes_ptr + row * (RUNS * RUN // 2) + pair
    tl.store(codes_at, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(run_scales_ptr + row * RUNS + run, run_codes.to(tl.uint8), mask=inside)
    tl.store(row_scales_ptr + row, row_scale)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_nvfp4(  # type: ignore[no-untyped-def]
    codes_ptr,
    run_scales_ptr,
    row_scales_ptr,
    out_ptr,
    PAIRS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = pair < PAIRS
    codes = tl.load(codes_ptr + row * PAIRS + pair, mask=inside, other=0).to(tl.int32)
    PAIRS_A_RUN: tl.constexpr = RUN // 2
    run_at = run_scales_ptr + row * (PAIRS // PAIRS_A_RUN) + pair // PAIRS_A_RUN
    run_codes = tl.load(run_at, mask=inside, other=0).to(tl.int32)
    step = _decode(run_codes, 4, 3) * tl.load(row_scales_ptr + row)
    out = tl.interleave(_decode(codes & 15, 2, 1) * step, _decode(codes >> 4, 2, 1) * step)
    column = tl.program_id(1) * (2 * BLOCK_PAIRS) + tl.arange(0, 2 * BLOCK_PAIRS)
    out_at = out_ptr + row * (2 * PAIRS) + column
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=column < 2 * PAIRS)
