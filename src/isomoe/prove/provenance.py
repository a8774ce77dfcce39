"""Provenance in place of numbers: what each row is, and what has been added to it.

A hidden state of the proof is [rows, 2] int64. Arithmetic is modulo 2^64, so it is exact and any
order of summation gives the same. Every contribution has a random ticket: a projection sharded
over its columns contributes `T(stop) - T(start)` for the columns it has, so that any partition of
the columns sums to the whole and nothing else does. A norm compares each row with what it should
hold, then hands out a tag: a mixed hash of the row, on which everything behind it depends.

A wrong row or count passes only if random 64-bit tickets cancel in both lanes. Where a row
differs, the case is run again in counting mode: lane 1 then holds plain integers, the columns
counted of one block.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

LANES = 2


@lru_cache(maxsize=1 << 16)
def ticket(name: str) -> tuple[int, int]:
    """Two random 64-bit integers for a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return (
        int.from_bytes(digest[:8], "little", signed=True),
        int.from_bytes(digest[8:], "little", signed=True),
    )


@dataclass
class Tickets:
    """The tickets of one run.

    Args:
        counting: the leaf whose columns lane 1 counts; None for random tickets in both lanes.
    """

    counting: str | None = None
    _cache: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _tables: dict[tuple[str, tuple[int, ...], tuple[int, int]], Tensor] = field(
        default_factory=dict
    )

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """The ticket of columns [start, stop) of leaf `name`: [LANES]."""
        key = (name, start, stop)
        if key not in self._cache:
            high, low = self._boundary(name, stop), self._boundary(name, start)
            lanes = [_wrap(a - b) for a, b in zip(high, low, strict=True)]
            if self.counting is not None:
                lanes[1] = stop - start if name.startswith(self.counting) else 0
            self._cache[key] = torch.tensor(lanes, dtype=torch.int64)
        return self._cache[key]

    def experts(self, name: str, held: tuple[int, ...], width: tuple[int, int]) -> Tensor:
        """The tickets of experts' columns, and zeros where slot -1 points: [L + 1, LANES]."""
        key = (name, held, width)
        if key not in self._tables:
            rows = [self.columns(f"{name}.{expert}", *width) for expert in held]
            self._tables[key] = torch.stack([*rows, torch.zeros(LANES, dtype=torch.int64)])
        return self._tables[key]

    def expert_biases(self, name: str, held: tuple[int, ...]) -> Tensor:
        """The tickets of experts' biases, zeros where slot -1 points: [L + 1, LANES]."""
        rows = [self.once(f"{name}.{expert} bias") for expert in held]
        return torch.stack([*rows, torch.zeros(LANES, dtype=torch.int64)])

    def ids(self, name: str, vocab_size: int) -> Tensor:
        """The tickets of token ids, as the embedding `name` contributes them: [vocab, LANES]."""
        table = id_tickets(vocab_size)
        if self.counting is not None:
            table = table.clone()
            table[:, 1] = name == self.counting
        return table

    def once(self, name: str) -> Tensor:
        """The ticket of something that is added whole, such as a bias: [LANES]."""
        return self.columns(name, 0, 1)

    def tag(self, rows: Tensor) -> Tensor:
        """What a norm hands out for rows: [T, LANES] -> [T, LANES]. Not linear, on purpose."""
        tag = rows * -7046029254386353131
        tag = tag ^ (tag >> 29)
        tag = tag * -4658895280553007687
        return self._plain(tag)

    def routing_weight(self, weights: Tensor) -> Tensor:
        """The exact bits of routing weights, as factors: [T, K] fp32 -> [T, K, LANES]."""
        bits = weights.contiguous().view(torch.int32).to(torch.int64)
        return self._plain(bits.unsqueeze(-1).expand(*bits.shape, LANES))

    def _plain(self, x: Tensor) -> Tensor:
        if self.counting is None:
            return x
        x = x.clone()
        x[..., 1] = 1
        return x

    @staticmethod
    def _boundary(name: str, column: int) -> tuple[int, int]:
        return ticket(f"{name}@{column}") if column else (0, 0)


def _wrap(value: int) -> int:
    """`value` modulo 2^64 as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63


def router_logits(tags: Tensor, name: str, num_experts: int) -> Tensor:
    """Pseudo-random router logits of rows: a function of tag and router only. [T, E] fp32."""
    factors = _router_factors(name, num_experts)
    return ((tags[:, :1] * factors) >> 41).to(torch.float32) * 2.0**-20


@lru_cache(maxsize=256)
def _router_factors(name: str, num_experts: int) -> Tensor:
    return torch.tensor(
        [ticket(f"{name}#{expert}")[0] | 1 for expert in range(num_experts)], dtype=torch.int64
    )


@lru_cache(maxsize=8)
def id_tickets(vocab_size: int) -> Tensor:
    """The ticket of each token id: [vocab, LANES]."""
    return torch.tensor([ticket(f"id {i}") for i in range(vocab_size)], dtype=torch.int64)


@lru_cache(maxsize=8)
def logit_factors(vocab_size: int) -> Tensor:
    """What the lm_head multiplies a row's tag with, for each entry of the vocabulary: [vocab]."""
    return torch.tensor([ticket(f"logit {i}")[0] | 1 for i in range(vocab_size)], dtype=torch.int64)
