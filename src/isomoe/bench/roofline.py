"""A roofline plot as SVG: operations a second over operations a byte, on two logarithmic axes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 44, 56
_ROOM = 1.2
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}"
    ".grid{stroke:#ddd}.roof{stroke:#555;stroke-width:2;fill:none}"
    ".lack{stroke:#7f93b2;stroke-dasharray:3 3}.point{fill:#1f5fbf}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}.roof{stroke:#aaa}"
    ".lack{stroke:#89a}.point{fill:#7db1ff}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Some work.

    Attributes:
        name: its label.
        intensity: operations a byte, as counted.
        flops_per_s: reached.
        share: of what its floor allows. Work of several kinds of steps has a floor that is lower
            than the roof over its mean intensity.
    """

    name: str
    intensity: float
    flops_per_s: float
    share: float


def roofline_svg(
    title: str, bytes_per_s: float, flops_per_s: float, points: Sequence[Point]
) -> str:
    """The plot. Each point has a dashed line up to its floor's place, which is what it lacks."""
    ridge = flops_per_s / bytes_per_s
    plot = _Plot(
        x=_decades([ridge, *(point.intensity for point in points)]),
        y=_decades([flops_per_s, *(point.flops_per_s for point in points)]),
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text x="{_LEFT}" y="24">{escape(title)}</text>',
        *plot.axes(),
    ]
    low, high = 10 ** plot.x[0], 10 ** plot.x[1]
    corners = [(low, low * bytes_per_s), (ridge, flops_per_s), (high, flops_per_s)]
    # Where the plot begins above the roof's foot, the roof does too.
    bottom = 10 ** plot.y[0]
    if corners[0][1] < bottom:
        corners[0] = (bottom / bytes_per_s, bottom)
    path = " ".join(plot.at(x, y) for x, y in corners)
    lines.append(f'<polyline class="roof" points="{path}"/>')
    for point in points:
        lines += plot.mark(point)
    return "\n".join([*lines, "</svg>"]) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    """The area within the axes; x and y are the decades that they span."""

    x: tuple[int, int]
    y: tuple[int, int]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pair of values lies."""
        across = (log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + across * width, _HEIGHT - _BOTTOM - up * height

    def at(self, x: float, y: float) -> str:
        """The same as a polyline spells it."""
        return "{:.1f},{:.1f}".format(*self.place(x, y))

    def axes(self) -> Iterator[str]:
        """Grid, ticks and what they count."""
        for decade in range(self.x[0], self.x[1] + 1):
            x, _ = self.place(10.0**decade, 10.0 ** self.y[0])
            yield f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
            yield (
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
                f"{10.0**decade:,g}</text>"
            )
        for decade in range(self.y[0], self.y[1] + 1):
            _, y = self.place(10.0 ** self.x[0], 10.0**decade)
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            label = f"{10.0 ** (decade - 12):,g}"
            yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        yield (
            f'<text x="{middle:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">'
            "operations a byte, counted</text>"
        )
        yield (
            f'<text transform="translate(16 {_HEIGHT / 2:.1f}) rotate(-90)" text-anchor="middle">'
            "TFLOP/s</text>"
        )

    def mark(self, point: Point) -> Iterator[str]:
        """A point, what it lacks, and its share."""
        x, y = self.place(point.intensity, point.flops_per_s)
        _, top = self.place(point.intensity, point.flops_per_s / point.share)
        yield f'<path class="lack" d="M{x:.1f} {y:.1f}V{top:.1f}"/>'
        yield f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        left, anchor = (x + 9, "start") if x < 0.8 * _WIDTH else (x - 9, "end")
        label = escape(f"{point.name} {point.share:.0%}")
        yield f'<text x="{left:.1f}" y="{y + 15:.1f}" text-anchor="{anchor}">{label}</text>'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Whole decades around the values, with some room."""
    return floor(log10(min(values) / _ROOM)), ceil(log10(max(values) * _ROOM))
