"""Packed rows against a search of all values of a format for the nearest one."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isomoe.kernels import pack_fp8, pack_nvfp4, unpack_fp8, unpack_nvfp4

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 64), (3, 128), (7, 192), (5, 2880), (3, 2048)]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(code: int) -> float:
    exponent, mantissa = divmod(code, 8)
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([e4m3(code) for code in range(127)])
"""By code, without a sign; code 127 is NaN."""


def nearest(values: Array, table: Array) -> Array:
    """Codes, signs in the bit above; of two that are as near, the even one."""
    distances = np.abs(np.abs(values.astype(np.float64))[..., None] - table)
    near = distances == distances.min(-1, keepdims=True)
    even = near & (np.arange(len(table)) % 2 == 0)
    codes = np.where(even.any(-1), even.argmax(-1), near.argmax(-1))
    return codes + np.signbit(values) * (128 if table is E4M3 else 8)


def runs_of(x: Tensor, size: int) -> Array:
    """[T, H] -> fp32 [T, runs, size], zeros behind the row."""
    rows, hidden = x.shape
    runs = -(-hidden // size)
    padded = np.zeros((rows, runs * size), np.float32)
    padded[:, :hidden] = x.float().numpy()
    return padded.reshape(rows, runs, size)


def scale_of(largest: Array, most: float) -> Array:
    scale = largest / np.float32(most)
    return np.where(scale < np.float32(2.0**-126), np.float32(1), scale)


def reference_fp8(x: Tensor) -> tuple[Array, Array]:
    runs = runs_of(x, 128)
    scales = scale_of(np.abs(runs).max(-1), 448)
    codes = nearest(runs / scales[..., None], E4M3)
    return codes.reshape(len(x), scales.shape[1] * 128)[:, : x.shape[1]], scales


def reference_nvfp4(x: Tensor) -> tuple[Array, Array, Array]:
    runs = runs_of(x, 16)
    largest = np.abs(runs).max(-1)
    row_scales = scale_of(largest.max(-1, keepdims=True), 448 * 6)
    run_codes = nearest(largest / np.float32(6) / row_scales, E4M3)
    steps = E4M3[run_codes].astype(np.float32) * row_scales
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = runs / steps[..., None]
    scaled = np.where(steps[..., None] == 0, np.copysign(np.float32(0), runs), scaled)
    codes = nearest(scaled, E2M1).reshape(x.shape)
    return codes[:, ::2] + 16 * codes[:, 1::2], run_codes, row_scales


def bits(codes: Tensor) -> Array:
    return codes.view(torch.uint8).numpy()


def check_fp8(x: Tensor) -> None:
    codes, scales = pack_fp8(x)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (len(x), -(-x.shape[1] // 128)))
    assert codes.is_contiguous()
    wanted_codes, wanted_scales = reference_fp8(x)
    np.testing.assert_array_equal(scales.numpy(), wanted_scales)
    np.testing.assert_array_equal(bits(codes), wanted_codes)


def check_nvfp4(x: Tensor) -> None:
    codes, run_scales, row_scales = pack_nvfp4(x)
    rows, hidden = x.shape
    assert (codes.dtype, codes.shape) == (torch.uint8, (rows, hidden // 2))
    assert (run_scales.dtype, run_scales.shape) == (torch.float8_e4m3fn, (rows, hidden // 16))
    assert (row_scales.dtype, row_scales.shape) == (torch.float32, (rows, 1))
    wanted_codes, wanted_run_scales, wanted_row_scales = reference_nvfp4(x)
    np.testing.assert_array_equal(row_scales.numpy(), wanted_row_scales)
    np.testing.assert_array_equal(bits(run_scales), wanted_run_scales)
    np.testing.assert_array_equal(codes.numpy(), wanted_codes)


def uneven(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose runs have very unlike magnitudes, some of them zero."""
    torch.manual_seed(0)
    x = torch.randn(rows, hidden) * torch.exp(
        4 * torch.randn(rows, hidden // 16)
    ).repeat_interleave(16, 1)
    x[:, 16:32] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_codes_are_the_nearest(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x = uneven(rows, hidden, dtype)
    before = x.clone()
    check_fp8(x)
    check_nvfp4(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("hidden", [1, 7, 127, 130])
def test_fp8_takes_rows_of_any_size(hidden: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, hidden)
    check_fp8(x)
    assert unpack_fp8(*pack_fp8(x), torch.float32).shape == x.shape


def around_ties(table: Array) -> Array:
    """Midpoints between neighbours and what is next to them in fp32, of both signs."""
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(1e9))]
    values = np.concatenate(near)
    return np.concatenate([values, -values])


def test_fp8_ties_go_to_the_even_code() -> None:
    values = torch.from_numpy(around_ties(E4M3))
    x = torch.zeros(len(values), 128)
    x[:, 5] = 448
    x[:, 77] = values
    codes, scales = pack_fp8(x)
    assert (scales == 1).all()
    assert (bits(codes)[len(E4M3) - 1 : 2 * len(E4M3) - 2, 77] % 2 == 0).all()
    check_fp8(x)


def test_nvfp4_ties_go_to_the_even_code() -> None:
    values = torch.from_numpy(around_ties(E2M1))
    x = torch.zeros(len(values), 32)
    x[:, 0] = 448 * 6
    x[:, 17] = values
    x[:, 18] = 6
    codes, run_scales, row_scales = pack_nvfp4(x)
    assert (row_scales == 1).all()
    assert (run_scales.float() == torch.tensor([448.0, 1.0])).all()
    assert (codes[7:14, 8] >> 4).tolist() == [0, 2, 2, 4, 4, 6, 6]
    check_nvfp4(x)


def test_the_even_column_lies_in_the_low_nibble() -> None:
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([6.0, -1.0, 0.5])
    assert pack_nvfp4(x)[0].tolist() == [[0xA7, 0x01, 0, 0, 0, 0, 0, 0]]


def test_values_of_the_format_come_back_as_they_were() -> None:
    both = torch.from_numpy(np.concatenate([E4M3, -E4M3]).astype(np.float32))
    x = torch.zeros(2, 256)
    x[0, :254] = both
    x[1, :254] = both.flip(0) * 2.0**-30
    x[:, 127] = torch.tensor([448.0, 448.0 * 2.0**-30])
    x[:, 255] = x[:, 127]
    for dtype in DTYPES:
        out = unpack_fp8(*pack_fp8(x.to(dtype)), dtype)
        assert out.dtype == dtype
        assert torch.equal(out, x.to(dtype))

    e2m1 = torch.from_numpy(np.concatenate([E2M1, -E2M1]).astype(np.float32))
    scales = torch.from_numpy(E4M3[1:].astype(np.float32))
    for row_scale in (1.0, 2.0**20, 2.0**-40):
        x = (e2m1 * scales[:, None] * row_scale).reshape(1, -1)
        for dtype in DTYPES:
            out = unpack_nvfp4(*pack_nvfp4(x.to(dtype)), dtype)
            assert out.dtype == dtype
            assert torch.equal(out, x.to(dtype))


def test_unpacking_is_a_product_in_fp32() -> None:
    """Of every code, with scales that no product is exact with."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    codes[:, [127, 255]] = 0  # NaN
    scales = torch.tensor([[0.1, 3.3e-5], [7.7e4, 1.9e-36]])
    spread = np.repeat(scales.numpy(), 128, 1)
    values = np.concatenate([E4M3, [0], -E4M3, [0]]).astype(np.float32)
    out = unpack_fp8(codes.view(torch.float8_e4m3fn), scales, torch.float32)
    np.testing.assert_array_equal(out.numpy(), values * spread)
    rounded = unpack_fp8(codes.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    assert torch.equal(rounded, out.bfloat16())

    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    run_scales = torch.arange(64, dtype=torch.uint8).reshape(2, 32) + 50
    row_scales = torch.tensor([[0.1], [7.7e4]])
    signed = np.concatenate([E2M1, -E2M1]).astype(np.float32)
    values = np.stack([np.tile(signed, 16), np.repeat(signed, 16)], -1).reshape(-1)
    steps = E4M3[run_scales.numpy()].astype(np.float32) * row_scales.numpy()
    out = unpack_nvfp4(codes, run_scales.view(torch.float8_e4m3fn), row_scales, torch.float32)
    np.testing.assert_array_equal(out.numpy(), values * np.repeat(steps, 16, 1))
    rounded = unpack_nvfp4(codes, run_scales.view(torch.float8_e4m3fn), row_scales, torch.bfloat16)
    assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_errors_are_within_half_a_step(rows: int, hidden: int) -> None:
    x = uneven(rows, hidden)
    error = np.abs(runs_of(unpack_fp8(*pack_fp8(x), torch.float32) - x, 128))
    runs = np.abs(runs_of(x, 128))
    smallest = runs.max(-1, keepdims=True) / 448 * 2.0**-9
    assert (error <= 1.0001 * np.maximum(runs * 2.0**-4, smallest / 2)).all()

    error = np.abs(runs_of(unpack_nvfp4(*pack_nvfp4(x), torch.float32) - x, 16))
    runs = np.abs(runs_of(x, 16))
    # The widest gap is of 2 steps, or what lies above the last where a run's scale was rounded
    # down: by up to 1/16, or by half of E4M3's smallest step where it is subnormal.
    row_scales = runs.max((-1, -2), keepdims=True) / (448 * 6)
    bound = runs.max(-1, keepdims=True) / 6 * (17 / 16) + row_scales * 6 * 2.0**-10
    assert (error <= 1.0001 * bound).all()


def test_relative_error_of_normal_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 2048)
    fp8 = unpack_fp8(*pack_fp8(x), torch.float32)
    nvfp4 = unpack_nvfp4(*pack_nvfp4(x), torch.float32)
    assert 0.024 < float((fp8 - x).norm() / x.norm()) < 0.028
    assert 0.090 < float((nvfp4 - x).norm() / x.norm()) < 0.100


def test_extremes() -> None:
    x = torch.zeros(9, 256)
    x[1, 0] = -0.0
    x[2] = 1e-44  # subnormal
    x[3] = 4e-36
    x[3, 0] = -6e-36
    x[4] = torch.finfo(torch.float32).max
    x[5] = -torch.finfo(torch.bfloat16).max
    x[6, ::2] = 1e-30
    x[6, 1] = 1e30
    x[7, 200] = 1.0
    x[8] = torch.logspace(-38, 38, 256)
    for dtype in DTYPES:
        rows = x if dtype == torch.float32 else x[[0, 1, 2, 3, 5, 6, 7, 8]].to(dtype)
        check_fp8(rows)
        check_nvfp4(rows)
        for out in (
            unpack_fp8(*pack_fp8(rows), dtype),
            unpack_nvfp4(*pack_nvfp4(rows), dtype),
        ):
            assert out.isfinite().all()
            assert (out[:3] == 0).all()
            largest = rows[4:].abs().float().amax(-1)
            torch.testing.assert_close(out[4:].abs().float().amax(-1), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [128, 192])
def test_a_row_depends_on_no_other_and_on_no_stride(hidden: int, dtype: torch.dtype) -> None:
    x = uneven(7, hidden, dtype)
    x[3] *= 1000
    wide = torch.full((7, 500), 9.0, dtype=dtype)
    wide[:, 100 : 100 + hidden] = x
    columns = x.t().contiguous().t()
    for pack in (pack_fp8, pack_nvfp4):
        whole = pack(x)
        for alike in (pack(wide[:, 100 : 100 + hidden]), pack(columns)):
            for one, other in zip(whole, alike, strict=True):
                assert one.is_contiguous()
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for row in range(7):
            for one, other in zip(whole, pack(x[row : row + 1]), strict=True):
                assert torch.equal(one[row : row + 1].view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    x = torch.zeros(0, 192, dtype=dtype)
    check_fp8(x)
    check_nvfp4(x)
    assert unpack_fp8(*pack_fp8(x), dtype).shape == x.shape
    assert unpack_nvfp4(*pack_nvfp4(x), dtype).shape == x.shape


def test_nvfp4_refuses_a_run_that_is_cut_off() -> None:
    with pytest.raises(ValueError, match="a multiple of 16 columns, not 100"):
        pack_nvfp4(torch.zeros(2, 100))


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(st.lists(FINITE, min_size=16, max_size=16), min_size=1, max_size=9))
def test_any_finite_row(runs: list[list[float]]) -> None:
    x = torch.tensor(runs).reshape(1, -1)
    check_fp8(x)
    check_nvfp4(x)


@given(
    st.lists(st.floats(-8, 8, width=16), min_size=48, max_size=48),
    st.integers(-60, 60),
)
def test_a_power_of_two_moves_to_the_fp32_scales(values: list[float], power: int) -> None:
    x = torch.tensor([values])
    if x.abs().max() == 0:
        return
    codes, scales = pack_fp8(x)
    moved_codes, moved_scales = pack_fp8(x * 2.0**power)
    assert torch.equal(codes.view(torch.uint8), moved_codes.view(torch.uint8))
    assert torch.equal(scales * 2.0**power, moved_scales)
    *codes_and_runs, row_scales = pack_nvfp4(x)
    *moved, moved_row_scales = pack_nvfp4(x * 2.0**power)
    for one, other in zip(codes_and_runs, moved, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(row_scales * 2.0**power, moved_row_scales)
