"""What is told apart, what is not, and what is never concluded."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from noisy_runs import (
    ROUNDING,
    baseline_run,
    gaussian,
    noisy_run,
    shifted,
    silent,
    texts,
)
from scipy import stats

from isomoe.errors import ConfigError
from isomoe.parity.compare import compare
from isomoe.parity.evidence import Half, Kind
from isomoe.parity.noise import Noise
from isomoe.parity.run import Candidate, Place, Run
from isomoe.parity.student import exceeds, upper_tail
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import Judgement, Verdict, judge, odds

BASELINE = baseline_run()
NOISE = Noise.of(BASELINE)


def judged(other: Run, thresholds: Thresholds | None = None) -> Judgement:
    return judge(compare(BASELINE, other), NOISE, thresholds)


def kinds_below(judgement: Judgement, chance: float) -> set[Kind]:
    return {test.kind for test in judgement.tests if test.chance < chance}


@pytest.mark.parametrize("freedom", [1, 2, 5, 19, 95, 2000])
@pytest.mark.parametrize("t", [-3.0, 0.0, 0.3, 1.0, 4.6, 12.0, 40.0])
def test_students_tail_is_scipys(t: float, freedom: int) -> None:
    assert upper_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-8, abs=1e-300)


def test_fewer_than_two_values_exceed_nothing() -> None:
    assert exceeds([], 0.0) == exceeds([1e9], 0.0) == 1.0


def test_two_values_that_happen_to_be_alike_are_not_certain() -> None:
    assert exceeds([0.1, 0.1], 0.0) > 0.05


def test_the_same_bits_are_identical() -> None:
    assert judged(replace(BASELINE, name="other")).verdict is Verdict.IDENTICAL


@pytest.mark.parametrize("seed", range(2, 10))
def test_the_same_rounding_agrees_and_is_one_floor_wide(seed: int) -> None:
    found = judged(noisy_run("other", gaussian(ROUNDING), seed))
    assert found.verdict is Verdict.AGREES
    assert found.effect == pytest.approx(1.0, abs=0.2)
    assert found.chance is not None
    assert found.chance > 1e-4
    assert "not told apart from the noise floor" in found.reasons[0]


def test_half_as_much_rounding_again_agrees() -> None:
    assert judged(noisy_run("other", gaussian(1.5 * ROUNDING), 2)).verdict is Verdict.AGREES


def test_four_times_the_floor_differs_with_its_size_and_its_odds() -> None:
    found = judged(noisy_run("other", gaussian(4 * ROUNDING), 2))
    assert found.verdict is Verdict.DIFFERS
    assert found.effect is not None
    assert 2.4 < found.effect < 4
    assert found.chance is not None
    assert found.chance < 1e-4
    assert any("times the noise floor (chance" in reason for reason in found.reasons)


def test_a_shift_below_the_noise_differs_because_it_repeats() -> None:
    found = judged(noisy_run("other", shifted(0.4 * ROUNDING, ROUNDING), 2))
    assert found.verdict is Verdict.DIFFERS
    assert kinds_below(found, 1e-5) == {Kind.SHIFT}


def test_without_candidates_the_chosen_tokens_show_a_shift() -> None:
    def bare(run: Run) -> Run:
        def strip(all_texts):  # type: ignore[no-untyped-def]
            return tuple(tuple(Place(place.token) for place in text) for text in all_texts)

        return replace(
            run,
            outputs=strip(run.outputs),
            scores=strip(run.scores),
            again={name: strip(found) for name, found in run.again.items()},
        )

    baseline = bare(baseline_run(prompts=60))
    noise = Noise.of(baseline)
    steady = noisy_run("other", shifted(ROUNDING, ROUNDING), 2, prompts=60)
    rounding = noisy_run("other", gaussian(ROUNDING), 2, prompts=60)
    assert judge(compare(baseline, bare(steady)), noise).verdict is Verdict.DIFFERS
    assert judge(compare(baseline, bare(rounding)), noise).verdict is Verdict.AGREES


def test_one_prompt_of_other_rows_differs_and_is_named() -> None:
    def wrong(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, 2.0 if prompt == 17 else ROUNDING)

    baseline = baseline_run(tokens=60)
    other = noisy_run("other", wrong, 2, decode=gaussian(ROUNDING), tokens=60)
    found = judge(compare(baseline, other), Noise.of(baseline))
    assert found.verdict is Verdict.DIFFERS
    assert found.reasons[0].startswith("prompt 17: teacher-forced deltas are")


def test_one_wrong_token_in_every_prompt_differs() -> None:
    def wrong(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, 2.0 if token == 5 else ROUNDING)

    found = judged(noisy_run("other", wrong, 2, decode=gaussian(ROUNDING)))
    assert found.verdict is Verdict.DIFFERS
    assert kinds_below(found, 1e-5) == {Kind.OUTLIERS}


def test_one_expert_that_flips_in_one_prompt_agrees() -> None:
    def flip(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, 0.5 if (prompt, token) == (3, 5) else ROUNDING)

    assert judged(noisy_run("other", flip, 2)).verdict is Verdict.AGREES


def test_a_defect_of_decode_alone_differs() -> None:
    found = judged(noisy_run("other", gaussian(ROUNDING), 2, decode=gaussian(8 * ROUNDING)))
    assert found.verdict is Verdict.DIFFERS
    assert {test.half for test in found.tests if test.chance < 1e-6} == {Half.FREE}


def parted(run: Run, at: int, logprob_of_other: float) -> Run:
    """The run, choosing another token in one place of every output, as far off as given."""
    outputs = []
    for text in run.outputs:
        place = text[at]
        other = Candidate(999, None, logprob_of_other)
        outputs.append((*text[:at], Place(other, (other, place.token)), *text[at + 1 :]))
    return replace(run, outputs=tuple(outputs))


def test_outputs_that_part_far_from_a_tie_differ_though_their_prefix_agrees() -> None:
    near = noisy_run("other", gaussian(ROUNDING), 2)
    found = judged(parted(near, 1, -0.001))
    assert found.verdict is Verdict.DIFFERS
    assert kinds_below(found, 1e-6) == {Kind.OUTLIERS}
    assert "free-running" in found.reasons[0]


def test_tokens_that_cannot_be_told_apart_part_nowhere() -> None:
    def named(run: Run) -> Run:
        outputs = tuple(
            tuple(Place(Candidate(None, f"<{p.token.token_id}>", p.logprob)) for p in text)
            for text in run.outputs
        )
        return replace(run, outputs=outputs, scores=None)

    found = judged(named(noisy_run("other", gaussian(ROUNDING), 2)))
    assert found.verdict is Verdict.NOT_COMPARED


def test_outputs_that_part_at_a_tie_agree() -> None:
    baseline, other = BASELINE, noisy_run("other", gaussian(ROUNDING), 2)
    swapped = []
    for text in baseline.outputs:
        place = text[1]
        tie = Candidate(999, None, place.logprob - 0.002)
        swapped.append((text[0], Place(place.token, (place.token, tie)), *text[2:]))
    tied = replace(baseline, outputs=tuple(swapped))
    outputs = [
        (ours[0], Place(Candidate(999, None, ours[1].logprob), (ours[1].token,)), *ours[2:])
        for ours in tied.outputs
    ]
    found = judge(compare(tied, replace(other, outputs=tuple(outputs))), Noise.of(tied))
    assert found.verdict is Verdict.AGREES


def test_a_log_probability_that_is_not_finite_differs_and_says_where() -> None:
    other = noisy_run("other", gaussian(ROUNDING), 2)
    assert other.scores is not None
    for logprob in (math.nan, -math.inf):
        text = other.scores[2]
        broken = Place(text[4].token._replace(logprob=logprob), text[4].top)
        scores = (*other.scores[:2], (*text[:4], broken, *text[5:]), *other.scores[3:])
        found = judged(replace(other, scores=scores))
        assert found.verdict is Verdict.DIFFERS
        assert found.reasons == (
            "other: 1 of 720 log-probabilities of its score are not finite, first in prompt 2, "
            "token 4",
        )


def test_a_baseline_that_is_not_finite_judges_nobody() -> None:
    text = BASELINE.outputs[0]
    broken = Place(text[0].token._replace(logprob=math.inf), text[0].top)
    baseline = replace(BASELINE, outputs=((broken, *text[1:]), *BASELINE.outputs[1:]))
    found = judge(compare(baseline, noisy_run("other", gaussian(1), 2)), Noise.of(baseline))
    assert found.verdict is Verdict.NOT_COMPARED
    assert found.reasons[0].startswith("baseline: 1 of 720")


def test_a_fault_is_no_agreement() -> None:
    found = judged(replace(BASELINE, name="other", error="other: hangs"))
    assert (found.verdict, found.reasons) == (Verdict.NOT_COMPARED, ("other: hangs",))


def test_equal_texts_without_log_probabilities_are_not_compared() -> None:
    silent_texts = tuple(
        tuple(Place(place.token._replace(logprob=math.nan)) for place in text)
        for text in BASELINE.outputs
    )
    found = judged(replace(BASELINE, name="other", outputs=silent_texts, scores=None))
    assert found.verdict is Verdict.NOT_COMPARED
    assert "greedy texts share 720 of 720 tokens" in found.reasons[0]


def test_a_target_that_cannot_score_is_judged_by_its_decode() -> None:
    other = noisy_run("other", gaussian(ROUNDING), 2)
    found = judged(replace(other, scores=None))
    assert found.verdict is Verdict.AGREES
    assert "free-running only" in found.notes[0]
    far = noisy_run("other", gaussian(8 * ROUNDING), 2)
    assert judged(replace(far, scores=None)).verdict is Verdict.DIFFERS


def test_a_baseline_without_a_floor_shows_what_repeats_and_agrees_with_nobody() -> None:
    baseline = replace(baseline_run(again=None), scores=None)
    noise = Noise.of(baseline)
    near = noisy_run("other", gaussian(ROUNDING), 2)
    found = judge(compare(baseline, near), noise)
    assert found.verdict is Verdict.NOT_COMPARED
    assert found.reasons[0].startswith("no noise floor")
    steady = noisy_run("other", shifted(0.3, ROUNDING), 2)
    assert judge(compare(baseline, steady), noise).verdict is Verdict.DIFFERS


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


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_prompts_are_said_to_be_few_and_still_show_what_is_gross(count: int) -> None:
    baseline = baseline_run(prompts=count, tokens=100)
    noise = Noise.of(baseline)
    clean = judge(
        compare(baseline, noisy_run("o", gaussian(ROUNDING), 2, prompts=count, tokens=100)), noise
    )
    gross = judge(
        compare(baseline, noisy_run("o", gaussian(1.0), 2, prompts=count, tokens=100)), noise
    )
    assert clean.verdict is Verdict.AGREES
    assert "only a gross difference can be told" in clean.notes[0]
    assert gross.verdict is Verdict.DIFFERS


def test_a_prompt_that_is_asked_many_times_counts_once() -> None:
    one, other = baseline_run(prompts=1), noisy_run("o", gaussian(2.5 * ROUNDING), 2, prompts=1)
    many = replace(
        one,
        prompts=one.prompts * 20,
        outputs=one.outputs * 20,
        scores=(one.scores or ()) * 20,
        again={name: found * 20 for name, found in one.again.items()},
    )
    repeated = replace(other, outputs=other.outputs * 20, scores=(other.scores or ()) * 20)
    found = judge(compare(many, repeated), Noise.of(many))
    assert found.verdict is Verdict.AGREES
    assert found.notes[0].startswith("1 different prompt:")


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


def test_a_batch_invariant_baseline_agrees_with_a_layout_that_rounds() -> None:
    baseline = noisy_run("baseline", silent, 1, again=silent)
    other = noisy_run("other", gaussian(0.05), 2)
    found = judge(compare(baseline, other), Noise.of(baseline))
    assert found.verdict is Verdict.AGREES
    assert "the floor is assumed" in found.notes[0]


def test_pinned_limits_decide_in_place_of_the_floor() -> None:
    far = noisy_run("other", gaussian(8 * ROUNDING), 2)
    assert judged(far, Thresholds(mean=0.2, max=2.0)).verdict is Verdict.AGREES
    near = noisy_run("other", gaussian(ROUNDING), 2)
    found = judged(near, Thresholds(max=1e-4))
    assert found.verdict is Verdict.DIFFERS
    assert "teacher-forced max |delta logprob| is" in found.reasons[0]
    assert "above the pinned 0.0001" in found.reasons[0]


def test_a_pinned_margin_is_the_margin() -> None:
    rough = noisy_run("other", gaussian(4 * ROUNDING), 2)
    assert judged(rough, Thresholds(margin=8)).verdict is Verdict.AGREES


def test_thresholds_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    file.write_text(json.dumps({"mean": 0.04, "max": 1, "false_alarm": 1e-6}))
    assert Thresholds.load(file) == Thresholds(mean=0.04, max=1, false_alarm=1e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "must be an object with any of false_alarm, margin, mean, max"),
        ('{"men": 1}', "unknown 'men'; known are false_alarm, margin, mean, max"),
        ('{"mean": "0.1"}', "mean '0.1': must be a number"),
        ('{"max": true}', "max True: must be a number"),
        ('{"mean": -1}', "mean -1: must be at least 0 nats"),
        ('{"mean": NaN}', "mean nan: must be at least 0 nats"),
        ('{"margin": 0.5}', "margin 0.5: must be at least 1"),
        ('{"false_alarm": 0}', "false_alarm 0: must be between 0 and 1"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "limits.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Thresholds.load(file)
    assert str(caught.value).startswith(f"--thresholds {file}: ")
    assert says in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--thresholds .*none\.json: not readable"):
        Thresholds.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("chance", "says"),
    [(0.3, "chance 0.3"), (5e-5, "chance 1 in 20,000"), (0.0, "chance below 1 in 10^12")],
)
def test_odds_read_as_people_say_them(chance: float, says: str) -> None:
    assert odds(chance) == says


def test_the_made_up_model_is_the_same_in_every_run() -> None:
    assert texts(silent, 1, 2, 3) == texts(silent, 2, 2, 3)
