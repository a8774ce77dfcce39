"""Hypotheses that need what each rank holds: over which ranks a sum was in fact taken."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from isomoe.layout import Axes, Letter, Mesh, Placement
from isomoe.parity.bisect.assemble import Recording, Step, Whole, members
from isomoe.parity.bisect.compare_rows import typical_error
from isomoe.parity.bisect.locate import carried, settled
from isomoe.parity.bisect.result import CLOSE, Defect, Guess
from isomoe.parity.bisect.stations import Kind, Station


def of_block(other: Recording, station: Station, due: Whole, off: Tensor) -> Guess | None:
    """Whether ranks wrote copies where addends are due, or addends where copies are due.

    Args:
        due: the baseline's rows.
        off: places of the rows that are off.
    """
    step = _largest(other)
    for rank in range(_mesh(step).size):
        here = torch.isin(step.local(station, rank)[0], off)
        if bool(here.any()):
            base = due.at(step.local(station, rank)[0][here]).x
            return _copies(step, station, rank, here, base) or _addends(
                step, station, rank, here, base
            )
    return None


def _copies(step: Step, station: Station, rank: int, here: Tensor, base: Tensor) -> Guess | None:
    """Whether ranks along some P axes hold the same rows, so that the sum is a multiple."""
    due = step.placement(station).where(Letter.P)
    mine, total = step.local(station, rank)[1][here], _sum(step, station, rank, due)[here]
    for axes in _subsets(due):
        ways = len(members(_mesh(step), rank, axes))
        same = typical_error(_sum(step, station, rank, axes)[here], ways * mine) < CLOSE
        if same and typical_error(total, ways * base) < CLOSE:
            return Guess(
                Defect.DOUBLE_REDUCE,
                f"{ways} ranks give the same values as addends, so they are summed again over "
                f"{ways} ranks, or were never sharded over them",
            )
    return None


def _addends(step: Step, station: Station, rank: int, here: Tensor, base: Tensor) -> Guess | None:
    """Whether the copies along some R axes are addends of the baseline's rows."""
    for axes in _subsets(step.placement(station).where(Letter.R)):
        if typical_error(_sum(step, station, rank, axes)[here], base) < CLOSE:
            ways = len(members(_mesh(step), rank, axes))
            return Guess(
                Defect.MISSING_REDUCE,
                f"the sum over {ways} ranks is the baseline's, but nobody sums: each of them "
                "gives an addend",
            )
    return None


def of_read(other: Recording, station: Station) -> Guess | None:
    """Over which axes a read's sum was in fact taken, if not over those where it was due.

    None where the blocks that it settles write in different placements.
    """
    step = _largest(other)
    blocks = [Station(Kind.BLOCK, name) for name in settled(other, station.name).name.split(" + ")]
    gives = {step.placement(block) for block in blocks}
    if len(gives) > 1:
        return None
    (given,) = gives
    before = carried(other, station.name)
    for axes in sorted(_subsets(_mesh(step).all, empty=True), key=len):
        if axes != given.where(Letter.P) and _was_summed(step, station, blocks, axes, before):
            return _meaning(_mesh(step), given, axes)
    return None


def _meaning(mesh: Mesh, given: Placement, axes: Axes) -> Guess:
    """What a sum over `axes` means where one over the P axes was due."""
    due = given.where(Letter.P)
    missing = [axis for axis in due if axis not in axes]
    if any(given[axis] == Letter.S for axis in axes):
        ways = len(members(mesh, 0, axes))
        return Guess(
            Defect.WRONG_GROUP, f"the sum was taken over {ways} ranks, some with other rows"
        )
    if missing:
        ways = len(members(mesh, 0, missing))
        return Guess(Defect.MISSING_REDUCE, f"the addends of {ways} ranks were not summed")
    ways = len(members(mesh, 0, [axis for axis in axes if axis not in due]))
    return Guess(Defect.DOUBLE_REDUCE, f"copies of {ways} ranks were summed")


def _was_summed(
    step: Step, station: Station, blocks: Sequence[Station], axes: Axes, before: Whole | None
) -> bool:
    """Whether what arrived on every rank is the sum of what the ranks along `axes` wrote."""
    compared = 0
    for rank in range(_mesh(step).size):
        places, residual = step.local(station, rank)
        held, _ = step.local(blocks[0], rank)
        counts = {len(step.local(blocks[0], r)[0]) for r in members(_mesh(step), rank, axes)}
        if len(counts) > 1:
            return False
        here = (places >= 0) & torch.isin(places, held)
        if not bool(here.any()):
            continue
        rows = [held.tolist().index(place) for place in places[here].tolist()]
        total = torch.stack([_sum(step, block, rank, axes)[rows] for block in blocks]).sum(0)
        came = residual[here]
        if before is not None:
            came = came - before.at(places[here]).x
        compared += len(rows)
        if not typical_error(came, total) < CLOSE:
            return False
    return compared > 0


def _sum(step: Step, station: Station, rank: int, axes: Sequence[int]) -> Tensor:
    """The sum of what the ranks along `axes` hold at a station."""
    return torch.stack([step.local(station, r)[1] for r in members(_mesh(step), rank, axes)]).sum(0)


def _subsets(axes: Axes, empty: bool = False) -> Iterator[Axes]:
    """Every set of some axes, larger ones first."""
    for size in range(len(axes), 0 if not empty else -1, -1):
        yield from itertools.combinations(axes, size)


def _largest(other: Recording) -> Step:
    return max(other.steps, key=lambda step: len(step.places))


def _mesh(step: Step) -> Mesh:
    return step.dumps[0].rows.mesh
