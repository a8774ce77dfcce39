"""Which rows of an activation each rank holds.

Rows are ordered by attention-DP group, and within a group by request. A row-sharded activation
splits each group's rows further, evenly, in rank order. Padding rows stand at the end of their
group: they have a place but no meaning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from isomoe.errors import PlacementError
from isomoe.layout.mesh import Axes, Mesh, Seat


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The row map of one activation over all ranks.

    Attributes:
        mesh: the ranks.
        leaves: rows of each rank when every axis is row-sharded, in rank order. A placement
            whose first k axes are S joins the leaves of ranks that agree on those axes.
    """

    mesh: Mesh
    leaves: tuple[int, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    @cached_property
    def _counts(self) -> dict[tuple[int, Axes], tuple[int, ...]]:
        return {}

    def __post_init__(self) -> None:
        if len(self.leaves) != self.mesh.size or min(self.leaves) < 0:
            raise PlacementError(f"{len(self.leaves)} row counts for {self.mesh.size} ranks")
        object.__setattr__(self, "_starts", tuple(accumulate(self.leaves, initial=0)))

    @property
    def total(self) -> int:
        """Rows of all ranks together, padding included."""
        return self._starts[-1]

    def span(self, rank: int, row_axes: int) -> tuple[int, int]:
        """[start, stop) of `rank`'s rows, in the order of all rows, when `row_axes` axes are S."""
        width = self.mesh.width_behind(row_axes)
        first = rank // width * width
        return self._starts[first], self._starts[first + width]

    def counts(self, seat: Seat, axes: Axes) -> tuple[int, ...]:
        """Rows of each member of `seat`'s group over `axes`, the last row-sharded axes."""
        group = self.mesh.group(seat.rank, axes)
        width, starts = self.mesh.width_behind(axes[-1] + 1), self._starts
        key = (group[0] // width, axes)
        if key not in self._counts:
            firsts = (rank // width * width for rank in group)
            self._counts[key] = tuple(starts[first + width] - starts[first] for first in firsts)
        return self._counts[key]

    def cut(self, seat: Seat, axes: Axes) -> slice:
        """This rank's part of the rows that its group over `axes` holds together."""
        start, _ = self.span(seat.rank, axes[0])
        mine, stop = self.span(seat.rank, axes[-1] + 1)
        return slice(mine - start, stop - start)


@dataclass(frozen=True, kw_only=True)
class TokenRows(Rows):
    """Rows of hidden states: one for each token of the step, and padding.

    Attributes:
        real: for each attention-DP group, its rows that are tokens; the rest is padding.
    """

    real: tuple[int, ...]

    @classmethod
    def of(
        cls, mesh: Mesh, real: Sequence[int], padded: Sequence[int] | None = None
    ) -> "TokenRows":
        """The row map of a step.

        Args:
            real: tokens of each attention-DP group.
            padded: rows of each group with its padding; None pads nothing.
        """
        held = tuple(real if padded is None else padded)
        groups = mesh.size_of(mesh.attn_dp)
        if (
            len(real) != groups
            or len(held) != groups
            or any(not 0 <= has <= holds for has, holds in zip(real, held, strict=True))
        ):
            raise PlacementError(f"rows {tuple(real)} in {held} do not fit {groups} DP groups")
        leaves = tuple(n for rows in held for n in even_split(rows, mesh.size // groups))
        return cls(mesh=mesh, leaves=leaves, real=tuple(real))

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of each attention-DP group's rows, padding included."""
        prefix, width = len(self.mesh.attn_dp), self.mesh.parallelism.attn_tp
        return tuple(self.span(rank, prefix) for rank in range(0, self.mesh.size, width))

    @cached_property
    def _padding(self) -> dict[tuple[int, int], list[slice]]:
        """Padding rows by span, found when they are asked for."""
        return {}

    @property
    def has_padding(self) -> bool:
        """Whether any group has padding rows."""
        return sum(self.real) < self.total

    def padding(self, rank: int, row_axes: int) -> list[slice]:
        """The padding rows among those that `rank` holds when `row_axes` axes are S."""
        span = self.span(rank, row_axes)
        if span not in self._padding:
            self._padding[span] = list(self._padding_in(*span))
        return self._padding[span]

    def _padding_in(self, start: int, stop: int) -> Iterator[slice]:
        for (first, last), real in zip(self.groups, self.real, strict=True):
            low, high = max(first + real, start), min(last, stop)
            if low < high:
                yield slice(low - start, high - start)

    def select(self, chosen: Sequence[Sequence[int]]) -> "LogitsRows":
        """The rows still needed at the end of the step.

        Args:
            chosen: for each attention-DP group, ascending positions among its rows.

        Raises:
            PlacementError: for a position that is not the group's own, or out of order.
        """
        index: list[int] = []
        for group, ((first, last), rows) in enumerate(zip(self.groups, chosen, strict=True)):
            before = first - 1
            for row in rows:
                if not before < first + row < last:
                    raise PlacementError(
                        f"row {row} of group {group} cannot be selected: it has {last - first} "
                        f"rows, and positions ascend, not {list(rows)}"
                    )
                before = first + row
                index.append(before)
        depth, leaves, at = len(self.mesh.all), [], 0
        for rank in range(self.mesh.size):
            _, stop = self.span(rank, depth)
            here = at
            while at < len(index) and index[at] < stop:
                at += 1
            leaves.append(at - here)
        return LogitsRows(mesh=self.mesh, leaves=tuple(leaves), index=tuple(index))


@dataclass(frozen=True, kw_only=True)
class LogitsRows(Rows):
    """Rows that get logits: a selection of a step's token rows. Its counts are its own.

    Attributes:
        index: the selected rows' places among all token rows, ascending.
    """

    index: tuple[int, ...]

    def local(self, source: TokenRows, rank: int, row_axes: int) -> list[int]:
        """Places of the selected rows among those that `rank` holds when `row_axes` axes are S."""
        offset, _ = source.span(rank, row_axes)
        first, last = self.span(rank, row_axes)
        return [row - offset for row in self.index[first:last]]


def even_split(rows: int, ways: int) -> list[int]:
    """`rows` in `ways` parts that differ by one at most, larger parts first."""
    base, extra = divmod(rows, ways)
    return [base + (part < extra) for part in range(ways)]
