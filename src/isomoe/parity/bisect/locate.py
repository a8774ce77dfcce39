"""Where two recordings part.

A block is held against the baseline's. A move needs no baseline: what arrives must be what was
written or normed, up to the rounding of one sum, so that noise from earlier layers is no matter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from isomoe.parity.bisect.assemble import Recording, Whole, placement_at
from isomoe.parity.bisect.compare_rows import Apart
from isomoe.parity.bisect.floor import Floor
from isomoe.parity.bisect.result import Point
from isomoe.parity.bisect.stations import Kind, Station, read_of

_ROUNDINGS = 16.0
"""A sum over ranks may be off by so many roundings of everything that went into it."""
_COPIES = 0.02
"""Copies of a row may be so far apart, relative to it: a rank may round otherwise than another."""


class Rows(Protocol):
    """A recording, or the reads of one."""

    def whole(self, station: Station) -> Whole:
        """All rows at a station."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One station, compared.

    Attributes:
        baseline: what the baseline has there.
        places: of the rows that both sides have.
        off: which of these are off, [n] bool; None if what differs may be rounding.
    """

    point: Point
    station: Station
    baseline: Whole
    places: Tensor
    off: Tensor | None


def compare(
    baseline: Rows,
    other: Rows,
    plan: Recording,
    stations: Sequence[Station],
    floors: Mapping[Station, Floor],
) -> Iterator[Found]:
    """Every station in order.

    Args:
        plan: the recording whose plan says how things lie: the other side's, if it has one.
    """
    for station in stations:
        floor = floors[station]
        came, base = other.whole(station), baseline.whole(station)
        apart = Apart.of(came, base)
        if isinstance(other, Recording) and station.kind in (Kind.READ, Kind.DELIVERY):
            off = _lost(other, station, apart.places)
        else:
            off = floor.exceeded(apart)
        torn = apart.spread > _COPIES
        if torn.any():
            off = torn if off is None else off | torn
        yield Found(
            point=_point(plan, station, apart, floor, off),
            station=station,
            baseline=base,
            places=apart.places,
            off=off,
        )


def measure_floors(
    noise: Sequence[tuple[Rows, Rows]], stations: Sequence[Station], eps: float
) -> dict[Station, Floor]:
    """The noise floor at each station.

    Args:
        noise: clean runs, each with what it is held against.
        eps: of the models' dtype.
    """
    last: dict[Kind, Floor] = {}
    floors = {}
    for station in stations:
        clean = [Apart.of(one.whole(station), two.whole(station)) for one, two in noise]
        last[station.kind] = Floor.of(clean, eps, last.get(station.kind))
        floors[station] = last[station.kind]
    return floors


def arrived(other: Recording, station: Station) -> tuple[Whole, Whole]:
    """What a move brought, and what it should have brought, of all rows that there were.

    At a read that is what was added to the residual stream, and the sum of what was written.
    """
    came = other.whole(station)
    if station.kind is Kind.DELIVERY:
        return came, other.whole(Station(Kind.NORM, station.name))
    written = other.whole(settled(other, station.name))
    before = carried(other, station.name)
    if before is None:
        return came, written
    before = before.at(came.places)
    size = came.size + before.size
    return replace(came, x=came.x - before.x, size=size), written


def carried(recording: Recording, read: str) -> Whole | None:
    """The residual stream at the read before; None at the first."""
    names = [one.name for one in recording.steps[0].dumps[0].plan.reads]
    index = names.index(read)
    return recording.whole(Station(Kind.READ, names[index - 1])) if index else None


def settled(recording: Recording, read: str) -> Station:
    """The blocks that a read settles, as one station."""
    plan = recording.steps[0].dumps[0].plan
    names = [name for settle in read_of(plan, read).settles for name in settle.producers]
    return Station(Kind.BLOCK, " + ".join(names))


def _lost(other: Recording, station: Station, places: Tensor) -> Tensor | None:
    """Which of the rows a move did not bring as they were, [n] bool."""
    came, due = (whole.at(places) for whole in arrived(other, station))
    wire = other.steps[0].dumps[0].seen[station].dtype
    room = _ROUNDINGS * torch.finfo(wire).eps * (came.size + due.size)
    off = ~((came.x - due.x).norm(dim=1) <= room)  # written so that NaN is off
    return off if off.any() else None


def _point(
    plan: Recording, station: Station, apart: Apart, floor: Floor, off: Tensor | None
) -> Point:
    dump = plan.steps[0].dumps[0]
    match station.kind:
        case Kind.BLOCK | Kind.NORM:
            block = station.name
        case Kind.DELIVERY:
            block = station.consumer
        case Kind.READ:
            block = settled(plan, station.name).name
    names = block.split(" + ")
    kinds = dict.fromkeys(dump.plan.kinds.get(name, "norm") for name in names)
    layer = re.search(r"\.(\d+)\.", block)
    lies = replace(station, name=names[0]) if station.kind is Kind.BLOCK else station
    return Point(
        kind=station.kind,
        name=station.name,
        layer=int(layer[1]) if layer else None,
        block=block,
        block_kind=" + ".join(kinds),
        placement=str(placement_at(dump, lies)),
        median=apart.median,
        worst=apart.worst,
        floor=floor.error,
        ratio=apart.ratio,
        rows=len(apart.places),
        rows_off=int((apart.error > floor.error).sum()),
        is_off=off is not None,
    )
