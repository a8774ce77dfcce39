"""Charts as paths in an SVG's coordinates. The page's template draws them; no plotting library."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from isomoe.parity.compare import quantile
from isomoe.parity.report.words import number

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 50, 380, 24, 212
"""The plotting area within it."""

_DECADES = 7
"""Of a log axis, at most: what is smaller is drawn as 0."""
_BINS_PER_DECADE = 4
_POSITION_BINS = 40


class Tick(NamedTuple):
    """A mark on an axis, in SVG units along it."""

    at: float
    label: str


class Line(NamedTuple):
    """A path of one class of style: "floor", "target", "floor-p99", "target-p99", "culprit"."""

    style: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a template needs to draw it.

    Attributes:
        summary: the same in one sentence, for whoever does not see it.
        legend: (style, what it is).
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    legend: tuple[tuple[str, str], ...]
    dots: tuple[tuple[float, float], ...] = field(default=())


class _Log:
    """A log axis of whole decades from `start` to `end`; what is below them is drawn at `start`."""

    def __init__(self, values: Iterable[float], start: float, end: float, zero: float) -> None:
        every = list(values)
        positive = [value for value in every if value > 0]
        self.high = math.ceil(math.log10(max(positive)) + 1e-9)
        lowest = max(min(positive), 10.0 ** (self.high - _DECADES))
        self.low = min(math.floor(math.log10(lowest)), self.high - 1)
        self.has_zero = any(value < 10.0**self.low for value in every)
        self.start, self.end = start, end
        self._first = start + (zero * (end - start) if self.has_zero else 0.0)

    def at(self, value: float) -> float:
        if value < 10.0**self.low:
            return self.start
        along = (math.log10(value) - self.low) / (self.high - self.low)
        return self._first + along * (self.end - self._first)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        decades = range(self.low, self.high + 1)
        zero = (Tick(self.start, "0"),) if self.has_zero else ()
        return zero + tuple(Tick(self.at(10.0**power), _power(power)) for power in decades)


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}"


def distribution(floor: Sequence[float], target: Sequence[float], name: str) -> Chart | None:
    """How often |delta| has which size; None where every delta is exactly 0.

    Args:
        floor, target: |delta| of each token, in nats.
        name: of the target.
    """
    if not target or not any(target):
        return None
    axis = _Log([*floor, *target], LEFT, RIGHT, zero=0.08)
    edges = [
        10.0 ** (axis.low + index / _BINS_PER_DECADE)
        for index in range((axis.high - axis.low) * _BINS_PER_DECADE + 1)
    ]
    shares = {
        style: _shares(values, edges)
        for style, values in (("floor", floor), ("target", target))
        if values
    }
    top = max(max(found) for found in shares.values())
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.25) if top / step <= 5)

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / (step * math.ceil(top / step))

    corners = [LEFT if axis.has_zero else axis.at(edges[0]), *map(axis.at, edges)]
    lines = [Line(style, _steps(corners, map(height, found))) for style, found in shares.items()]
    tails = {"floor": floor, "target": target}
    for style in shares:
        at = axis.at(quantile(sorted(tails[style]), 0.99))
        lines.append(Line(f"{style}-p99", f"M{at:.1f} {TOP}V{BOTTOM}"))
    return Chart(
        title=f"|Δ logprob| of {name}",
        summary=_tails(floor, target, name),
        x_label="|Δ logprob|, nats",
        y_label="share of tokens",
        x_ticks=_without_crowding(axis),
        y_ticks=tuple(
            Tick(height(step * index), f"{step * index * 100:g}%")
            for index in range(math.ceil(top / step) + 1)
        ),
        lines=tuple(lines),
        legend=_legend(
            floor,
            f"noise floor, p99 {number(_p99(floor))}" if floor else "",
            f"{name}, p99 {number(_p99(target))}",
        ),
    )


def _without_crowding(axis: _Log) -> tuple[Tick, ...]:
    """Its ticks; the first decade's label goes where a 0 stands beside it."""
    ticks = list(axis.ticks)
    if axis.has_zero:
        ticks[0] = Tick((ticks[0].at + ticks[1].at) / 2, "0")
        ticks[1] = Tick(ticks[1].at, "")
    return tuple(ticks)


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Of the values below all edges, then between each two; the last takes what is above."""
    counts = [0] * len(edges)
    low, last = math.log10(edges[0]), len(edges) - 1
    for value in values:
        if value < edges[0]:
            counts[0] += 1
        else:
            index = int((math.log10(value) - low) * _BINS_PER_DECADE + 1e-9)
            counts[min(index + 1, last)] += 1
    return [count / len(values) for count in counts]


def _steps(corners: Sequence[float], heights: Iterable[float]) -> str:
    found = "".join(f"V{y:.1f}H{right:.1f}" for right, y in zip(corners[1:], heights, strict=True))
    return f"M{corners[0]:.1f} {BOTTOM}{found}V{BOTTOM}"


def positions(
    floor: Sequence[Sequence[float]], target: Sequence[Sequence[float]], name: str
) -> Chart | None:
    """Median and 99th percentile of |delta| along the output; None where too few moved to show.

    Args:
        floor, target: |delta| of each prompt's tokens in order, in nats.
    """
    if not any(any(prompt) for prompt in target):
        return None
    length = max(map(len, target))
    bins = min(length, _POSITION_BINS)
    curves = {
        "floor": _by_position(floor, length, bins),
        "target": _by_position(target, length, bins),
    }
    values = [value for curve in curves.values() for _, *pair in curve for value in pair]
    if not any(values):
        return None
    axis = _Log(values, BOTTOM, TOP, zero=0.1)

    def across(middle: float) -> float:
        return LEFT + (RIGHT - LEFT) * middle / length

    lines = []
    for style, curve in curves.items():
        if curve:
            median = [(across(x), axis.at(y)) for x, y, _ in curve]
            p99 = [(across(x), axis.at(y)) for x, _, y in curve]
            lines += [
                Line(f"{style}-band", _path([*median, *reversed(p99)]) + "Z"),
                Line(f"{style}-p99", _path(p99)),
                Line(f"{style}-median", _path(median)),
            ]
    return Chart(
        title=f"By position in the output, {name}",
        summary=_trend(curves["target"], name),
        x_label="output token",
        y_label="|Δ logprob|, nats",
        x_ticks=_counts(length, across),
        y_ticks=axis.ticks,
        lines=tuple(lines),
        legend=_legend(
            curves["floor"], "noise floor, median (solid) to p99 (dashed)", f"{name}, the same"
        ),
    )


def _by_position(
    prompts: Sequence[Sequence[float]], length: int, bins: int
) -> list[tuple[float, float, float]]:
    """(middle, median, p99) of each bin that has tokens."""
    found: list[list[float]] = [[] for _ in range(bins)]
    for prompt in prompts:
        for place, delta in enumerate(prompt[:length]):
            found[place * bins // length].append(delta)
    width = length / bins
    return [
        ((index + 0.5) * width, quantile(ordered, 0.5), quantile(ordered, 0.99))
        for index, ordered in enumerate(map(sorted, found))
        if ordered
    ]


def layers(bisection: Mapping[str, Any]) -> Chart | None:
    """The relative error of each read of the residual stream; None where there is none.

    Args:
        bisection: as its `to_json` gives it.
    """
    curve = bisection["curve"]
    curves = {key: _known(curve, key) for key in ("median", "worst", "floor")}
    values = [value for found in curves.values() for _, value in found]
    if not any(value > 0 for value in values):
        return None
    axis = _Log(values, BOTTOM, TOP, zero=0.1)

    def across(index: float) -> float:
        return LEFT + 8 + (RIGHT - LEFT - 16) * index / max(1, len(curve) - 1)

    points = {
        key: [(across(index), axis.at(value)) for index, value in found]
        for key, found in curves.items()
    }
    styles = {"floor-p99": "floor", "target-p99": "worst", "target-median": "median"}
    lines = [Line(style, _path(points[key])) for style, key in styles.items() if points[key]]
    culprit = bisection["culprit"]
    named = _index_of(curve, culprit)
    if named is not None:
        lines.insert(0, Line("culprit", f"M{across(named):.1f} {TOP}V{BOTTOM}"))
    legend = [
        ("floor-p99", "noise floor of the median"),
        ("target-median", "median"),
        ("target-p99", "maximum"),
    ]
    if named is not None:
        legend.append(("culprit", f"the first read after the culprit: {curve[named]['name']}"))
    return Chart(
        title=f"{bisection['other']} against {bisection['baseline']}, layer by layer",
        summary=_ends(curve),
        x_label="layer",
        y_label="relative error",
        x_ticks=_layer_ticks(curve, across),
        y_ticks=axis.ticks,
        lines=tuple(lines),
        legend=tuple(legend),
        dots=tuple(points["median"]),
    )


def _known(curve: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(index, value) of each read where it is finite."""
    return [
        (index, point[key])
        for index, point in enumerate(curve)
        if point[key] is not None and math.isfinite(point[key])
    ]


def _index_of(curve: Sequence[Mapping[str, Any]], culprit: Mapping[str, Any] | None) -> int | None:
    """Of the first read that settles what the culprit wrote; else of the first of its layer."""
    if culprit is None:
        return None
    settles = (
        i for i, point in enumerate(curve) if culprit["block"] in point["block"].split(" + ")
    )
    in_layer = (
        index
        for index, point in enumerate(curve)
        if point["layer"] is not None and point["layer"] == culprit["layer"]
    )
    return next(settles, next(in_layer, None))


def _ends(curve: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"The median is {number(curve[0]['median'])} at the first of {len(curve)} reads "
        f"and {number(curve[-1]['median'])} at the last."
    )


def _layer_ticks(
    curve: Sequence[Mapping[str, Any]], across: Callable[[float], float]
) -> tuple[Tick, ...]:
    firsts: dict[str, int] = {}
    for index, point in enumerate(curve):
        if point["layer"] is not None:
            firsts.setdefault(str(point["layer"]), index)
    stride = max(1, math.ceil(len(firsts) / 8))
    return tuple(Tick(across(index), label) for label, index in [*firsts.items()][::stride])


def _counts(length: int, across: Callable[[float], float]) -> tuple[Tick, ...]:
    rough = length / 5
    power = 10.0 ** math.floor(math.log10(rough)) if rough >= 1 else 1.0
    step = max(1, int(next(m * power for m in (1, 2, 5, 10) if m * power >= rough)))
    return tuple(Tick(across(at), str(at)) for at in range(0, length + 1, step))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _p99(values: Sequence[float]) -> float:
    return quantile(sorted(values), 0.99)


def _tails(floor: Sequence[float], target: Sequence[float], name: str) -> str:
    found = f"Of {name}'s {len(target):,} tokens, 99% are within {number(_p99(target))} nats"
    if not floor:
        return f"{found}. The noise floor was not measured."
    return f"{found}; of the noise floor's, within {number(_p99(floor))}."


def _trend(curve: Sequence[tuple[float, float, float]], name: str) -> str:
    third = max(1, len(curve) // 3)
    first = _middle([median for _, median, _ in curve[:third]])
    last = _middle([median for _, median, _ in curve[-third:]])
    return (
        f"The median |Δ| of {name} is {number(first)} nats in the first third of the output "
        f"and {number(last)} in the last."
    )


def _middle(values: Sequence[float]) -> float:
    return quantile(sorted(values), 0.5)


def _legend(floor: Sequence[object], of_floor: str, of_target: str) -> tuple[tuple[str, str], ...]:
    return ((("floor", of_floor),) if floor else ()) + (("target", of_target),)
