"""The statistics, on runs made by hand."""

import math
from dataclasses import replace

import pytest

from isomoe.errors import ConfigError
from isomoe.parity import Recording, Tolerance, Verdict, compare
from isomoe.parity.compare import Deltas, Output, common_prefix

LIMITS = Tolerance(mean=0.01, most=0.1)
OTHER = 99
"""A token that is every place's second candidate."""


def output(*tokens: int, logprob: float = -0.5, second: float = -1.5) -> Output:
    return Output(
        token_ids=tokens,
        logprobs=(logprob,) * len(tokens),
        tops=tuple(((token, logprob), (OTHER, second)) for token in tokens),
    )


def run(*outputs: Output, scores: tuple[tuple[float, ...], ...] | None = None) -> Recording:
    given = tuple(each.logprobs for each in outputs) if scores is None else scores
    return Recording(name="run", outputs=outputs, scores=given)


BASE = run(output(1, 2, 3), output(4, 5))


@pytest.mark.parametrize(
    ("ones", "others", "shared"),
    [((1, 2, 3), (1, 2, 3), 3), ((1, 2, 3), (1, 9, 3), 1), ((1,), (2,), 0), ((1, 2), (1, 2, 3), 2)],
)
def test_common_prefix_ends_at_the_first_difference(
    ones: tuple[int, ...], others: tuple[int, ...], shared: int
) -> None:
    assert common_prefix(ones, others) == shared


def test_the_same_bits_are_identical_and_all_tokens_are_counted() -> None:
    row = compare(BASE, BASE, LIMITS)
    assert row.verdict is Verdict.IDENTICAL
    assert (row.free.tokens, row.forced.tokens, row.num_tokens, row.common_tokens) == (5, 5, 5, 5)
    assert row.same_prompts == 2


def test_a_last_bit_agrees_but_is_not_identical() -> None:
    off = math.nextafter(-0.5, 0.0)
    row = compare(BASE, run(*BASE.outputs, scores=((-0.5, off, -0.5), (-0.5, -0.5))), LIMITS)
    assert row.verdict is Verdict.AGREES
    assert row.forced.most > 0.0
    assert row.free.most == 0.0


def test_the_mean_is_over_tokens_not_over_prompts() -> None:
    row = compare(BASE, run(*BASE.outputs, scores=((-0.5, -0.5, -0.5), (-0.55, -0.5))), LIMITS)
    assert row.forced.mean == pytest.approx(0.05 / 5)
    assert row.prompts[1].forced.mean == pytest.approx(0.05 / 2)


@pytest.mark.parametrize(("delta", "verdict"), [(0.009, "agrees"), (0.011, "differs")])
def test_the_mean_limit_is_kept(delta: float, verdict: str) -> None:
    scores = tuple(tuple(x - delta for x in each) for each in BASE.scores)
    assert compare(BASE, run(*BASE.outputs, scores=scores), LIMITS).verdict == verdict


def test_one_token_beyond_the_limit_is_a_difference() -> None:
    limits = Tolerance(mean=1.0, most=0.1)
    row = compare(BASE, run(*BASE.outputs, scores=((-0.5, -0.7, -0.5), (-0.5, -0.5))), limits)
    assert row.verdict is Verdict.DIFFERS
    assert "max |delta| 0.2 is above 0.1" in row.reasons[0]


def test_a_factor_on_every_logprob_is_a_difference_though_the_tokens_are_the_same() -> None:
    doubled = run(output(1, 2, 3, logprob=-1.0), output(4, 5, logprob=-1.0))
    row = compare(BASE, doubled, LIMITS)
    assert row.verdict is Verdict.DIFFERS
    assert row.same_prompts == 2
    assert row.forced.mean == pytest.approx(0.5)


def test_a_near_tie_is_reported_and_is_no_difference() -> None:
    ours = run(output(1, 2, 3, second=-0.52))
    theirs = run(
        Output(
            token_ids=(1, OTHER, 7),
            logprobs=(-0.5, -0.5, -9.0),
            tops=(((1, -0.5),), ((OTHER, -0.5), (2, -0.52)), ((7, -9.0),)),
        ),
        scores=ours.scores,
    )
    row = compare(ours, theirs, LIMITS)
    assert row.verdict is Verdict.AGREES
    assert row.notes == ("1 prompt part in a near tie",)
    assert (row.common_tokens, row.free.tokens, row.forced.tokens) == (1, 1, 3)
    parting = row.prompts[0].first_difference
    assert parting is not None
    assert (parting.place, parting.baseline.token_id, parting.other.token_id) == (1, 2, OTHER)
    assert (parting.baseline.baseline, parting.baseline.other) == (-0.5, -0.52)
    assert (parting.other.baseline, parting.other.other) == (-0.52, -0.5)


def test_a_token_chosen_against_the_baseline_is_a_difference_though_prefills_agree() -> None:
    theirs = run(output(1, 8, 3), *BASE.outputs[1:], scores=BASE.scores)
    row = compare(BASE, theirs, LIMITS)
    assert row.verdict is Verdict.DIFFERS
    assert row.reasons == ("1 prompt part where neither run is torn",)


def test_decode_that_drifts_is_a_difference_though_prefills_agree() -> None:
    theirs = run(output(1, 2, 3, logprob=-0.9), *BASE.outputs[1:], scores=BASE.scores)
    assert compare(BASE, theirs, LIMITS).verdict is Verdict.DIFFERS


def test_an_output_that_ends_early_parts_at_its_end() -> None:
    row = compare(BASE, run(output(1, 2), output(4, 5), scores=BASE.scores), LIMITS)
    parting = row.prompts[0].first_difference
    assert parting is not None
    assert (parting.place, parting.other.token_id) == (2, None)
    assert row.verdict is Verdict.DIFFERS


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["forced", "free", "both sides"])
def test_what_is_not_finite_is_a_difference(wrong: float, where: str) -> None:
    bad = ((-0.5, wrong, -0.5), (-0.5, -0.5))
    broken = replace(BASE.outputs[0], logprobs=(wrong, -0.5, -0.5))
    ours, theirs = BASE, run(*BASE.outputs, scores=bad)
    if where == "free":
        theirs = run(broken, BASE.outputs[1], scores=BASE.scores)
    if where == "both sides":
        ours = theirs
    row = compare(ours, theirs, LIMITS)
    assert row.verdict is Verdict.DIFFERS
    assert any("not finite" in reason for reason in row.reasons)


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (run(), run(), "nothing was compared"),
        (BASE, run(BASE.outputs[0]), "outputs of 1 of 2 prompts"),
        (BASE, run(*BASE.outputs, scores=BASE.scores[:1]), "scores of 1 of 2 prompts"),
        (
            BASE,
            run(*BASE.outputs, scores=((-0.5, -0.5), (-0.5, -0.5))),
            "prompt 0: 2 of 3 tokens scored",
        ),
        (run(output()), run(output()), "baseline: prompt 0: no output token"),
        (BASE, Recording(name="dead", error="rank 1 was killed"), "rank 1 was killed"),
        (
            BASE,
            run(replace(BASE.outputs[0], logprobs=(-0.5,)), BASE.outputs[1], scores=BASE.scores),
            "prompt 0: not every output token has a log-probability",
        ),
    ],
)
def test_a_gap_is_a_difference(ours: Recording, theirs: Recording, reason: str) -> None:
    row = compare(ours, theirs, LIMITS)
    assert row.verdict is Verdict.DIFFERS
    assert row.reasons == (reason,)
    assert row.forced.tokens == 0


def test_no_token_has_no_delta() -> None:
    nothing = Deltas.of((), ())
    assert math.isnan(nothing.mean)
    assert not nothing.within(Tolerance(mean=1e9, most=1e9))


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_limit_must_be_a_number(wrong: float) -> None:
    with pytest.raises(ConfigError, match="--max-delta"):
        Tolerance(mean=0.1, most=wrong)
