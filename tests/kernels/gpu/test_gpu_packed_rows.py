"""Packed rows on GPUs: the same bits as of the plain twin, whose tests search for the nearest."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpu_support import DEVICE
from isomoe.kernels import dispatch
from isomoe.kernels import packed_rows as plain
from isomoe.kernels.gpu import packed_rows as gpu

DTYPES = [torch.bfloat16, torch.float32]
FORMATS = [
    (plain.pack_fp8, plain.unpack_fp8, gpu.pack_fp8, gpu.unpack_fp8),
    (plain.pack_nvfp4, plain.unpack_nvfp4, gpu.pack_nvfp4, gpu.unpack_nvfp4),
]


def same_bits(one: Tensor, other: Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


def check(x: Tensor) -> None:
    for pack, unpack, gpu_pack, gpu_unpack in FORMATS:
        packed, gpu_packed = pack(x), gpu_pack(x.to(DEVICE))
        for one, other in zip(packed, gpu_packed, strict=True):
            same_bits(one, other)
        for dtype in DTYPES:
            same_bits(unpack(*packed, dtype), gpu_unpack(*gpu_packed, dtype))


def uneven(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows whose runs have very unlike magnitudes, some of them zero."""
    torch.manual_seed(0)
    magnitudes = torch.exp(4 * torch.randn(rows, hidden // 16)).repeat_interleave(16, 1)
    x = torch.randn(rows, hidden) * magnitudes
    x[:, 16:32] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "hidden"), [(1, 64), (3, 128), (7, 192), (5, 2880), (3, 2048), (2, 7168), (0, 64)]
)
def test_the_bits_are_the_twins(rows: int, hidden: int, dtype: torch.dtype) -> None:
    check(uneven(rows, hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: torch.dtype) -> None:
    x = uneven(48, 512, dtype)
    there = x.to(DEVICE)
    views = (
        (x[:5, 100:292], there[:5, 100:292]),
        (x[:5:2], there[:5:2]),
        (x.t()[:3], there.t()[:3]),
    )
    for view, view_there in views:
        for pack, _, gpu_pack, _ in FORMATS:
            for one, other in zip(pack(view), gpu_pack(view_there), strict=True):
                same_bits(one, other)


def test_unpacking_parts_of_a_bundle() -> None:
    x = uneven(3, 64, torch.float32)
    for pack, unpack, _, gpu_unpack in FORMATS:
        parts = [torch.cat((part, part), 1)[:, : part.shape[1]] for part in pack(x)]
        found = gpu_unpack(*(part.to(DEVICE) for part in parts), torch.float32)
        same_bits(unpack(*pack(x), torch.float32), found)


@pytest.mark.parametrize("hidden", [1, 127, 130])
def test_fp8_takes_rows_of_any_size(hidden: int) -> None:
    x = torch.randn(3, hidden)
    packed = plain.pack_fp8(x)
    for one, other in zip(packed, gpu.pack_fp8(x.to(DEVICE)), strict=True):
        same_bits(one, other)
    found = gpu.unpack_fp8(*(part.to(DEVICE) for part in packed), torch.bfloat16)
    same_bits(plain.unpack_fp8(*packed, torch.bfloat16), found)


def test_nvfp4_refuses_a_run_that_is_cut_off() -> None:
    with pytest.raises(ValueError, match="a multiple of 16 columns, not 100"):
        gpu.pack_nvfp4(torch.zeros(2, 100, device=DEVICE))


def around_ties(values: Tensor) -> Tensor:
    """Midpoints between neighbours and what is next to them in fp32, of both signs."""
    middles = (values[1:] + values[:-1]) / 2
    below, above = middles.nextafter(torch.zeros(())), middles.nextafter(torch.tensor(1e9))
    return torch.cat((below, middles, above, -below, -middles, -above))


def test_values_around_every_tie() -> None:
    e4m3 = around_ties(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
    x = torch.full((7, 128), 448.0)  # a run of scale 1 each
    x[:, :108] = e4m3.reshape(7, 108)
    check(x)
    e2m1 = around_ties(torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]))
    x = torch.full((1, 64), 6.0)  # runs of scale 1
    x[:, 0] = 448 * 6  # in a row of scale 1
    x[:, 16:30], x[:, 32:46], x[:, 48:62] = e2m1.reshape(3, 14)
    check(x)


def test_extremes() -> None:
    x = torch.zeros(7, 256)
    x[1, 0] = -0.0
    x[2] = 1e-44  # subnormal
    x[3] = 4e-36
    x[3, 0] = -6e-36
    x[4] = torch.finfo(torch.float32).max
    x[5, ::2] = 1e-30
    x[5, 1] = -1e30
    x[6] = torch.logspace(-38, 38, 256)
    check(x)


@settings(max_examples=30)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=32, max_size=32)
)
def test_any_finite_row(values: list[float]) -> None:
    check(torch.tensor([values]))


def test_dispatch_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", True)
    x = uneven(2, 64, torch.bfloat16)
    there = x.to(DEVICE)
    found = dispatch.unpack_fp8(*dispatch.pack_fp8(there), torch.bfloat16)
    same_bits(plain.unpack_fp8(*plain.pack_fp8(x), torch.bfloat16), found)
    found = dispatch.unpack_nvfp4(*dispatch.pack_nvfp4(there), torch.bfloat16)
    same_bits(plain.unpack_nvfp4(*plain.pack_nvfp4(x), torch.bfloat16), found)


def ptx(arch: int) -> dict[str, str]:
    """What the kernels compile to for an architecture; in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels: list[tuple[Any, str, dict[str, int]]] = [
        (gpu._pack_fp8, "*bf16 *u8 *fp32 i32", {"H": 2880, "RUN": 128, "BLOCK_RUNS": 8}),
        (gpu._unpack_fp8, "*u8 *fp32 *bf16", {"H": 2880, "RUN": 128, "BLOCK_H": 1024}),
        (gpu._pack_nvfp4, "*bf16 *u8 *u8 *fp32 i32", {"RUNS": 180, "RUN": 16, "BLOCK_RUNS": 256}),
        (gpu._unpack_nvfp4, "*u8 *u8 *fp32 *bf16", {"PAIRS": 1440, "RUN": 16, "BLOCK_PAIRS": 512}),
    ]
    found = {}
    for kernel, types, constants in kernels:
        constants = {**constants, "PDL": arch >= 90}
        names = [name for name in kernel.arg_names if name not in constants]
        signature = dict.fromkeys(constants, "constexpr")
        signature |= dict(zip(names, types.split(), strict=True))
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        found[kernel.fn.__name__] = compiled.asm["ptx"]
    return found


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_division_is_exact_and_subnormals_stay(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        kernels = pool.submit(ptx, arch).result()
    assert len(kernels) == 4
    for name, text in kernels.items():
        divisions = set(re.findall(r"\b(?:div|rcp)\.\S*f32", text))
        assert divisions == ({"div.rn.f32"} if name.startswith("_pack") else set())
        assert ".ftz" not in text
