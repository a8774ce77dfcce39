"""The steps of which plans are made: what was run once need not be run again.

Placements and moves are told apart by the ranks that they join, not by the axes of the mesh they
are on: neighbouring axes that hold one letter, and are moved over together, are as one.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from math import prod
from operator import itemgetter

from isomoe.layout import Move, Placement, RegimePlan, WireFormat
from isomoe.prove.mutants import Mutant


def told_apart(
    plan: RegimePlan, shares: Mapping[str, object], mutant: Mutant | None
) -> list[object]:
    """The steps of a plan; with a mutant, those of other shares, axes or regimes are others."""
    if mutant is None:
        return list(_steps(plan, {}))
    return [(plan.regime, plan.mesh.axes, step) for step in _steps(plan, shares)]


def _steps(plan: RegimePlan, shares: Mapping[str, object]) -> Iterator[object]:
    """The steps from read to read: equal ones do the same moves between the same placements.

    A block that moves something inside counts with its kind.
    """
    world = plan.mesh.size_of(plan.mesh.attn_dp), plan.regime.equal
    inner = dict(plan.inner)
    has_copies = plan.mesh.parallelism.ep_num_redundant_experts > 0
    axes = plan.mesh.axes

    def on_ranks(placement: Placement) -> object:
        return on_ranks_of(placement, axes)

    def moved(moves: Iterable[Move]) -> object:
        return tuple(_moved(move, axes) for move in moves)

    before: object = None
    ran: dict[str, object] = {
        plan.embedding: (on_ranks(plan.embedding_gives), shares.get(plan.embedding))
    }
    for read in plan.reads:
        settles = [
            (tuple(ran[p] for p in settle.producers), moved(settle.route.moves), settle.route.fused)
            for settle in read.settles
        ]
        carry = read.carry and moved(read.carry.route.moves)
        residual = on_ranks(read.residual)
        yield world, before, carry, tuple(settles), residual, read.selects_rows
        ran = {
            d.consumer: (
                moved(d.route.moves),
                on_ranks(d.needs),
                on_ranks(d.gives),
                inner.get(d.consumer)
                and (plan.kinds[d.consumer], moved(inner[d.consumer]), has_copies),
                shares.get(d.consumer),
            )
            for d in read.deliveries
        }
        before = residual
    yield world, before, tuple(ran.values())


@cache
def on_ranks_of(placement: Placement, axes: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """A placement by its letters and over how many ranks each goes, major first."""
    runs = groupby(zip(placement, axes, strict=True), key=itemgetter(0))
    return tuple((letter, prod(size for _, size in run)) for letter, run in runs)


@cache
def _moved(move: Move, axes: tuple[int, ...]) -> tuple[object, ...]:
    """A move by the groups of ranks that it joins: their size, and how far apart members are."""
    size = prod(axes[axis] for axis in move.axes)
    stride = prod(axes[move.axes[-1] + 1 :])
    before, after = on_ranks_of(move.before, axes), on_ranks_of(move.after, axes)
    packed = move.bundle and move.bundle.format is not WireFormat.NONE
    return move.op, size, stride, before, after, packed
