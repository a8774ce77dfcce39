"""What is told apart, what is not, and what is never concluded."""

import math
from dataclasses import replace
from random import Random

import pytest
from noisy_runs import (
    ROUNDING,
    baseline_run,
    gaussian,
    noisy_run,
    parted,
    shifted,
    silent,
    texts,
)

from isomoe.parity.compare import compare
from isomoe.parity.evidence import Half, Kind, Part
from isomoe.parity.noise import Noise
from isomoe.parity.run import Candidate, Place, Prompt, Run
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import MOST_TESTS, Judgement, Verdict, judge, odds

BASELINE = baseline_run()
NOISE = Noise.of(BASELINE)


def judged(other: Run, thresholds: Thresholds | None = None) -> Judgement:
    return judge(compare(BASELINE, other), NOISE, thresholds)


def kinds_below(judgement: Judgement, chance: float) -> set[Kind]:
    return {test.kind for test in judgement.tests if test.chance < chance}


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


def test_outputs_that_part_far_from_a_tie_differ_though_their_prefix_agrees() -> None:
    near = noisy_run("other", gaussian(ROUNDING), 2)
    found = judged(parted(near, 1, -0.001))
    assert found.verdict is Verdict.DIFFERS
    assert kinds_below(found, 1e-6) == {Kind.OUTLIERS, Kind.PARTINGS}
    assert "free-running" in found.reasons[0]


def test_a_few_outputs_that_part_far_from_a_tie_differ_too() -> None:
    """Too few for a rank test."""
    baseline = baseline_run(prompts=5)
    near = noisy_run("other", gaussian(ROUNDING), 2, prompts=5)
    found = judge(compare(baseline, parted(near, 1, -0.001)), Noise.of(baseline))
    assert found.verdict is Verdict.DIFFERS
    assert kinds_below(found, 1e-5) == {Kind.PARTINGS}
    assert found.reasons[0].startswith("free-running outputs of 5 of 5 prompts part where the odds")


def test_outputs_that_part_at_once_are_judged_by_how_far_or_said_to_have_no_token() -> None:
    near = replace(noisy_run("other", gaussian(ROUNDING), 2), scores=None)
    assert judged(parted(near, 0, -0.001)).verdict is Verdict.DIFFERS
    named = [
        (Place(Candidate(None, "<a>", -0.001)), *output[1:]) for output in near.outputs
    ]  # an id is no text
    found = judged(replace(near, outputs=tuple(named)))
    assert found.verdict is Verdict.NOT_COMPARED
    assert found.reasons == ("no tokens to compare: no output begins with the baseline's token",)


def cut(run: Run, top: int) -> Run:
    """The run, with fewer candidates in every place."""
    scores = tuple(
        tuple(Place(place.token, place.top[:top], place.rank) for place in text)
        for text in run.scores or ()
    )
    return replace(run, scores=scores)


def test_lists_of_candidates_of_other_lengths_are_no_difference() -> None:
    """At the end of the shorter list stands what moved up, in prompt after prompt."""
    near = gaussian(0.3)
    baseline = noisy_run("baseline", near, 1, again=near, prompts=40)
    other = noisy_run("other", near, 2, prompts=40)
    for ours, theirs in ((cut(baseline, 2), other), (baseline, cut(other, 2))):
        found = judge(compare(ours, theirs), Noise.of(baseline))
        assert found.verdict is Verdict.AGREES, found.reasons


def spelt(run: Run, has_ids: bool) -> Run:
    """The run, with a text for every candidate, and with its id or without."""

    def told(candidate: Candidate) -> Candidate:
        known = candidate.token_id if has_ids else None
        return Candidate(known, f"<{candidate.token_id}>", candidate.logprob)

    scores = tuple(
        tuple(Place(told(place.token), tuple(map(told, place.top))) for place in text)
        for text in run.scores or ()
    )
    return replace(run, scores=scores, outputs=scores, again={})


def test_a_shift_is_seen_where_one_side_tells_texts_and_the_other_ids_too() -> None:
    steady = noisy_run("other", shifted(0.4 * ROUNDING, ROUNDING), 2)
    found = judge(compare(spelt(BASELINE, True), spelt(steady, False)), NOISE)
    assert Kind.SHIFT in kinds_below(found, 1e-5)


def test_the_few_that_were_sent_alone_are_judged_by_themselves_too() -> None:
    """All others hide it where prompts are taken together."""

    def small_steps(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, 4.5 * ROUNDING if prompt >= 48 else ROUNDING)

    baseline = baseline_run(prompts=60)
    other = replace(noisy_run("other", small_steps, 2, prompts=60), alone=12)
    noise = Noise.of(baseline)
    found = judge(compare(baseline, other), noise)
    assert found.verdict is Verdict.DIFFERS
    assert {(test.kind, test.part) for test in found.tests if test.chance < 1e-5} == {
        (Kind.SCALE, Part.ALONE)
    }
    assert any("deltas of prompts sent one at a time are" in reason for reason in found.reasons)
    together = judge(compare(baseline, replace(other, alone=None)), noise)
    assert together.verdict is Verdict.AGREES
    assert len(found.tests) <= MOST_TESTS


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


def test_a_baseline_that_is_not_finite_when_asked_again_judges_nobody() -> None:
    text = BASELINE.again["alone"][3]
    broken = Place(text[2].token._replace(logprob=math.nan), text[2].top)
    alone = list(BASELINE.again["alone"])
    alone[3] = (*text[:2], broken, *text[3:])
    baseline = replace(BASELINE, again={**BASELINE.again, "alone": tuple(alone)})
    found = judge(compare(baseline, noisy_run("other", gaussian(1), 2)), Noise.of(baseline))
    assert found.verdict is Verdict.NOT_COMPARED
    assert found.reasons[0].startswith("baseline: 1 of 720 log-probabilities of its score, alone")


def test_a_fault_is_no_agreement() -> None:
    found = judged(replace(BASELINE, name="other", error="other: hangs"))
    assert (found.verdict, found.reasons) == (Verdict.NOT_COMPARED, ("other: hangs",))


def test_equal_texts_without_log_probabilities_are_not_compared() -> None:
    silent_texts = tuple(
        tuple(Place(place.token._replace(logprob=math.nan)) for place in text)
        for text in BASELINE.outputs
    )
    other = replace(BASELINE, name="other", outputs=silent_texts, scores=None)
    found = judged(replace(other, gives_logprobs=False))
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
    assert "times as far off would have been told" in clean.notes[0]
    assert gross.verdict is Verdict.DIFFERS


def test_too_little_to_tell_anything_is_not_compared() -> None:
    """Two prompts of 6 tokens: no test could reach the false-alarm rate."""
    size = {"prompts": 2, "tokens": 6}
    baseline = baseline_run(**size)
    for nats in (ROUNDING, 1.0):
        other = noisy_run("other", gaussian(nats), 2, **size)  # type: ignore[arg-type]
        found = judge(compare(baseline, other), Noise.of(baseline))
        assert found.verdict is Verdict.NOT_COMPARED
        assert found.reasons[0].startswith("2 different prompts, too few tokens")


def test_a_prompt_that_is_asked_many_times_counts_once() -> None:
    """Twenty copies of four prompts would be sure of what four are not."""
    one, other = baseline_run(prompts=4), noisy_run("o", gaussian(5 * ROUNDING), 2, prompts=4)

    def copied(run: Run, prompts: tuple[Prompt, ...]) -> Run:
        return replace(
            run,
            prompts=prompts,
            outputs=run.outputs * 20,
            scores=(run.scores or ()) * 20,
            again={name: found * 20 for name, found in run.again.items()},
        )

    many = copied(one, one.prompts * 20)
    found = judge(compare(many, copied(other, many.prompts)), Noise.of(many))
    assert found.verdict is Verdict.AGREES
    assert found.notes[0].startswith("4 different prompts:")
    others = copied(one, tuple(Prompt((index,)) for index in range(80)))
    counted = judge(compare(others, copied(other, others.prompts)), Noise.of(others))
    assert counted.verdict is Verdict.DIFFERS, "told apart if they were not the same prompts"


def test_a_batch_invariant_baseline_agrees_with_a_layout_that_rounds() -> None:
    baseline = noisy_run("baseline", silent, 1, again=silent)
    other = noisy_run("other", gaussian(0.05), 2)
    found = judge(compare(baseline, other), Noise.of(baseline))
    assert found.verdict is Verdict.AGREES
    assert "the floor is assumed" in found.notes[0]


def test_a_few_wrong_tokens_differ_though_the_floor_is_assumed() -> None:
    def wrong(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, 50.0 if token == 5 else 0.05)

    baseline = noisy_run("baseline", silent, 1, again=silent)
    other = noisy_run("other", wrong, 2, decode=gaussian(0.05))
    found = judge(compare(baseline, other), Noise.of(baseline))
    assert found.verdict is Verdict.DIFFERS
    assert kinds_below(found, 1e-5) == {Kind.OUTLIERS}


@pytest.mark.parametrize(
    ("chance", "says"),
    [(0.3, "chance 0.3"), (5e-5, "chance 1 in 20,000"), (0.0, "chance below 1 in 10^12")],
)
def test_odds_read_as_people_say_them(chance: float, says: str) -> None:
    assert odds(chance) == says


def test_the_made_up_model_is_the_same_in_every_run() -> None:
    assert texts(silent, 1, 2, 3) == texts(silent, 2, 2, 3)
