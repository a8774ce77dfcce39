import re

import pytest
from report_samples import FoundBlock

from isomoe.parity.report.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Chart, distribution, layers
from isomoe.parity.report.charts import positions as by_position

FLOOR = [0.0, 0.001, 0.002, 0.0005]
FAR = [0.0, 0.2, 2.0, 1e-30]


def path_of(chart: Chart | None, style: str) -> list[tuple[float, float]]:
    assert chart is not None
    path = next(line.path for line in chart.lines if line.style == style)
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_the_histogram_counts_every_token_once() -> None:
    chart = distribution(FLOOR, FAR, "far")
    assert chart is not None
    for style in ("floor", "target"):
        path = next(line.path for line in chart.lines if line.style == style)
        heights = [BOTTOM - float(y) for y in re.findall(r"V([\d.]+)H", path)]
        top = chart.y_ticks[-1]
        share = float(top.label.rstrip("%")) / 100 / (BOTTOM - top.at)
        assert sum(heights) * share == pytest.approx(1.0, abs=0.01)


def test_the_distribution_says_where_99_of_100_tokens_are() -> None:
    chart = distribution(FLOOR, FAR, "far")
    assert chart is not None
    assert chart.summary == (
        "Of far's 4 tokens, 99% are within 2 nats; of the noise floor's, within 0.002."
    )


def test_equal_bits_have_no_chart() -> None:
    assert distribution(FLOOR, [0.0, 0.0], "same") is None
    assert by_position([FLOOR], [[0.0]], "same") is None


def test_one_moved_token_among_many_is_a_bar_and_no_curve() -> None:
    """The median and the 99th percentile are 0 there, and a logarithm knows no 0."""
    few = [[0.0] * 100 for _ in range(200)]
    few[3][7] = 0.5
    assert by_position([], few, "far") is None
    assert by_position(few, few, "far") is None
    assert distribution([], [delta for prompt in few for delta in prompt], "far") is not None


def test_every_point_lies_on_the_plot() -> None:
    chart = by_position([FLOOR], [FAR, FAR[:2]], "far")
    assert chart is not None
    for style in ("floor-median", "target-median", "target-p99"):
        for x, y in path_of(chart, style):
            assert LEFT <= x <= RIGHT
            assert TOP <= y <= BOTTOM


def test_no_label_of_an_axis_is_cut_off() -> None:
    """A letter is some 8 units wide, and the text stands in the middle of its tick."""
    for chart in (distribution(FLOOR, FAR, "far"), by_position([FLOOR], [FAR * 300], "far")):
        assert chart is not None
        assert all(tick.at + 4 * len(tick.label) <= WIDTH for tick in chart.x_ticks)


def test_positions_grow_with_the_delta() -> None:
    (_, first), (_, last) = path_of(by_position([], [[0.001, 0.1]], "far"), "target-median")
    assert first > last


def test_the_layer_curve_marks_the_first_read_after_the_culprit() -> None:
    chart = layers(FoundBlock().to_json())
    assert chart is not None
    culprit = next(line.path for line in chart.lines if line.style == "culprit")
    at = float(re.findall(r"M([\d.]+)", culprit)[0])
    assert at == pytest.approx(chart.dots[2][0], abs=0.1)
    assert ("culprit", "the first read after the culprit: layers.1.attn_norm") in chart.legend


def test_a_read_that_is_not_finite_leaves_a_gap() -> None:
    chart = layers(FoundBlock().to_json())
    assert chart is not None
    assert len(chart.dots) == 3
