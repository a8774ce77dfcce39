"""The steps that a layout is proven on: equal, ragged, empty and padded rows, in every phase."""

from collections.abc import Iterator
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
    """Steps for a regime over `groups` attention-DP groups.

    Decode steps want logits of every row, prefill steps of the last row of each request, mixed
    steps of some. One row is fewer than any group of ranks; 5 and 7 rows split unevenly.
    """
    if equal:
        yield _decode("decode of one row", (1,) * groups)
        ragged = tuple((group + 1) % 3 for group in range(groups))
        yield _padded("decode padded to two rows", ragged, (2,) * groups)
        yield _mixed("prefill of five rows", (5,) * groups)
    else:
        yield _decode("ragged decode, empty groups", tuple((3 * g + 2) % 4 for g in range(groups)))
        yield _prefill("one group alone", tuple(6 * (g == groups - 1) for g in range(groups)))
        real = tuple(1 + (5 * g) % 7 for g in range(groups))
        yield _mixed(
            "ragged mixed, some padded", real, tuple(n + g % 2 for g, n in enumerate(real))
        )


def _decode(name: str, real: Counts) -> Case:
    return Case(name=name, real=real, padded=real, chosen=tuple(tuple(range(n)) for n in real))


def _prefill(name: str, real: Counts) -> Case:
    chosen = tuple((n - 1,) if n else () for n in real)
    return Case(name=name, real=real, padded=real, chosen=chosen)


def _mixed(name: str, real: Counts, padded: Counts | None = None) -> Case:
    chosen = tuple(
        tuple(row for row in range(n) if (row + group) % 2 == 0) for group, n in enumerate(real)
    )
    return Case(name=name, real=real, padded=padded or real, chosen=chosen)


def _padded(name: str, real: Counts, padded: Counts) -> Case:
    return Case(name=name, real=real, padded=padded, chosen=tuple(tuple(range(n)) for n in real))
