"""Adjusted logits against a per-row twin in Python floats, and transformers' own penalty."""

import math
import random

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from isomoe.kernels.sampling import RowAdjustment, RowPenalties, adjust, pack_bits

VOCABS = [1, 31, 32, 33, 640]


def naive(logits: list[float], row: RowAdjustment) -> list[float]:
    """One row, token by token."""
    out = list(logits)
    if row.bias is not None:
        for token, bias in zip(*(part.tolist() for part in row.bias), strict=True):
            out[token] += bias
    if row.penalties is not None:
        p = row.penalties
        for token, count in zip(p.token_ids.tolist(), p.counts.tolist(), strict=True):
            out[token] *= 1 / p.repetition if out[token] > 0 else p.repetition
            out[token] -= p.frequency * count + (p.presence if count else 0)
    if row.allowed is not None:
        words = row.allowed.tolist()
        for token in range(len(out)):
            if not words[token // 32] >> token % 32 & 1:
                out[token] = -math.inf
    return out


def random_row(rng: random.Random, vocab: int) -> RowAdjustment:
    biased = rng.sample(range(vocab), rng.randint(1, min(vocab, 9)))
    seen = rng.sample(range(vocab), rng.randint(1, vocab))
    allowed = torch.tensor([rng.random() < 0.5 for _ in range(vocab)])
    bias = torch.tensor(biased), torch.tensor([rng.uniform(-100, 100) for _ in biased])
    penalties = RowPenalties(
        token_ids=torch.tensor(seen),
        counts=torch.tensor([rng.choice([0, 1, 7]) for _ in seen]),
        presence=rng.uniform(-2, 2),
        frequency=rng.uniform(-2, 2),
        repetition=rng.uniform(0.2, 3),
    )
    return RowAdjustment(
        bias=rng.choice([None, bias]),
        penalties=rng.choice([None, penalties]),
        allowed=rng.choice([None, pack_bits(allowed)]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_are_adjusted_as_one_by_one(vocab: int, dtype: torch.dtype) -> None:
    rng = random.Random(vocab)
    torch.manual_seed(0)
    for count in (1, 2, 40):
        logits = (5 * torch.randn(count, vocab)).to(dtype)
        before = logits.clone()
        rows = [random_row(rng, vocab) for _ in range(count)]
        out = adjust(logits, rows)
        expected = [naive(values, row) for values, row in zip(logits.tolist(), rows, strict=True)]
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, torch.tensor(expected), rtol=1e-5, atol=1e-4)
        assert torch.equal(logits, before)


def test_rows_that_ask_for_nothing_stay_as_they_are() -> None:
    logits = torch.randn(3, 50)
    biased = RowAdjustment(bias=(torch.tensor([4]), torch.tensor([2.0])))
    out = adjust(logits, [RowAdjustment(), biased, RowAdjustment()])
    assert torch.equal(out[::2], logits[::2])
    assert out.data_ptr() != logits.data_ptr()
    assert (out[1] - logits[1]).nonzero().flatten().tolist() == [4]
    assert adjust(logits[:0], []).shape == (0, 50)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(4, 97)
    ids = torch.randint(0, 97, (4, 30))
    for penalty in (0.5, 1.0, 1.3):
        rows = [row_penalties(row, repetition=penalty) for row in ids]
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        torch.testing.assert_close(adjust(logits, rows), expected)


def row_penalties(held: Tensor, repetition: float) -> RowAdjustment:
    token_ids, counts = held.unique(return_counts=True)
    return RowAdjustment(
        penalties=RowPenalties(token_ids=token_ids, counts=counts, repetition=repetition)
    )


@pytest.mark.parametrize("repetition", [1e-300, 1e300])
def test_an_absurd_repetition_penalty_leaves_numbers(repetition: float) -> None:
    logits = torch.tensor([[0.0, 50.0, -50.0, 1.0]])
    out = adjust(logits, [row_penalties(torch.arange(4), repetition)])
    assert bool(out.isfinite().all())
    assert out[0, 1] > out[0, 3]
    assert out[0, 2] < out[0, 0]


def test_biases_of_one_token_add_up() -> None:
    bias = torch.tensor([2, 2]), torch.tensor([1.0, 2.5])
    assert adjust(torch.zeros(1, 4), [RowAdjustment(bias=bias)]).tolist() == [[0, 0, 3.5, 0]]


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_bitmask_has_one_bit_a_token(vocab: int) -> None:
    torch.manual_seed(2)
    allowed = torch.rand(vocab) < 0.5
    words = pack_bits(allowed)
    assert words.dtype == torch.int32
    assert words.shape == (-(-vocab // 32),)
    bits = [word >> bit & 1 for word in words.tolist() for bit in range(32)]
    assert bits[:vocab] == allowed.int().tolist()
    assert not any(bits[vocab:])
