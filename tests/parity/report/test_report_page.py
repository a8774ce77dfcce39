import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_samples import HOSTILE, judged, run_of, sample, with_again, with_token

from isomoe.errors import ConfigError
from isomoe.parity.noise import Noise
from isomoe.parity.report import Report, tokens, write_page
from isomoe.parity.run import Candidate, Prompt
from isomoe.parity.verdict import Verdict

VOID = {"meta", "link", "br", "img", "path", "circle"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Page(HTMLParser):
    """The elements of a page. Fails if they are not nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        return json.loads(self.texts["script"][0])


def written(report: Report, folder: Path, **options: object) -> str:
    path = folder / "page.html"
    write_page(report, path, **options)
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = written(sample(), tmp_path)
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "base", "form", "img"}
        for name in LOADS & attributes.keys():
            assert (attributes[name] or "").startswith(("#", "data:")), (tag, attributes)
    style = page.texts["style"][0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_without_javascript_all_but_the_tokens_is_there(tmp_path: Path) -> None:
    report = sample()
    page = Page(written(report, tmp_path))
    assert page.texts["h1"][0] == report.headline
    words = " ".join(text for texts in page.texts.values() for text in texts)
    for said in ("1,000 times the floor", "less than 1 in 10^12", "gone: no answer within 60 s"):
        assert said in words
    for said in ("started with --tp 8", "norm ratio 2.00", "docs/parity.md", "bfloat16"):
        assert said in words
    tables = [table for table in page.all("table") if table.get("class") == "prompts"]
    assert len(tables) == 3
    assert len(page.all("svg")) >= 5


def test_headings_and_tables_can_be_read_aloud(tmp_path: Path) -> None:
    page = Page(written(sample(), tmp_path))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(head.get("scope") for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for named in (attributes.get("aria-labelledby") or "").split():
            assert named in ids
    assert {"lang": "en"} in page.all("html")


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    base = with_token(run_of(HOSTILE, 1, 6, 2), 0, 1, Candidate(5, HOSTILE, -0.5))
    base = replace(
        base,
        prompts=(Prompt((1,), HOSTILE + "\ud800\u2028", HOSTILE),),
        facts={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    other = with_token(replace(base, name=HOSTILE), 0, 2, Candidate(6, HOSTILE, -0.5))
    row = judged(base, replace(other, scores=base.scores), Verdict.DIFFERS, HOSTILE)
    report = Report(
        baseline=base,
        source=HOSTILE,
        rows=(row,),
        noise=Noise.of(base),
        conditions={HOSTILE: [HOSTILE]},
    )
    page = Page(written(report, tmp_path))
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert HOSTILE.replace(" ", "·") in page.data["texts"]


@pytest.mark.parametrize(("decode", "shown"), [(None, "#77"), (lambda token: f" t{token}", "·t77")])
def test_a_token_without_a_text_is_decoded_or_named_by_its_id(
    tmp_path: Path, decode: object, shown: str
) -> None:
    html = written(sample(), tmp_path, decode=decode)
    assert shown in Page(html).data["texts"]
    assert f"<code>{shown}</code>" in html


def test_a_page_that_is_too_large_keeps_the_largest_deltas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MOST_BYTES", 60_000)
    base = run_of("base", 20, 60, 8)
    row = judged(base, run_of("a", 20, 60, 8, noise=0.01), Verdict.AGREES)
    report = Report(baseline=base, source="sample", rows=(row,), noise=Noise.of(base))
    found = Page(written(report, tmp_path)).data
    prompts = [prompt for prompt in found["rows"][0] if prompt]
    assert 0 < len(prompts) < 20
    pairs = [pair for p in prompts for pair in zip(p["d"], p["c"], strict=True)]
    shown = [abs(delta) for delta, candidates in pairs if candidates]
    hidden = [abs(delta) for delta, candidates in pairs if not candidates]
    assert min(shown) >= max(hidden)
    size = len(json.dumps(found["rows"], separators=(",", ":")))
    assert 30_000 < size < 70_000


@pytest.mark.slow
def test_a_page_of_100_prompts_of_400_tokens_is_below_10_megabytes(tmp_path: Path) -> None:
    base = run_of("base", 100, 400, 8)
    rows = tuple(
        judged(base, run_of(name, 100, 400, 8, noise=0.01), Verdict.AGREES)
        for name in ("a", "b", "c")
    )
    for kept in (rows[:1], rows):
        report = Report(baseline=base, source="sample", rows=kept, noise=Noise.of(base))
        assert len(written(report, tmp_path).encode("utf-8")) < 10_000_000


def test_one_target_of_the_default_size_keeps_all_candidates(tmp_path: Path) -> None:
    base = run_of("base", 20, 100, 8)
    row = judged(base, run_of("a", 20, 100, 8, noise=0.01), Verdict.AGREES)
    report = Report(baseline=base, source="", rows=(row,), noise=Noise.of(base))
    found = Page(written(report, tmp_path)).data
    assert all(candidates for prompt in found["rows"][0] for candidates in prompt["c"])


def test_nothing_compared_is_a_page_too(tmp_path: Path) -> None:
    base = run_of("base", 1, 3, 2)
    html = written(Report(baseline=base, source="sample", rows=(), noise=Noise.of(base)), tmp_path)
    assert "No target was compared." in html


def test_the_page_says_what_the_floor_rests_on(tmp_path: Path) -> None:
    html = written(sample(), tmp_path)
    assert '<th scope="row">alone</th>' in html
    assert '<th scope="row">decode against prefill (not counted)</th>' in html
    base = run_of("base", 1, 3, 2)
    html = written(Report(baseline=base, source="", rows=(), noise=Noise.of(base)), tmp_path)
    assert "here nothing is, and the floor is assumed" in html


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/page\.html: cannot be written"):
        write_page(sample(), tmp_path / "missing" / "page.html")


def test_the_tokens_of_a_page_are_those_of_the_runs(tmp_path: Path) -> None:
    """Log-probabilities in 1/10,000 nat, three digits of each delta, the other's ranks."""
    report = sample()
    near = report.rows[1].comparison
    assert near.other.scores is not None
    text = list(near.other.scores[2])
    text[3] = text[3]._replace(rank=4)
    scores = (*near.other.scores[:2], tuple(text), *near.other.scores[3:])
    ranked = judged(near.baseline, replace(near.other, scores=scores), Verdict.AGREES)
    report = replace(report, rows=(report.rows[0], ranked, *report.rows[2:]))
    data = Page(written(report, tmp_path)).data
    assert data["rows"][1][2]["r"][3] == 4
    for shown, row in zip(data["rows"], report.rows[:3], strict=False):
        ours, theirs = row.comparison.baseline, row.comparison.other
        assert ours.scores is not None
        assert theirs.scores is not None
        for prompt, our, their in zip(shown, ours.scores, theirs.scores, strict=True):
            assert [data["ids"][token] for token in prompt["t"]] == [
                place.token.token_id for place in our
            ]
            assert prompt["l"] == [round(place.logprob * 10_000) for place in our]
            assert prompt["r"] == [place.rank for place in their]
            deltas = [b.logprob - a.logprob for a, b in zip(our, their, strict=True)]
            assert prompt["d"] == pytest.approx(deltas, rel=0.006)
    parted = [(at, prompt["at"]) for at, prompt in enumerate(data["rows"][2]) if prompt["o"]]
    assert (2, 5) in parted


def test_a_colour_changes_at_multiples_of_the_noise_floor(tmp_path: Path) -> None:
    report = sample()
    assert report.floor_summary is not None
    p99 = report.floor_summary.p99
    heat = Page(written(report, tmp_path)).data["heat"]
    assert heat == pytest.approx([p99, 3 * p99, 10 * p99, 30 * p99], rel=0.06)


def test_a_fact_that_is_not_the_baselines_is_marked(tmp_path: Path) -> None:
    html = written(sample(), tmp_path)
    assert re.findall(r'<td class="differ">(\w+) ', html) == ["vllm", "near", "far"]


def test_charts_draw_sizes_and_not_signs(tmp_path: Path) -> None:
    base = with_again(run_of("base", 4, 40, 2))
    far = run_of("far", 4, 40, 2, noise=0.1)
    row = judged(base, far, Verdict.DIFFERS)
    forced = row.comparison.forced
    assert forced is not None
    html = written(Report(baseline=base, source="", rows=(row,), noise=Noise.of(base)), tmp_path)
    floor = Report(baseline=base, source="", rows=(row,), noise=Noise.of(base)).floor_summary
    assert floor is not None
    assert f"99% are within {forced.p99:.3g} nats" in html
    assert f"noise floor, p99 {floor.p99:.3g}<" in html
