"""Lightning attention against a float64 loop over tokens."""

import pytest
import torch
from torch import Tensor

from isomoe.kernels import AttentionBatch, lightning_attention

HEADS, DIM = 3, 8
DECAY = torch.tensor([0.02, 0.4, 3.0])


def reference(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One request's outputs and the state behind them, token by token."""
    q, k, v, state = q.double(), k.double(), v.double(), state.double().clone()
    out = torch.zeros_like(q)
    for token in range(len(q)):
        for head in range(HEADS):
            state[head] *= torch.exp(-DECAY[head].double())
            state[head] += torch.outer(k[token, head], v[token, head])
            out[token, head] = q[token, head] @ state[head] / DIM**0.5
    return out, state


def rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(3, count, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    q, k, v = made.unbind()
    return q, k, v


def batch(new: list[int], keys: list[int], slots: list[int]) -> AttentionBatch:
    return AttentionBatch(
        query_lens=tuple(new),
        context_lens=tuple(keys),
        block_tables=torch.zeros(len(new), 1, dtype=torch.int64),
        page_size=1000,
        state_slots=tuple(slots),
    )


@pytest.mark.parametrize("padding", [0, 3])
def test_a_mix_of_requests_is_the_reference(padding: int) -> None:
    """First rows, later rows and single ones, below and above what is computed at once."""
    new, keys, slots = [1, 130, 5, 70, 1, 64], [1, 130, 9, 71, 40, 128], [6, 0, 3, 2, 5, 7]
    torch.manual_seed(0)
    before = torch.randn(9, HEADS, DIM, DIM)
    states = before.clone()
    q, k, v = rows(sum(new) + padding, seed=1)
    out = lightning_attention(q, k, v, states, DECAY, batch(new, keys, slots))
    assert out.shape == q.shape
    assert out.dtype == torch.float32
    start = 0
    for count, context, slot in zip(new, keys, slots, strict=True):
        mine = slice(start, start + count)
        stale = before[slot] if context > count else torch.zeros_like(before[slot])
        expected, state = reference(q[mine], k[mine], v[mine], stale)
        torch.testing.assert_close(out[mine].double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states[slot].double(), state, rtol=1e-4, atol=1e-4)
        start += count
    assert torch.equal(out[start:], torch.zeros_like(out[start:]))
    for slot in (1, 4, 8):
        assert torch.equal(states[slot], before[slot]), "nobody's state"


@pytest.mark.parametrize("pieces", [[1] * 6, [150], [64, 64, 22], [63, 1, 1, 65, 20], [100, 50]])
def test_pieces_of_a_prompt_are_the_prompt(pieces: list[int]) -> None:
    total = sum(pieces)
    q, k, v = rows(total, seed=2)
    states = torch.full((2, HEADS, DIM, DIM), 50.0)
    parts, done = [], 0
    for count in pieces:
        mine = slice(done, done + count)
        done += count
        step = batch([count], [done], [1])
        parts.append(lightning_attention(q[mine], k[mine], v[mine], states, DECAY, step))
    expected, state = reference(q, k, v, torch.zeros(HEADS, DIM, DIM))
    torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1].double(), state, rtol=1e-4, atol=1e-4)


def test_padding_rows_advance_no_state() -> None:
    q, k, v = rows(7, seed=3)
    found = []
    for count in (4, 7):
        states = torch.ones(3, HEADS, DIM, DIM)
        step = batch([3, 1], [3, 5], [2, 0])
        out = lightning_attention(q[:count], k[:count], v[:count], states, DECAY, step)
        found.append((out[:4], states))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_no_request() -> None:
    q, k, v = rows(2, seed=4)
    states = torch.ones(1, HEADS, DIM, DIM)
    out = lightning_attention(q, k, v, states, DECAY, batch([], [], []))
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(states, torch.ones_like(states))
