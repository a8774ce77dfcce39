"""Moves from first principles, for tests: a placement is a string, a move a pair of strings.

Shares no code with `isomoe.layout`.
"""

from collections.abc import Callable, Iterator
from itertools import product

from support import placements, runs

Cost = Callable[[str, tuple[int, ...], str, str], float]
"""(op, axes, before, after) -> microseconds."""

LEGAL_TURNS = {
    "all_reduce": {"PR"},
    "reduce_scatter": {"PS"},
    "all_gather": {"SR", "CR"},
    "slice": {"RS"},
    "exchange": {"CS"},
    "dispatch": {"SS"},
    "combine": {"SS"},
}
"""The moves that `architecture.md` lists, by the letters that they turn; the all-to-all for experts
leaves different rows on different ranks."""


def legal_moves(axes: int, letters: str = "SRP") -> Iterator[tuple[str, tuple[int, ...], str, str]]:
    """Every (op, run, before, after) that may exist, by trying all of them."""
    valid = placements(axes, letters)
    for op, turns in LEGAL_TURNS.items():
        for run, before, after in product(runs(axes), valid, valid):
            inside = {before[a] + after[a] for a in run}
            outside = all(before[a] == after[a] for a in range(axes) if a not in run)
            if turns == {"SS"}:  # over the last axes along which rows differ; rows are sent whole
                outside &= run[-1] + 1 == before.count("S")
                outside &= op == "combine" or set(before) <= {"S", "R"}
            if outside and len(inside) == 1 and inside <= turns:
                yield op, run, before, after


def distances(axes: int, goal: str, cost: Cost, without: str = "") -> dict[str, float]:
    """The least cost from each placement to `goal` (relaxed until nothing changes)."""
    moves = [m for m in legal_moves(axes) if without not in (m[2], m[3]) and m[2] != m[3]]
    best = {p: float("inf") for p in placements(axes)} | {goal: 0.0}
    for _ in best:
        for op, run, before, after in moves:
            best[before] = min(best[before], cost(op, run, before, after) + best[after])
    return best
