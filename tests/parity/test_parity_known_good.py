"""What known-good targets say of the noise floor, and of how much may differ."""

import math
from dataclasses import replace

import pytest
from noisy_runs import (
    ROUNDING,
    baseline_run,
    gaussian,
    noisy_run,
    shifted,
    silent,
)

from isomoe.parity.compare import compare
from isomoe.parity.evidence import Kind
from isomoe.parity.noise import Noise
from isomoe.parity.run import Candidate, Place, Run
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import Judgement, Verdict, judge

BASELINE = baseline_run()
NOISE = Noise.of(BASELINE)


def judged(other: Run, thresholds: Thresholds | None = None) -> Judgement:
    return judge(compare(BASELINE, other), NOISE, thresholds)


def test_outputs_part_where_the_noise_was_large_whatever_a_known_good_target_has() -> None:
    """Half of the odds moved by 4 times the noise of a logit: what random ids do."""
    near = noisy_run("other", gaussian(ROUNDING), 2, prompts=60)
    baseline = baseline_run(prompts=60)
    tied, outputs = [], []
    for text in baseline.outputs:
        place = text[1]
        tie = Candidate(999, None, place.logprob - 4 * ROUNDING)
        tied.append((text[0], Place(place.token, (place.token, tie)), *text[2:]))
        rival = Candidate(999, None, place.logprob)
        back = place.token._replace(logprob=place.logprob - 4 * ROUNDING)
        outputs.append((text[0], Place(rival, (rival, back)), *text[2:]))
    baseline = replace(baseline, outputs=tuple(tied))
    noise = Noise.of(baseline, [noisy_run("good", gaussian(ROUNDING), 3, prompts=60)])
    found = judge(compare(baseline, replace(near, outputs=tuple(outputs))), noise)
    (parted_by,) = (test.effect for test in found.tests if test.kind is Kind.PARTINGS)
    assert parted_by == pytest.approx(4, rel=0.3)
    assert found.verdict is Verdict.AGREES, found.reasons


def test_a_known_good_target_is_the_floor_of_a_baseline_that_has_none() -> None:
    good = noisy_run("good", gaussian(0.05), 3)
    for baseline in (
        noisy_run("baseline", silent, 1, again=silent),
        replace(noisy_run("baseline", gaussian(ROUNDING), 1), scores=None),
    ):
        noise = Noise.of(baseline, [good])
        assert "good" in noise.sources
        assert not any("assumed" in note for note in noise.notes)
        alike = judge(compare(baseline, noisy_run("other", gaussian(0.05), 2)), noise)
        assert alike.verdict is Verdict.AGREES
        far = judge(compare(baseline, noisy_run("other", gaussian(0.5), 2)), noise)
        assert far.verdict is Verdict.DIFFERS


def test_a_known_good_target_that_failed_is_not_used_and_named() -> None:
    noise = Noise.of(BASELINE, [replace(BASELINE, name="good", error="good: hangs")])
    assert noise.known_good == ()
    assert noise.notes == ("not used as a noise floor: good: hangs",)


def test_a_known_good_target_says_how_much_another_layout_may_round() -> None:
    rough = noisy_run("other", gaussian(4 * ROUNDING), 2)
    good = noisy_run("good", gaussian(4 * ROUNDING), 3)
    found = judge(compare(BASELINE, rough), Noise.of(BASELINE, [good]))
    assert found.verdict is Verdict.AGREES
    assert "a known-good target is" in found.notes[0]
    fine = noisy_run("good", gaussian(ROUNDING), 3)
    near = noisy_run("other", gaussian(2.4 * ROUNDING), 2)
    assert judged(near).verdict is Verdict.AGREES
    assert judge(compare(BASELINE, near), Noise.of(BASELINE, [fine])).verdict is Verdict.DIFFERS


def test_a_known_good_target_that_shifts_lets_others_shift_as_much() -> None:
    good = noisy_run("good", shifted(0.4 * ROUNDING, ROUNDING), 3)
    noise = Noise.of(BASELINE, [good])
    alike = noisy_run("other", shifted(0.4 * ROUNDING, ROUNDING), 2)
    worse = noisy_run("other", shifted(ROUNDING, ROUNDING), 2)
    assert judge(compare(BASELINE, alike), noise).verdict is Verdict.AGREES
    assert judge(compare(BASELINE, worse), noise).verdict is Verdict.DIFFERS


def test_a_known_good_target_widens_the_margin_of_its_own_half_alone() -> None:
    good = noisy_run("good", gaussian(ROUNDING), 3, decode=gaussian(8 * ROUNDING))
    noise = Noise.of(BASELINE, [good])
    alike = noisy_run("other", gaussian(ROUNDING), 2, decode=gaussian(8 * ROUNDING))
    found = judge(compare(BASELINE, alike), noise)
    assert found.verdict is Verdict.AGREES
    assert "times the noise floor (free-running)" in found.notes[0]
    rough = noisy_run("other", gaussian(8 * ROUNDING), 2)
    assert judge(compare(BASELINE, rough), noise).verdict is Verdict.DIFFERS
    pinned = judge(compare(BASELINE, alike), noise, Thresholds(margin=12))
    assert pinned.notes == (), "a pinned margin is nobody's doing"


def test_a_known_good_target_that_is_not_finite_is_not_used() -> None:
    good = noisy_run("good", gaussian(ROUNDING), 3)
    text = good.outputs[0]
    broken = Place(text[0].token._replace(logprob=math.nan), text[0].top)
    good = replace(good, outputs=((broken, *text[1:]), *good.outputs[1:]))
    noise = Noise.of(BASELINE, [good])
    assert noise.known_good == ()
    assert "not used as a noise floor: good: 1 of 720" in noise.notes[0]
