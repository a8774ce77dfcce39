"""The only moves that exist, typed: each says which letter it turns into which.

There is none from R or S to P, and none that sums an axis which is not P, so a second reduction
cannot be written down.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from itertools import count

from isomoe.errors import PlacementError
from isomoe.layout.mesh import Axes
from isomoe.layout.placement import Letter, Placement
from isomoe.layout.wire import Bundle


class Op(StrEnum):
    """What a move does along its axes."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    SLICE = "slice"
    EXCHANGE = "exchange"
    DISPATCH = "dispatch"
    COMBINE = "combine"


_TURNS: dict[Op, tuple[tuple[Letter, Letter], ...]] = {
    Op.ALL_REDUCE: ((Letter.P, Letter.R),),
    Op.REDUCE_SCATTER: ((Letter.P, Letter.S),),
    Op.ALL_GATHER: ((Letter.S, Letter.R), (Letter.C, Letter.R)),
    Op.SLICE: ((Letter.R, Letter.S),),
    Op.EXCHANGE: ((Letter.C, Letter.S),),
    Op.DISPATCH: ((Letter.S, Letter.S),),
    Op.COMBINE: ((Letter.S, Letter.S),),
}
_BETWEEN_BLOCKS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.SLICE)


@dataclass(frozen=True, slots=True)
class Move:
    """One move over a run of axes.

    `all_gather` joins rows (from S) or features (from C, inside a block). Inside a block there are
    three more: `exchange` is an all-to-all that trades sharded features for sharded rows;
    `dispatch` sends each row to the ranks that have experts of its choice, and `combine` brings
    back what those make of it, added up: both leave different rows on different ranks.

    Attributes:
        bundle: what travels of a row, or went out with it, where that is not the row alone.

    Raises:
        PlacementError: if the run is not one, or the move cannot turn `before` into `after`.
    """

    op: Op
    axes: Axes
    before: Placement
    after: Placement
    bundle: Bundle | None = None

    def __post_init__(self) -> None:
        run = self.axes
        if not run or run != tuple(range(run[0], run[-1] + 1)) or run[-1] >= len(self.before):
            raise PlacementError(f"{self.op} over axes {run}: a move takes a run of mesh axes")
        old, new = self.before[run[0]], self.after[run[0]]
        if (old, new) not in _TURNS[self.op] or self.before.put(Letter(new), run) != self.after:
            takes = " or ".join(f"{a} to {b}" for a, b in _TURNS[self.op])
            raise PlacementError(
                f"{self.op} over axes {run} turns {takes}; it cannot turn "
                f"{self.before} into {self.after}"
            )
        for axis in run:
            if self.before[axis] != old:
                raise PlacementError(
                    f"{self.op} over axes {run}: axis {axis} of {self.before} is "
                    f"{self.before[axis]}, not {old}"
                )
        if self.op is Op.DISPATCH and set(self.before) - {Letter.S, Letter.R}:
            raise PlacementError(f"{self.op} of {self.before}: rows are sent whole")
        if Letter.S in (old, new) and run[-1] + 1 != max(self.before.row_axes, self.after.row_axes):
            raise PlacementError(f"{self.op} over axes {run} of {self.before} splits a row shard")

    def __str__(self) -> str:
        return f"{self.op}({','.join(map(str, self.axes))}) {self.before}>{self.after}"

    def to_json(self) -> dict[str, object]:
        """{"op", "axes", "from", "to"}, and "bundle" where there is one."""
        shown: dict[str, object] = {
            "op": str(self.op),
            "axes": list(self.axes),
            "from": str(self.before),
            "to": str(self.after),
        }
        if self.bundle is not None:
            shown["bundle"] = {**asdict(self.bundle), "format": str(self.bundle.format)}
        return shown


@cache
def moves_from(placement: Placement) -> tuple[Move, ...]:
    """Every move between blocks that may start at `placement`."""
    return tuple(_moves_from(placement))


def _moves_from(placement: Placement) -> Iterator[Move]:
    axes = len(placement)
    for first in range(axes):
        for stop in range(first + 1, axes + 1):
            run = tuple(range(first, stop))
            for op in _BETWEEN_BLOCKS:
                for old, new in _TURNS[op]:
                    if old is not Letter.C and all(placement[a] == old for a in run):
                        try:
                            yield Move(op, run, placement, placement.put(new, run))
                        except PlacementError:
                            continue


@cache
def sums_into(placement: Placement) -> tuple[Move, ...]:
    """Every move that sums and ends at `placement`."""
    found = []
    for first in range(len(placement)):
        for stop in range(first + 1, len(placement) + 1):
            run = tuple(range(first, stop))
            letters = {placement[axis] for axis in run}
            for op, letter in ((Op.ALL_REDUCE, Letter.R), (Op.REDUCE_SCATTER, Letter.S)):
                # Rows are scattered over the last of the row-sharded axes.
                if letters == {letter} and (letter is Letter.R or stop == placement.row_axes):
                    found.append(Move(op, run, placement.put(Letter.P, run), placement))
    return tuple(found)


def cheapest(
    before: Placement,
    after: Placement,
    cost: Callable[[Move], float],
    avoid: Move | None = None,
) -> tuple[float, tuple[Move, ...]]:
    """The cheapest chain of moves between two placements (Dijkstra over placements).

    Args:
        cost: what a move costs; must be positive, so that fewer moves win a tie.
        avoid: a first move that the chain may not begin with (to find what the best one beat).

    Raises:
        PlacementError: if no chain exists; names the axis and the letters.
    """
    for here, total, chain in chains_from(before, cost, avoid):
        if here == after:
            return total, chain
    raise unreachable(before, after)


def chains_from(
    before: Placement, cost: Callable[[Move], float], avoid: Move | None = None
) -> Iterator[tuple[Placement, float, tuple[Move, ...]]]:
    """Every placement that moves lead to, nearest first, with the cheapest chain and its cost."""
    order = count()
    queue: list[tuple[float, int, Placement, tuple[Move, ...]]] = [(0.0, next(order), before, ())]
    done: set[Placement] = set()
    while queue:
        total, _, here, chain = heapq.heappop(queue)
        if here in done:
            continue
        done.add(here)
        yield here, total, chain
        for move in moves_from(here):
            if move.after not in done and (chain or move != avoid):
                heapq.heappush(queue, (total + cost(move), next(order), move.after, (*chain, move)))


def unreachable(before: Placement, after: Placement) -> PlacementError:
    """That no chain of moves leads there; names the axis and the letters."""
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new and (new in "PC" or old == "C"):
            return PlacementError(f"no move turns axis {axis} from {old} into {new}")
    return PlacementError(f"no chain of moves turns {before} into {after}")
