"""RMS norm, SwiGLU's activation and products of few rows against float64."""

import pytest
import torch
from torch import Tensor

from gpu_support import BOUND, DEVICE, ON_GPU, relative_error
from isomoe.kernels import norm as plain_norm
from isomoe.kernels.gpu import ffn, norm
from isomoe.kernels.gpu.configs import Config, trying
from isomoe.kernels.gpu.linear import (
    _COUNTERS,
    CUBLAS,
    LINEAR,
    TILE,
    VECTOR,
    _default,
    candidates,
    counters,
    linear,
)

DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-6


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).to(DEVICE)


def norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 2048), (3, 100), (5, 7), (1, 1), (1030, 96)])
def test_rms_norm(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, hidden, dtype=dtype), random(hidden, dtype=dtype)
    out = norm.rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    assert relative_error(out, norm_reference(x, weight)) < BOUND[dtype]


@pytest.mark.skipif(not ON_GPU, reason="large")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 2048), (64, 2048), (65536, 2048), (4097, 7168)])
def test_large_rms_norm(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, hidden, dtype=dtype), random(hidden, dtype=dtype)
    assert relative_error(norm.rms_norm(x, weight, EPS), norm_reference(x, weight)) < BOUND[dtype]


def test_rms_norm_rounds_where_the_twin_does() -> None:
    x, weight = random(6, 128, dtype=torch.bfloat16), random(128, dtype=torch.bfloat16)
    twin = plain_norm.rms_norm(x, weight, EPS)
    out = norm.rms_norm(x, weight, EPS)
    # The row's statistic may differ in its last bit, and so turn a rounding here and there.
    assert int((out != twin).sum()) <= 4
    assert norm.rms_norm(x.float(), weight, EPS).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [2, 210])
def test_rms_norm_of_unlike_heads_and_of_views(rows: int) -> None:
    x, weight = random(rows, 7, 24)[:, 1:6], random(5, 24)
    out = norm.rms_norm(x, weight, EPS)
    assert out.shape == x.shape
    assert relative_error(out, norm_reference(x, weight)) < BOUND[torch.float32]
    wide = random(rows, 50)
    out = norm.rms_norm(wide[:, 3:43], weight.flatten()[:40], EPS)
    assert relative_error(out, norm_reference(wide[:, 3:43], weight.flatten()[:40])) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("addend_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 256), (4, 72), (1100, 40)])
def test_add_rms_norm(
    rows: int, hidden: int, addend_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    residual, weight = random(rows, hidden, dtype=dtype), random(hidden, dtype=torch.bfloat16)
    addend = random(rows, 2 * hidden, dtype=addend_dtype)[:, :hidden]
    wanted = (residual.float() + addend.float()).to(dtype)
    total, normed = norm.add_rms_norm(residual, addend, weight, EPS)
    assert total is residual
    assert torch.equal(total, wanted)
    assert relative_error(total, wanted) < BOUND[dtype]
    assert normed.dtype == torch.bfloat16
    assert relative_error(normed, norm_reference(wanted, weight)) < BOUND[torch.bfloat16]


def test_a_row_of_nan_stays_alone() -> None:
    x = random(40, 64)
    x[3] = torch.nan
    out = norm.rms_norm(x, random(64), EPS)
    assert out[3].isnan().all()
    assert int(out.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 768), (3, 100), (7, 1), (65, 96)])
def test_silu_and_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    x = random(rows, 2 * size, dtype=dtype, scale=3)
    gate, up = x.double().chunk(2, -1)
    out = ffn.silu_and_mul(x)
    assert (out.dtype, out.shape) == (dtype, (rows, size))
    assert relative_error(out, gate * gate.sigmoid() * up) < BOUND[dtype]
    config = {"ROWS": 4, "BLOCK_I": 64, "num_warps": 2}
    with trying(ffn.SILU, config):
        assert torch.equal(ffn.silu_and_mul(x), out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
def test_silu_and_mul_of_extremes_and_of_views() -> None:
    x = torch.tensor([[1e4, -1e4, -torch.inf, 2.0, 3.0, 0.0]], device=DEVICE)
    assert ffn.silu_and_mul(x)[0, :2].tolist() == [2e4, 0.0]
    wide = random(3, 2, 50)[..., :40]
    gate, up = wide.double().chunk(2, -1)
    assert relative_error(ffn.silu_and_mul(wide), gate * gate.sigmoid() * up) < 1e-5


OF_VECTOR = {"PATH": VECTOR, "STAGES": 1, "AHEAD": 1, "num_warps": 4}
OF_TILE = {"PATH": TILE, "num_warps": 4}
CONFIGS = [
    (4, {**OF_VECTOR, "BLOCK_N": 8, "BLOCK_K": 512}),
    (1, {**OF_VECTOR, "BLOCK_N": 4, "BLOCK_K": 64, "STAGES": 3}),
    (16, {**OF_TILE, "BLOCK_N": 64, "BLOCK_K": 64, "SPLITS": 1, "STAGES": 3}),
    (16, {**OF_TILE, "BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": 3, "STAGES": 2}),
    (16, {**OF_TILE, "BLOCK_N": 32, "BLOCK_K": 128, "SPLITS": 8, "STAGES": 4}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("most", "config"), CONFIGS)
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 256), (130, 328), (1, 17)])
def test_linear_on_each_path(
    outputs: int, inputs: int, most: int, config: Config, dtype: torch.dtype
) -> None:
    weight = random(outputs, inputs, dtype=dtype)
    for rows in sorted({1, min(3, most), most}):
        x = random(rows, inputs + 5, dtype=dtype)[:, :inputs]
        with trying(LINEAR, config):
            out = linear(x, weight)
            again = linear(x, weight)
        assert (out.dtype, out.shape) == (dtype, (rows, outputs))
        assert relative_error(out, x.double() @ weight.double().T) < BOUND[dtype]
        assert torch.equal(out, again)
    assert not counters(x.device, _COUNTERS).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 16, 17])
def test_linear_by_default(rows: int, dtype: torch.dtype) -> None:
    sizes = [(5120, 2048), (2048, 4096), (128, 2048), (151936, 2048)] if ON_GPU else [(90, 200)]
    for outputs, inputs in sizes:
        x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
        out = linear(x, weight)
        assert (out.dtype, out.shape) == (dtype, (rows, outputs))
        assert relative_error(out, x.double() @ weight.double().T) < BOUND[dtype]


@pytest.mark.parametrize("shape", [(5120, 2048), (2048, 4096), (128, 2048), (151936, 2048), (3, 2)])
def test_defaults_are_sane_and_candidates_few(shape: tuple[int, int]) -> None:
    for rows in (1, 4, 5, 16):
        assert _default(rows, *shape, 2)["PATH"] != CUBLAS
        found = list(candidates(rows, *shape))
        assert len(found) <= 60
        assert len({tuple(one.items()) for one in found}) == len(found)
    for rows in (1, 64, 65536):
        assert 0 < len(list(norm.candidates(rows, shape[1]))) <= 60
        assert 0 < len(list(ffn.candidates(rows, shape[1]))) <= 60


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    empty = random(0, 32, dtype=dtype)
    assert norm.rms_norm(empty, random(32), EPS).shape == (0, 32)
    assert norm.add_rms_norm(empty, empty, random(32), EPS)[1].shape == (0, 32)
    assert ffn.silu_and_mul(empty).shape == (0, 16)
    assert linear(empty, random(8, 32, dtype=dtype)).shape == (0, 8)


def test_a_tuned_entry_serves_other_numbers_of_rows() -> None:
    """As the nearest entry does: of one row for two, of four for ten, of bf16 for fp32."""
    one_row = {"PATH": VECTOR, "BLOCK_N": 2, "BLOCK_K": 32, "STAGES": 2, "AHEAD": 0, "num_warps": 1}
    four_rows = OF_VECTOR | {"BLOCK_N": 2, "BLOCK_K": 64}
    tile = OF_TILE | {"BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": 1, "STAGES": 2}
    cases = (
        (one_row, 2, torch.bfloat16),
        (four_rows, 10, torch.bfloat16),
        (four_rows, 3, torch.bfloat16),
        (tile, 40, torch.bfloat16),
        (tile, 6, torch.float32),
    )
    for config, rows, dtype in cases:
        x = torch.randn(rows, 64, device=DEVICE).to(dtype)
        weight = torch.randn(20, 64, device=DEVICE).to(dtype)
        with trying("linear", config):
            out = linear(x, weight)
        assert relative_error(out, x.double() @ weight.double().T) < BOUND[dtype]
