"""The report as one HTML file that needs no network: styles, script, charts and data inside."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from isomoe.files import write_atomically
from isomoe.parity.compare import PromptComparison, Summary
from isomoe.parity.report import charts, words
from isomoe.parity.report.model import FloorSource, Report, deltas_of, is_forced
from isomoe.parity.report.tokens import token_data
from isomoe.parity.run import Candidate
from isomoe.parity.verdict import Row, Verdict

_FOLDER = Path(__file__).parent
_SIGNS = {
    Verdict.IDENTICAL: "=",
    Verdict.AGREES: "≈",
    Verdict.DIFFERS: "≠",
    Verdict.NOT_COMPARED: "?",
}
_HEAT = (1.0, 3.0, 10.0, 30.0)
"""Where a token's colour changes, in times the noise floor's 99th percentile."""
_LEAST_HEAT = 1e-4
"""Nats that stand for a noise floor of 0, or one that was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What the template shows of one row."""

    index: int
    row: Row
    sign: str
    remarks: tuple[str, ...]
    charts: tuple[charts.Chart, ...]
    is_forced: bool

    @property
    def name(self) -> str:
        return self.row.comparison.other.name


class _Line(NamedTuple):
    """What the template shows of one prompt."""

    prompt: PromptComparison
    kind: str
    mean: float | None
    most: float | None
    kl: float | None
    top1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bisected:
    """What the template shows of one bisection."""

    found: Mapping[str, Any]
    chart: charts.Chart | None


def write_page(report: Report, path: Path, decode: words.Decode | None = None) -> None:
    """Writes the page.

    Args:
        decode: the text of a token id, where the candidates tell none.

    Raises:
        ConfigError: if the file cannot be written.
    """
    write_atomically(path, page(report, decode))


def page(report: Report, decode: words.Decode | None = None) -> str:
    """The page's HTML."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    summary = report.floor_summary
    floor = report.floor
    heat = _heat(summary.p99 if summary else 0.0)
    data = {**token_data(report, decode), "heat": heat}
    return (
        _environment(decode)
        .get_template("page.html.jinja")
        .render(
            report=report,
            floor=floor,
            thresholds={key: value for key, value in asdict(report.thresholds).items() if value},
            targets=tuple(_targets(report, floor)),
            bisections=tuple(map(_bisected, report.bisections)),
            facts=tuple(_facts(report)),
            heat=heat,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            style=Markup(style),
            script=Markup(script),
            data=_embedded(data),
            style_hash=_hash(style),
            script_hash=_hash(script),
            width=charts.WIDTH,
            height=charts.HEIGHT,
            plot=(charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM),
        )
    )


def _environment(decode: words.Decode | None) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def token(candidate: Candidate | None) -> str:
        return "(end)" if candidate is None else words.visible(words.token_text(candidate, decode))

    environment.filters |= {
        "number": words.number,
        "share": words.share,
        "times": words.times,
        "odds": words.odds,
        "token": token,
        "plain": _plain,
    }
    environment.globals["prompt_lines"] = _lines
    return environment


def _targets(report: Report, floor: Sequence[FloorSource]) -> Iterator[_Target]:
    for index, row in enumerate(report.rows):
        yield _Target(
            index=index,
            row=row,
            sign=_SIGNS[row.judgement.verdict],
            remarks=report.remarks(row),
            charts=tuple(_charts(floor, row)),
            is_forced=is_forced(row),
        )


def _charts(floor: Sequence[FloorSource], row: Row) -> Iterator[charts.Chart]:
    name = row.comparison.other.name
    noise = [_sizes(prompt) for source in floor if source.is_counted for prompt in source.deltas]
    target = [_sizes(prompt) for prompt in deltas_of(row)]
    for chart in (
        charts.distribution([*chain(*noise)], [*chain(*target)], name),
        charts.positions(noise, target, name),
    ):
        if chart is not None:
            yield chart


def _lines(row: Row) -> Iterator[_Line]:
    """Of each prompt, teacher-forced where it was scored so, else over the common prefix."""
    kinds = [prompt.kind for prompt in row.comparison.baseline.prompts]
    for index, prompt in enumerate(row.comparison.prompts):
        forced = prompt.forced
        found = Summary.of(prompt.free if forced is None else [token.delta for token in forced])
        kls = [token.kl for token in forced or () if token.kl is not None]
        firsts = [token.is_first for token in forced or () if token.is_first is not None]
        yield _Line(
            prompt=prompt,
            kind=kinds[index] if index < len(kinds) else "",
            mean=_known(found.mean),
            most=_known(found.most),
            kl=math.fsum(kls) / len(kls) if kls else None,
            top1=sum(firsts) / len(firsts) if firsts else None,
        )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sizes(deltas: Sequence[float]) -> list[float]:
    return [abs(delta) for delta in deltas if math.isfinite(delta)]


def _bisected(bisection: Any) -> _Bisected:
    found = bisection.to_json()
    return _Bisected(found=found, chart=charts.layers(found))


def _facts(report: Report) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """(fact, for the baseline and each target: its value, and whether it is not the baseline's)."""
    runs = [report.baseline, *(row.comparison.other for row in report.rows)]
    every: dict[str, list[object]] = {"dialect": [run.dialect for run in runs]}
    every |= {key: [run.facts.get(key) for run in runs] for run in runs for key in run.facts}
    for key, values in every.items():
        first = values[0]
        yield key, [(_plain(value), value not in (None, first)) for value in values]
    yield "seconds", [(f"{run.seconds:.1f}", False) for run in runs]


def _plain(value: object) -> str:
    if value is None:
        return words.UNKNOWN
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _heat(p99: float) -> list[float]:
    """Where a token's colour changes, in nats."""
    unit = p99 if p99 > 0 else _LEAST_HEAT
    return [float(f"{unit * times:.2g}") for times in _HEAT]


def _embedded(data: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _hash(text: str) -> str:
    """As a content security policy names an inline element's text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
