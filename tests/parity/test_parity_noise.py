"""The noise floor is what the baseline differs from itself, and no more."""

import math
from dataclasses import replace
from random import Random

import pytest
from noisy_runs import ROUNDING, baseline_run, gaussian, noisy_run, silent

from isomoe.parity.noise import ASSUMED_NOISE, DECODE, LEAST_NOISE, Noise, doubt


def floor_of_a_logit(noise: Noise, baseline) -> float:
    """Geometric mean of the floor over 1 - p."""
    assert baseline.scores is not None
    logs = [
        floor - math.log(doubt(place))
        for floors, text in zip(noise.floors, baseline.scores, strict=True)
        for floor, place in zip(floors, text, strict=True)
    ]
    return math.exp(math.fsum(logs) / len(logs))


def test_every_source_is_summed_up_and_every_token_has_a_floor() -> None:
    baseline = baseline_run()
    noise = Noise.of(baseline)
    assert list(noise.sources) == ["alone", "in pairs, backwards", DECODE]
    assert all(summary.tokens == 24 * 30 for summary in noise.sources.values())
    assert [len(floors) for floors in noise.floors] == [30] * 24
    assert noise.is_measured
    assert noise.notes == ()


def test_the_floor_grows_with_the_rounding() -> None:
    sizes = []
    for nats in (ROUNDING, 10 * ROUNDING):
        baseline = noisy_run("baseline", gaussian(nats), 1, again=gaussian(nats))
        sizes.append(floor_of_a_logit(Noise.of(baseline), baseline))
    assert sizes[1] / sizes[0] == pytest.approx(10, rel=0.05)


def test_a_prompt_that_was_computed_the_same_way_does_not_lower_the_floor() -> None:
    baseline = baseline_run()
    assert baseline.scores is not None
    alone = baseline.again["alone"]
    half = tuple(baseline.scores[index] if index % 2 else text for index, text in enumerate(alone))
    mixed = replace(baseline, again={**baseline.again, "alone": half})
    whole, less = Noise.of(baseline), Noise.of(mixed)
    assert floor_of_a_logit(less, mixed) == pytest.approx(
        floor_of_a_logit(whole, baseline), rel=0.1
    )
    assert [len(most) for most in less.maxima] == [3, 2] * 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "something else"])
def test_the_same_bits_under_every_composition_tell_no_floor_so_that_one_is_assumed(
    dtype: str,
) -> None:
    baseline = noisy_run("it", silent, 1, again=silent, dtype=dtype)
    noise = Noise.of(baseline)
    assumed = ASSUMED_NOISE.get(dtype, ASSUMED_NOISE["bfloat16"])
    assert floor_of_a_logit(noise, baseline) == pytest.approx(assumed, rel=0.01)
    assert noise.notes[0].startswith("it gives the same bits under every batch composition")


def test_the_floor_is_never_below_what_the_dtype_can_hold() -> None:
    tiny = gaussian(1e-6)
    for dtype in LEAST_NOISE:
        baseline = noisy_run("baseline", tiny, 1, again=tiny, dtype=f"torch.{dtype}")
        found = floor_of_a_logit(Noise.of(baseline), baseline)
        assert found == pytest.approx(LEAST_NOISE[dtype], rel=0.05)


def test_a_decode_that_is_not_the_prefill_is_named_and_does_not_widen_the_floor() -> None:
    plain = baseline_run()
    wild = baseline_run(decode=gaussian(50 * ROUNDING))
    noise = Noise.of(wild)
    assert "decode is" in noise.notes[0]
    assert "does not count as noise" in noise.notes[0]
    assert floor_of_a_logit(noise, wild) == pytest.approx(
        floor_of_a_logit(Noise.of(plain), plain), rel=0.1
    )
    assert noise.sources[DECODE].mean > 10 * noise.sources["alone"].mean


def test_that_a_decode_is_not_the_prefill_is_said_where_the_floor_is_assumed_too() -> None:
    noise = Noise.of(noisy_run("it", silent, 1, again=silent, decode=gaussian(3.0)))
    assert "decode is" in noise.notes[0]
    assert "the floor is assumed" in noise.notes[1]


def test_where_batches_move_next_to_nothing_decode_is_the_floor() -> None:
    """As on a GPU: one prompt was computed otherwise, all others are the same bits."""

    def few(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, ROUNDING) if prompt == 5 else 0.0

    baseline = baseline_run(again=few, decode=gaussian(ROUNDING))
    noise = Noise.of(baseline)
    assert noise.notes == ()
    assert floor_of_a_logit(noise, baseline) == pytest.approx(
        floor_of_a_logit(Noise.of(baseline_run()), baseline_run()), rel=0.3
    )


def test_a_baseline_that_was_decoded_again_has_a_floor_without_scores() -> None:
    baseline = replace(baseline_run(), scores=None)
    noise = Noise.of(baseline)
    assert list(noise.sources) == ["alone", "in pairs, backwards"]
    assert noise.is_measured


def test_a_baseline_that_was_asked_once_has_no_floor() -> None:
    assert not Noise.of(replace(baseline_run(again=None), scores=None)).is_measured


def test_one_token_that_took_another_expert_moves_the_floor_of_its_prompt_little() -> None:
    def flips(random: Random, prompt: int, token: int, entry: int) -> float:
        return random.gauss(0.0, 0.5 if (prompt, token) == (3, 4) else ROUNDING)

    plain, flipped = Noise.of(baseline_run()), Noise.of(baseline_run(again=flips))
    difference = math.fsum(flipped.floors[3]) - math.fsum(plain.floors[3])
    assert 0 < difference / 30 < math.log(1.3)
