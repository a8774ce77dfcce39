"""The steps that a layout is proven on: equal, ragged, empty and padded rows, in every phase."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step.

    Attributes:
        name: what is printed.
        real: tokens of each attention-DP group.
        padded: rows of each group, padding included.
        chosen: for each group, the rows that get logits.
    """

    name: str
    real: Counts
    padded: Counts
    chosen: tuple[tuple[int, ...], ...]


def cases(groups: int, equal: bool) -> Iterator[Case]:
    """Steps for a regime over `groups` attention-DP groups; the last one selects some rows.

    One row is fewer than any group of ranks; 5 and 7 rows split unevenly. Some groups are empty,
    some padded.
    """
    each = range(groups)
    if equal:
        yield _case("decode of one row", [1] * groups)
        real = [(4 * group + 2) % 6 for group in each]
        yield _case("five rows, some padding", real, padded=[5] * groups, chosen=_every_other)
    else:
        yield _case("one group alone", [6 * (group == groups - 1) for group in each], chosen=_last)
        real = [(5 * group + 3) % 8 for group in each]
        padded = [rows + group % 2 for group, rows in enumerate(real)]
        yield _case("ragged, some padding", real, padded, chosen=_every_other)


_Choice = Callable[[int, int], Iterable[int]]
"""The rows that get logits, from a group's number and how many rows it has."""


def _all(group: int, rows: int) -> Iterable[int]:
    """A decode step: every row is the last of its request."""
    return range(rows)


def _last(group: int, rows: int) -> Iterable[int]:
    """The prefill of one request."""
    return range(max(rows - 1, 0), rows)


def _every_other(group: int, rows: int) -> Iterable[int]:
    """A mixed step: rows in the midst of a prompt get none."""
    return (row for row in range(rows) if (row + group) % 2 == 0)


def _case(
    name: str, real: Sequence[int], padded: Sequence[int] | None = None, chosen: _Choice = _all
) -> Case:
    return Case(
        name=name,
        real=tuple(real),
        padded=tuple(padded or real),
        chosen=tuple(tuple(chosen(group, rows)) for group, rows in enumerate(real)),
    )
