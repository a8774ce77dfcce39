import math
from dataclasses import replace

import pytest
from report_samples import judged, run_of, sample, with_again

from isomoe.parity.noise import DECODE, Noise
from isomoe.parity.report import Report
from isomoe.parity.report.model import token_views
from isomoe.parity.report.words import odds, readable, share, visible
from isomoe.parity.run import Candidate, Run
from isomoe.parity.verdict import Verdict

BASE = run_of("base", 2, 5, 2)


def report_of(*verdicts: Verdict) -> Report:
    rows = tuple(judged(BASE, BASE, verdict) for verdict in verdicts)
    return Report(baseline=BASE, source="sample", rows=rows, noise=Noise.of(BASE))


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ((Verdict.IDENTICAL, Verdict.AGREES), 0),
        ((Verdict.AGREES, Verdict.DIFFERS), 1),
        ((Verdict.DIFFERS, Verdict.NOT_COMPARED), 1),
        ((Verdict.IDENTICAL, Verdict.NOT_COMPARED), 2),
        ((), 2),
    ],
)
def test_the_exit_code_says_what_came_of_it(verdicts: tuple[Verdict, ...], code: int) -> None:
    assert report_of(*verdicts).exit_code == code


def test_the_headline_counts_the_targets() -> None:
    assert report_of(Verdict.AGREES).headline == "The target agrees within the noise floor."
    assert (
        report_of(Verdict.IDENTICAL, Verdict.IDENTICAL).headline == "All 2 targets are identical."
    )
    assert sample().headline == (
        "Of 4 targets, 1 differs from the baseline; 1 was not compared; "
        "1 agrees within the noise floor; 1 is identical."
    )


def floor_of(base: Run, *known_good: Run) -> dict[str, bool]:
    report = replace(report_of(), baseline=base, noise=Noise.of(base, known_good))
    counted = [source for source in report.floor if source.is_counted]
    summary = report.floor_summary
    assert (summary.tokens if summary else 0) == sum(source.summary.tokens for source in counted)
    for source in report.floor:
        of_noise = report.noise.sources.get(source.name.removesuffix(" (known good)"))
        assert of_noise in (None, source.summary)
    return {source.name: source.is_counted for source in report.floor}


def test_the_floor_is_what_the_verdict_rests_on() -> None:
    silent = replace(BASE, scores=None)
    moved = with_again(BASE).again["alone"]
    wild = with_again(BASE, noise=3.0).again["alone"]
    assert floor_of(with_again(BASE), BASE) == {
        "alone": True,
        DECODE: False,
        "base (known good)": False,
    }
    assert floor_of(replace(with_again(BASE), outputs=moved)) == {"alone": True, DECODE: True}
    assert floor_of(replace(with_again(BASE), outputs=wild)) == {"alone": True, DECODE: False}
    good = replace(BASE, name="good", scores=moved)
    assert floor_of(BASE, good) == {DECODE: False, "good (known good)": True}
    assert floor_of(replace(silent, again={"alone": moved})) == {"alone": True}


def test_a_floor_that_is_assumed_has_no_summary() -> None:
    assert floor_of(BASE) == {DECODE: False}
    assert replace(report_of(), baseline=BASE).floor_summary is None


def test_nan_of_a_free_decode_is_not_finite_and_of_texts_not_compared() -> None:
    broken = BASE.outputs[0][0]
    broken = broken._replace(token=broken.token._replace(logprob=math.nan))
    other = replace(BASE, scores=None, outputs=((broken, *BASE.outputs[0][1:]), BASE.outputs[1]))
    (view, *_) = token_views(judged(BASE, other, Verdict.DIFFERS), 0)
    assert view.delta is not None
    assert math.isnan(view.delta)
    silent = replace(other, gives_logprobs=False)
    (view, *_) = token_views(judged(BASE, silent, Verdict.NOT_COMPARED), 0)
    assert view.delta is None


def test_a_target_that_cannot_score_is_compared_up_to_the_first_difference() -> None:
    text = list(BASE.outputs[0])
    text[3] = text[3]._replace(token=Candidate(-1, None, -0.7))
    other = replace(BASE, scores=None, outputs=(tuple(text), BASE.outputs[1]))
    views = token_views(judged(BASE, other, Verdict.AGREES), 0)
    assert [view.delta for view in views] == [0.0, 0.0, 0.0, None, None]
    assert views[3].theirs is not None
    assert views[3].theirs.token.token_id == -1
    assert views[4].theirs is None


@pytest.mark.parametrize(
    ("chance", "words"),
    [
        (1e-4, "1 in 10,000"),
        (0.37, "1 in 2.7"),
        (0.00123, "1 in 810"),
        (1.0, "over 1 in 2"),
        (0.0, "less than 1 in 10^12"),
        (None, "—"),
        (math.nan, "—"),
    ],
)
def test_a_chance_is_told_as_odds(chance: float | None, words: str) -> None:
    assert odds(chance) == words


def test_a_share_is_not_rounded_up_to_all() -> None:
    assert share(0.99999) == "99.9%"
    assert share(1.0) == "100.0%"


def test_what_shows_nothing_is_made_visible() -> None:
    assert visible(" a\n\t") == "·a⏎⇥"
    assert visible("") == "∅"
    assert visible("\u202e\x00\u200b\u00a0") == "⟨202e⟩␀⟨200b⟩⟨a0⟩"
    assert readable("two words\n\u202e") == "two words\n⟨202e⟩"
