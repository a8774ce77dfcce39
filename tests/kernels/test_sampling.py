"""Sampling against a slow float64 reference, by set, by draw and by frequency."""

import math

import pytest
import torch
from torch import Tensor

from isomoe.kernels import RowSampling, logprobs, sample, top_logprobs, uniform


def reference_probs(logits: Tensor, row: RowSampling) -> list[float]:
    """The filtered distribution: temperature, min-p, top-k, top-p; border ties are kept."""
    values = [value / row.temperature for value in logits.double().tolist()]
    exps = [math.exp(value - max(values)) for value in values]
    probs = [value / sum(exps) for value in exps]
    if row.min_p > 0:
        probs = [p if p >= row.min_p * max(probs) else 0.0 for p in probs]
    if row.top_k > 0:
        kth = sorted(probs, reverse=True)[min(row.top_k, len(probs)) - 1]
        probs = [p if p >= kth else 0.0 for p in probs]
    if row.top_p < 1:
        mass, total = 0.0, sum(probs)
        least = 0.0
        for p in sorted(probs, reverse=True):
            mass += p
            least = p
            if mass >= row.top_p * total:
                break
        probs = [p if p >= least else 0.0 for p in probs]
    total = sum(probs)
    return [p / total for p in probs]


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
]


def test_logprobs_are_fp32_log_softmax() -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 50)).bfloat16()
    out = logprobs(logits)
    assert out.dtype == torch.float32
    for row, values in enumerate(logits.double().tolist()):
        normal = math.log(sum(math.exp(value) for value in values))
        expected = torch.tensor([value - normal for value in values], dtype=torch.float64)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)
    values_top, ids = top_logprobs(out, 4)
    assert torch.equal(values_top, out.sort(descending=True).values[:, :4])
    assert torch.equal(out.gather(1, ids), values_top)
    assert logprobs(logits[:0]).shape == (0, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_id_among_ties(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 4, (40, 3000)).to(dtype)
    ids = sample(logits, [RowSampling(temperature=0.0)] * 40)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 10), []).shape == (0,)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocab", [20, 3000])
def test_the_draw_inverts_the_filtered_distribution(vocab: int, filters: dict[str, float]) -> None:
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, vocab)
    rows = [RowSampling(seed=7, position=i, **filters) for i in range(60)]  # type: ignore[arg-type]
    ids = sample(logits.expand(60, -1), rows).tolist()
    probs = reference_probs(logits[0], rows[0])
    edges = [0.0]
    for p in probs:
        edges.append(edges[-1] + p)
    for row, token in zip(rows, ids, strict=True):
        assert probs[token] > 0
        number = uniform(row.seed, row.position)
        assert edges[token] - 1e-6 <= number <= edges[token + 1] + 1e-6


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}])
def test_ties_at_the_border_are_all_kept(filters: dict[str, float]) -> None:
    logits = torch.zeros(1, 8)
    rows = [RowSampling(seed=1, position=i, **filters) for i in range(200)]  # type: ignore[arg-type]
    assert set(sample(logits.expand(200, -1), rows).tolist()) == set(range(8))


@pytest.mark.parametrize("filters", FILTERS)
def test_frequencies_pass_a_chi_square_test(filters: dict[str, float]) -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 12)
    draws = 4000
    rows = [RowSampling(seed=11, position=i, **filters) for i in range(draws)]  # type: ignore[arg-type]
    counts = sample(logits.expand(draws, -1), rows).bincount(minlength=12).tolist()
    probs = reference_probs(logits[0], rows[0])
    cells = [(count, draws * p) for count, p in zip(counts, probs, strict=True) if p > 0]
    assert all(count == 0 for count, p in zip(counts, probs, strict=True) if p == 0)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


def test_a_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    logits = torch.linspace(0, 0.1, 5000).unsqueeze(0)
    rows = [RowSampling(seed=3, position=i, top_p=0.9) for i in range(300)]
    ids = sample(logits.expand(300, -1), rows)
    probs = reference_probs(logits[0], rows[0])
    allowed = [token for token, p in enumerate(probs) if p > 0]
    assert 4000 < len(allowed) < 5000
    assert int(ids.min()) >= allowed[0] - 1
    assert int((ids < 2500).sum()) > 80


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch() -> None:
    torch.manual_seed(3)
    logits = torch.randn(9, 2000)
    rows = [
        RowSampling(
            seed=5, position=i, temperature=0.0 if i % 3 == 0 else 1.3, top_p=1 - 0.1 * (i % 2)
        )
        for i in range(9)
    ]
    together = sample(logits, rows)
    assert torch.equal(together, sample(logits, rows))
    for i in range(9):
        assert sample(logits[i : i + 1], rows[i : i + 1]).tolist() == [int(together[i])]
    order = [4, 0, 8, 2]
    assert torch.equal(sample(logits[order], [rows[i] for i in order]), together[order])


def test_seeds_and_positions_give_unlike_and_even_numbers() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(numbers)) == 2500
    assert all(0 <= number < 1 for number in numbers)
    tenths = [sum(int(10 * number) == cell for number in numbers) for cell in range(10)]
    assert sum((count - 250) ** 2 / 250 for count in tenths) < 30
    assert uniform(-1, 0) != uniform(1, 0)
    assert uniform(0, 0) == uniform(1 << 64, 0)


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-30])
def test_cold_rows_are_greedy_and_finite(temperature: float) -> None:
    torch.manual_seed(4)
    logits = 40 * torch.randn(5, 100)
    ids = sample(logits, [RowSampling(temperature=temperature, seed=i) for i in range(5)])
    assert torch.equal(ids, logits.argmax(-1))


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((100, 30), -torch.inf)
    logits[:, 4] = 0.0
    ids = sample(logits, [RowSampling(seed=i, top_p=0.9, top_k=5) for i in range(100)])
    assert set(ids.tolist()) == {4}


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}]
)
def test_impossible_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RowSampling(**bad)  # type: ignore[arg-type]
