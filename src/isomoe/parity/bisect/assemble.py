"""From what each rank saw to whole rows.

Addends are summed along P in double precision, copies along R are held against each other, rows
are joined along S and named by their place in the prompts; padding is dropped.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from isomoe.errors import IsomoeError
from isomoe.layout import Letter, Mesh, Placement, RegimePlan, Rows, row_sharded
from isomoe.parity.bisect.recorder import Dump
from isomoe.parity.bisect.stations import Kind, Station, head_of, moved, read_of, stations
from isomoe.parity.run import Ids


class RecordingError(IsomoeError):
    """What was recorded is not what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The rows at one station, of all ranks together.

    Attributes:
        places: [n] int64, ascending: each row's place among the tokens of all texts.
        x: [n, features] float64.
        size: [n], the norms of everything that was summed into a row, added.
        spread: [n], how far copies of a row lie apart, relative to the row.
    """

    places: Tensor
    x: Tensor
    size: Tensor
    spread: Tensor

    @classmethod
    def of(cls, places: Tensor, x: Tensor) -> "Whole":
        """Rows that are there once, in any order."""
        order = places.argsort()
        x = x[order].double()
        return cls(places=places[order], x=x, size=x.norm(dim=1), spread=torch.zeros(len(x)))

    def at(self, places: Tensor) -> "Whole":
        """Some of its rows."""
        found = torch.searchsorted(self.places, places)
        return Whole(
            places=places, x=self.x[found], size=self.size[found], spread=self.spread[found]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step on all ranks.

    Attributes:
        dumps: by rank.
        places: [rows of the step], the place of each among the tokens of all texts; -1 for
            padding.
    """

    dumps: tuple[Dump, ...]
    places: Tensor

    def placement(self, station: Station) -> Placement:
        """How the rows lie on the mesh at a station."""
        return placement_at(self.dumps[0], station)

    def rows(self, station: Station) -> tuple[Rows, Tensor]:
        """The row map at a station, and the place of each row."""
        dump = self.dumps[0]
        if _is_last(dump, station):
            return dump.logits_rows, self.places[list(dump.logits_rows.index)]
        return dump.rows, self.places

    def local(self, station: Station, rank: int) -> tuple[Tensor, Tensor]:
        """The places and the rows (float64) that one rank holds at a station.

        Raises:
            RecordingError: if the rank holds another number of rows than the plan says.
        """
        rows, places = self.rows(station)
        start, stop = rows.span(rank, self.placement(station).row_axes)
        dump = self.dumps[rank]
        x = dump.seen[_kept_as(dump.plan, station)]
        if len(x) != stop - start:
            raise RecordingError(
                f"{station.name}: rank {rank} holds {len(x)} rows where the plan has {stop - start}"
            )
        return places[start:stop], x.double()

    def whole(self, station: Station) -> Whole:
        """Its rows at a station, without padding."""
        mesh, placement = self.dumps[0].rows.mesh, self.placement(station)
        addends = placement.where(Letter.P)
        beside = mesh.all[placement.row_axes :]
        parts = []
        for rank in range(0, mesh.size, mesh.width_behind(placement.row_axes)):
            places, _ = self.local(station, rank)
            sums, sizes = [], []
            for copy in members(mesh, rank, [a for a in beside if a not in addends]):
                mine = [self.local(station, r)[1] for r in members(mesh, copy, addends)]
                sums.append(torch.stack(mine).sum(0))
                sizes.append(torch.stack([x.norm(dim=1) for x in mine]).sum(0))
            parts.append((places, sums[0], sizes[0], _spread(sums)))
        places, x, size, spread = (torch.cat(column) for column in zip(*parts, strict=True))
        real = places >= 0
        return Whole(places=places[real], x=x[real], size=size[real], spread=spread[real])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one side saw of all prompts in one pass.

    Attributes:
        steps: those that it took.
    """

    steps: tuple[Step, ...]
    _held: dict[Station, Whole] = field(default_factory=dict, init=False, repr=False)

    @property
    def stations(self) -> list[Station]:
        """In the order of a step."""
        return list(stations(self.steps[0].dumps[0].plan))

    def whole(self, station: Station) -> Whole:
        """All rows at a station. Blocks whose names are joined by " + " are added."""
        if station not in self._held:
            names = station.name.split(" + ")
            if len(names) > 1:
                parts = [self.whole(Station(station.kind, name)) for name in names]
                self._held[station] = _added(parts)
            else:
                self._held[station] = _joined([step.whole(station) for step in self.steps])
        return self._held[station]


def _joined(parts: Sequence[Whole]) -> Whole:
    """The rows of several steps."""
    places = torch.cat([part.places for part in parts])
    order = places.argsort()
    return Whole(
        places=places[order],
        x=torch.cat([part.x for part in parts])[order],
        size=torch.cat([part.size for part in parts])[order],
        spread=torch.cat([part.spread for part in parts])[order],
    )


def _added(parts: Sequence[Whole]) -> Whole:
    """The sum of what several blocks wrote of the same rows."""
    return Whole(
        places=parts[0].places,
        x=torch.stack([part.x for part in parts]).sum(0),
        size=torch.stack([part.size for part in parts]).sum(0),
        spread=torch.stack([part.spread for part in parts]).amax(0),
    )


def members(mesh: Mesh, rank: int, axes: Collection[int]) -> list[int]:
    """The ranks that differ from `rank` along `axes` only, itself included. Any axes will do."""
    same = [(axis,) for axis in mesh.all if axis not in axes]
    return [
        other
        for other in range(mesh.size)
        if all(mesh.index(other, axis) == mesh.index(rank, axis) for axis in same)
    ]


def placement_at(dump: Dump, station: Station) -> Placement:
    """How the rows lie at a station of a plan."""
    plan = dump.plan
    if station.kind is Kind.BLOCK:
        if station.name == head_of(plan):  # the logits of its group, on each of its ranks
            return row_sharded(len(plan.mesh.attn_dp), len(plan.mesh.axes))
        return plan.gives[station.name]
    read = read_of(plan, station.name)
    if station.kind is Kind.DELIVERY:
        return next(one.needs for one in read.deliveries if one.consumer == station.consumer)
    return read.residual


def assemble(dumps: Sequence[Sequence[Dump]], texts: Sequence[Ids]) -> Recording:
    """All steps of a pass.

    Args:
        dumps: for each step, those of all ranks in order.
        texts: what was run; their tokens number the rows.

    Raises:
        RecordingError: if the steps are not the texts, each in one piece.
    """
    left = list(range(len(texts)))
    starts = list(accumulate(map(len, texts), initial=0))
    steps = []
    for ranks in dumps:
        width = ranks[0].rows.mesh.parallelism.attn_tp
        places: list[int] = []
        for group, ((first, last), real) in enumerate(
            zip(ranks[0].rows.groups, ranks[0].rows.real, strict=True)
        ):
            dump = ranks[group * width]
            for ids in _requests(dump.ids[:real], dump.positions[:real]):
                prompt = next((index for index in left if texts[index] == ids), None)
                if prompt is None:
                    raise RecordingError("the engine ran other tokens than it was given")
                left.remove(prompt)
                places += range(starts[prompt], starts[prompt] + len(ids))
            places += [-1] * (last - first - real)
        steps.append(Step(dumps=tuple(ranks), places=torch.tensor(places, dtype=torch.int64)))
    if left:
        raise RecordingError(f"{len(left)} of {len(texts)} texts were not recorded")
    return Recording(steps=tuple(steps))


def _requests(ids: Sequence[int], positions: Sequence[int]) -> Iterator[Ids]:
    """The tokens of each request: a new one begins at position 0."""
    starts = [row for row, position in enumerate(positions) if position == 0 or row == 0]
    for start, stop in pairwise([*starts, len(ids)]):
        yield tuple(ids[start:stop])


def _kept_as(plan: RegimePlan, station: Station) -> Station:
    """The station under which rows were kept: a delivery may move nothing, or serve several."""
    if station.kind is not Kind.DELIVERY:
        return station
    read = read_of(plan, station.name)
    needs = next(one.needs for one in read.deliveries if one.consumer == station.consumer)
    if needs == read.residual:
        return Station(Kind.NORM, read.name)
    return replace(station, consumer=moved(read)[needs])


def _is_last(dump: Dump, station: Station) -> bool:
    """Whether only the rows that get logits are left at a station."""
    last = dump.plan.reads[-1]
    return last.selects_rows and station.name in (last.name, head_of(dump.plan))


def _spread(copies: Sequence[Tensor]) -> Tensor:
    """[n]: the farthest that a copy lies from the first, relative to the larger of the two."""
    first, *others = copies
    spread = first.new_zeros(len(first))
    for other in others:
        apart = (other - first).norm(dim=1)
        larger = torch.maximum(other.norm(dim=1), first.norm(dim=1))
        spread = torch.maximum(spread, apart / larger.clamp_min(1e-30))
    return spread
