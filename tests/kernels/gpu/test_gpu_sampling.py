"""Greedy choice, chosen log-probabilities and draws against float64 and the plain twin."""

import math
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_support import DEVICE, ON_GPU
from isomoe.kernels.gpu import sampling
from isomoe.kernels.gpu.configs import trying
from isomoe.kernels.sampling import RowSampling, sample, uniform

SIZES = [(1, 151936), (64, 151936), (3, 5000)] if ON_GPU else [(1, 9000), (5, 1000), (3, 1)]
SMALL = {"BLOCK": 64, "num_warps": 1}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_greedy_takes_the_lowest_id_among_ties(rows: int, vocab: int, dtype: torch.dtype) -> None:
    for logits in (torch.randn(rows, vocab), torch.randint(-3, 1, (rows, vocab)).float()):
        given = logits.to(dtype).to(DEVICE)
        ids, finite = sampling.greedy(given)
        assert (ids.dtype, finite.dtype) == (torch.int64, torch.bool)
        wanted = [row.index(max(row)) for row in given.tolist()]
        assert ids.tolist() == wanted
        assert finite.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_tells_what_is_not_finite(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 300)
    logits[1, 77] = torch.nan
    logits[2, 299] = -torch.tensor(torch.nan)
    logits[3, 5] = torch.inf
    logits[4] = -torch.inf
    logits[5, :299] = -torch.inf
    logits[6] = -0.0
    logits[6, 200] = 0.0
    with trying(sampling.GREEDY, SMALL):
        ids, finite = sampling.greedy(logits.to(dtype).to(DEVICE))
    assert finite.tolist() == [True, False, False, False, False, True, True, True]
    assert ids[3:7].tolist() == [5, 0, 299, 0]
    assert not sampling.counters(ids.device, 4096).any()


def test_rows_of_a_view_and_no_rows() -> None:
    wide = torch.randn(4, 500, device=DEVICE)
    logits = wide[:, 100:400]
    assert torch.equal(sampling.greedy(logits)[0], logits.argmax(-1))
    ids = torch.arange(8, device=DEVICE)[::2]
    wanted = logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(sampling.chosen_logprobs(logits, ids), wanted)
    assert torch.equal(draw(logits, [RowSampling(top_k=1)] * 4), logits.argmax(-1).cpu())
    ids, finite = sampling.greedy(logits[:0])
    assert ids.shape == finite.shape == (0,)
    assert sampling.chosen_logprobs(logits[:0], ids).shape == (0,)
    assert draw(logits[:0], []).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_chosen_logprobs(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(rows, vocab)).to(dtype)
    logits[:, vocab // 2 + 1 :] = -torch.inf
    ids = torch.randint(0, vocab // 2 + 1, (rows,))
    out = sampling.chosen_logprobs(logits.to(DEVICE), ids.to(DEVICE))
    wanted = logits.double().log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double().cpu(), wanted, rtol=1e-5, atol=1e-5)
    if vocab > 1:
        last = torch.full((rows,), vocab - 1, device=DEVICE)
        assert (sampling.chosen_logprobs(logits.to(DEVICE), last) == -torch.inf).all()


def draw(logits: Tensor, rows: list[RowSampling]) -> Tensor:
    """`sampling.draw` as `kernels.sample` is called; ids on the CPU."""
    columns = [
        (row.temperature, row.top_k, row.top_p, row.min_p, uniform(row.seed, row.position))
        for row in rows
    ]
    table = torch.tensor(columns, dtype=torch.float64).view(-1, 5).to(DEVICE)
    temperature, top_k, top_p, min_p, number = table.unbind(1)
    return sampling.draw(
        logits.to(DEVICE), temperature.float(), top_k.int(), top_p.float(), min_p.float(), number
    ).cpu()


def reference_probs(logits: Tensor, row: RowSampling) -> Tensor:
    """The filtered distribution in float64; border ties are kept."""
    probs = (logits.double() / row.temperature).softmax(-1)
    probs = probs.where(probs >= row.min_p * probs.max(), 0.0)
    if row.top_k > 0:
        kth = probs.sort(descending=True).values[min(row.top_k, probs.shape[0]) - 1]
        probs = probs.where(probs >= kth, 0.0)
    if row.top_p < 1:
        ordered = probs.sort(descending=True).values
        last = int((ordered.cumsum(0) < row.top_p * probs.sum()).sum())
        probs = probs.where(probs >= ordered[last], 0.0)
    return probs / probs.sum()


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.7},
    {"min_p": 0.1, "top_p": 0.8},
    {"min_p": 0.05, "top_k": 7, "top_p": 0.9, "temperature": 1.7},
    {"top_k": 400, "top_p": 0.9, "temperature": 2.0},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    ("vocab", "few", "many"),
    [(20, 256, 4096), (3000, 256, 4096), (3000, 16, 32)],
    ids=["short", "long", "crowded"],
)
def test_the_draw_inverts_the_filtered_distribution(
    vocab: int,
    few: int,
    many: int,
    filters: dict[str, float],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "_FEW", few)
    monkeypatch.setattr(sampling, "_MANY", many)
    logits = (2 * torch.randn(1, vocab)).to(dtype)
    count = 60 if ON_GPU else 4
    rows = [RowSampling(seed=7, position=i, **filters) for i in range(count)]  # type: ignore[arg-type]
    ids = draw(logits.expand(count, -1), rows).tolist()
    probs = reference_probs(logits[0], rows[0])
    edges = [0.0, *probs.cumsum(0).tolist()]
    for row, token in zip(rows, ids, strict=True):
        assert probs[token] > 0
        number = uniform(row.seed, row.position)
        assert edges[token] - 1e-6 <= number <= edges[token + 1] + 1e-6
    assert ids == sample(logits.expand(count, -1), rows).tolist()


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}])
@pytest.mark.parametrize("many", [4, 4096])
def test_ties_at_the_border_are_all_kept(
    filters: dict[str, float], many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_MANY", many)
    monkeypatch.setattr(sampling, "_FEW", min(many, 256))
    row = RowSampling(**filters)  # type: ignore[arg-type]
    columns = [[row.temperature], [row.top_k], [row.top_p], [row.min_p]]
    temperature, top_k, top_p, min_p = torch.tensor(columns, device=DEVICE).expand(4, 8)
    number = (torch.arange(8, device=DEVICE) + 0.5) / 8
    logits = torch.zeros(8, 8, device=DEVICE)
    ids = sampling.draw(logits, temperature, top_k.int(), top_p, min_p, number)
    assert ids.tolist() == list(range(8))


@pytest.mark.parametrize("offset", [0.0, 90.0, -1000.0])
@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0])
def test_logits_beyond_the_histogram(offset: float, scale: float) -> None:
    logits = scale * torch.randn(1, 2000) + offset
    rows = [
        RowSampling(seed=9, position=position, temperature=0.7, **filters)  # type: ignore[arg-type]
        for position, filters in enumerate(FILTERS[3:])
        if "temperature" not in filters
    ]
    ids = draw(logits.expand(len(rows), -1), rows)
    for row, token in zip(rows, ids.tolist(), strict=True):
        edges = [0.0, *reference_probs(logits[0], row).cumsum(0).tolist()]
        number = uniform(row.seed, row.position)
        assert edges[token] - 1e-5 <= number <= edges[token + 1] + 1e-5


def test_rows_are_drawn_alike_in_any_batch() -> None:
    logits = torch.randn(9, 700)
    rows = [
        RowSampling(
            seed=5, position=i, temperature=0.0 if i % 3 == 0 else 1.3, top_p=1 - 0.1 * (i % 2)
        )
        for i in range(9)
    ]
    together = draw(logits, rows)
    assert torch.equal(together, draw(logits, rows))
    assert torch.equal(together[::3], logits[::3].argmax(-1))
    order = [4, 0, 8, 2]
    assert torch.equal(draw(logits[order], [rows[i] for i in order]), together[order])
    with trying(sampling.DRAW, SMALL):
        assert torch.equal(together, draw(logits, rows))


@pytest.mark.skipif(not ON_GPU, reason="many draws")
def test_frequencies_pass_a_chi_square_test() -> None:
    logits = torch.randn(1, 12)
    draws = 4000
    for filters in ({}, {"top_k": 6, "top_p": 0.9}):
        rows = [RowSampling(seed=11, position=i, **filters) for i in range(draws)]  # type: ignore[arg-type]
        counts = draw(logits.expand(draws, -1), rows).bincount(minlength=12)
        probs = reference_probs(logits[0], rows[0])
        cells = [(n, draws * p) for n, p in zip(counts.tolist(), probs.tolist(), strict=True)]
        assert all(n == 0 for n, mean in cells if mean == 0)
        statistic = sum((n - mean) ** 2 / mean for n, mean in cells if mean > 0)
        freedom = sum(mean > 0 for _, mean in cells) - 1
        assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6, 1e-5, 1e-4])
def test_cold_rows_are_greedy(temperature: float) -> None:
    logits = 40 * torch.randn(5, 100)
    rows = [RowSampling(temperature=temperature, seed=i, top_p=0.9) for i in range(5)]
    assert torch.equal(draw(logits, rows), logits.argmax(-1))


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((8, 70), -torch.inf)
    logits[:, 4] = 0.0
    for filters in ({}, {"top_p": 0.9, "top_k": 5}, {"top_p": 0.99}, {"top_k": 60}):
        rows = [RowSampling(seed=i, **filters) for i in range(8)]  # type: ignore[arg-type]
        assert set(draw(logits, rows).tolist()) == {4}


def test_the_ends_of_the_running_sum() -> None:
    logits = torch.zeros(2, 100, device=DEVICE)
    logits[:, 0] = logits[:, 99] = -torch.inf
    ones = torch.ones(2, device=DEVICE)
    number = torch.tensor([0.0, 1.0 - 2.0**-24], device=DEVICE)
    for top_k in (0, 50):
        limit = torch.full((2,), top_k, dtype=torch.int32, device=DEVICE)
        ids = sampling.draw(logits, ones, limit, ones, 0 * ones, number)
        assert ids.tolist() == [1, 98]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_end(value: float) -> None:
    """With any token: such a step is given up."""
    logits = torch.full((6, 50), value)
    rows = [RowSampling(**filters) for filters in FILTERS[3:9]]  # type: ignore[arg-type]
    ids = draw(logits, rows)
    assert ((ids >= 0) & (ids < 50)).all()


@triton.jit
def _keys(values, out, back, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    ordered = sampling._ordered(tl.load(values + at))
    tl.store(out + at, ordered)
    tl.store(back + at, sampling._value(ordered))


def test_keys_are_in_order() -> None:
    given = [-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 2.0, torch.inf, torch.nan]
    values = torch.tensor([*given, *[-torch.nan] * 6], device=DEVICE)
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    back = torch.empty(16, device=DEVICE)
    _keys[(1,)](values, out, back, SIZE=16)
    found = out.tolist()
    assert all(low < high or index == 4 for index, (low, high) in enumerate(pairwise(found[:10])))
    assert found[4] == found[5]
    assert set(found[9:]) == {found[9]}
    torch.testing.assert_close(back, values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.skipif(not ON_GPU, reason="large")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", FILTERS)
def test_draws_over_a_real_vocabulary(filters: dict[str, float], dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(16, 151936)).to(dtype)
    rows = [RowSampling(seed=7, position=i, **filters) for i in range(16)]  # type: ignore[arg-type]
    for row, values, token in zip(rows, logits, draw(logits, rows).tolist(), strict=True):
        edges = [0.0, *reference_probs(values, row).cumsum(0).tolist()]
        number = uniform(row.seed, row.position)
        assert edges[token] - 1e-5 <= number <= edges[token + 1] + 1e-5
