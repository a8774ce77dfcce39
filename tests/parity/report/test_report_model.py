import math
from dataclasses import replace

import pytest
from report_samples import judged, run_of, sample, with_again

from isomoe.parity.noise import DECODE, Noise
from isomoe.parity.report import Report
from isomoe.parity.report.model import token_views
from isomoe.parity.report.words import odds, readable, share, visible
from isomoe.parity.run import Candidate
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


def test_the_floor_is_drawn_over_all_compositions_and_known_good_targets() -> None:
    base = with_again(BASE)
    report = replace(report_of(), baseline=base, noise=Noise.of(base, known_good=[BASE]))
    names = {source.name: source.is_drawn for source in report.floor}
    assert names == {"alone": True, "base (known good)": True, DECODE: False}
    assert report.floor_summary is not None
    assert report.floor_summary.tokens == 2 * BASE.num_tokens


def test_decode_is_the_floor_where_nothing_else_is_known() -> None:
    assert [source.is_drawn for source in report_of().floor] == [True]
    silent = replace(BASE, scores=None)
    assert replace(report_of(), baseline=silent).floor_summary is None


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
