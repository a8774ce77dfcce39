"""A culprit in words."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from isomoe.layout import Placement, RegimePlan
from isomoe.parity.bisect.assemble import Recording, placement_at
from isomoe.parity.bisect.guess import examine
from isomoe.parity.bisect.locate import Found, Rows, settled
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.result import Culprit, Defect, Guess, Point
from isomoe.parity.bisect.stations import Kind, Station, head_of, read_of
from isomoe.parity.run import Ids

_NAMED_ROWS = 6
_FIRST_SEEN = {
    Pass.ALONE: "; first seen in steps of one prompt",
    Pass.EQUAL: "; first seen where every attention group has the same number of rows",
    Pass.SMALL: "; first seen in steps of one token",
}
_WHAT = {
    Kind.BLOCK: "gives",
    Kind.READ: "settled by",
    Kind.NORM: "normed in",
    Kind.DELIVERY: "delivered from",
}


def describe(
    found: Found, planned: Recording, other: Rows, now: Pass, texts: Sequence[Ids]
) -> Culprit:
    """The station that is off, with a guess at why.

    Args:
        planned: the side whose plan says how things lie.
        other: the side that is off.
        now: how the prompts were batched.
    """
    assert found.off is not None
    evidence = examine(found, other)
    point = found.point
    at = f" {point.name}" if point.kind in (Kind.READ, Kind.DELIVERY) else ""
    what = f"{_WHAT[point.kind]}{at}"
    plan = planned.steps[0].dumps[0].plan
    if _is_selection(found, evidence.guess, plan):
        head = head_of(plan)
        point = replace(point, layer=None, block=head, block_kind=plan.kinds[head])
        what = f"rows selected at {point.name}"
    rows = _rows(found.places, found.off, texts)
    placement = _placement(found.station, point, planned) or "whole rows"
    layer = f"layer {point.layer}, " if point.layer is not None else ""
    return Culprit(
        kind=point.kind,
        layer=point.layer,
        block=point.block,
        block_kind=point.block_kind,
        placement=placement,
        rows=rows,
        ratio=evidence.ratio,
        guess=evidence.guess.defect,
        sentence=(
            f"{layer}{point.block_kind} ({point.block}), {what} {placement}, "
            f"rows {rows}: norm ratio {evidence.ratio:.2f} of {_of_what(found, other)}: "
            f"{evidence.guess.why} ({evidence.guess.defect}){_FIRST_SEEN.get(now, '')}"
        ),
    )


def _is_selection(found: Found, guess: Guess, plan: RegimePlan) -> bool:
    """Whether the lm_head got other rows than those that should have logits."""
    if found.station.kind is not Kind.READ or guess.defect is not Defect.WRONG_ROWS:
        return False
    return read_of(plan, found.station.name).selects_rows


def _of_what(found: Found, other: Rows) -> str:
    """What the ratio relates to."""
    if isinstance(other, Recording):
        if found.station.kind is Kind.READ:
            return "what was written"
        if found.station.kind is Kind.DELIVERY:
            return "what was normed"
    return "the baseline's"


def _placement(station: Station, point: Point, planned: Recording) -> str:
    """What a block gives; where a move comes from and where it goes."""
    dump = planned.steps[0].dumps[0]
    match station.kind:
        case Kind.READ:
            blocks = settled(planned, station.name).name.split(" + ")
            gives = [placement_at(dump, Station(Kind.BLOCK, block)) for block in blocks]
            return f"{_joined(gives)} -> {point.placement}"
        case Kind.DELIVERY:
            return f"{placement_at(dump, Station(Kind.NORM, station.name))} -> {point.placement}"
        case _:
            return point.placement


def _joined(placements: Sequence[Placement]) -> str:
    return " + ".join(dict.fromkeys(map(str, placements)))


def _rows(places: Tensor, off: Tensor, texts: Sequence[Ids]) -> str:
    """Which rows are off: "all", or how many and the first of them."""
    if bool(off.all()):
        return "all"
    chosen = places[off].tolist()
    named = ", ".join(_name(place, texts) for place in chosen[:_NAMED_ROWS])
    more = ", ..." if len(chosen) > _NAMED_ROWS else ""
    return f"{len(chosen)} of {len(off)} (prompt:token {named}{more})"


def _name(place: int, texts: Sequence[Ids]) -> str:
    prompt = 0
    while place >= len(texts[prompt]):
        place -= len(texts[prompt])
        prompt += 1
    return f"{prompt}:{place}"
