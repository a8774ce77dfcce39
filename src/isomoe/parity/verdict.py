"""Whether a target is told apart from the baseline's noise floor. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from isomoe.parity.compare import Comparison, Summary, compare
from isomoe.parity.evidence import (
    FEWEST_PROMPTS,
    SHIFT_MARGIN,
    Half,
    Kind,
    Sample,
    Test,
    bias,
    one_prompt,
    outliers,
    samples,
    scale,
    shift,
)
from isomoe.parity.noise import Noise
from isomoe.parity.run import Run, Text
from isomoe.parity.thresholds import Thresholds

MARGIN = 2.0
"""Times the floor. Between layouts and engines, honest rounding was 0.7 to 1.3 times the rounding
between batch compositions: docs/parity.md."""
KNOWN_GOOD_MARGIN = 1.25
"""Times what a known-good target has, which has shown how much another layout rounds."""
MOST_TESTS = 8
"""Four kinds on two halves share the false-alarm rate."""


class Verdict(StrEnum):
    """What is concluded of a target.

    IDENTICAL: same tokens, and every log-probability the same bits. AGREES: not told apart from the
    noise floor. DIFFERS: told apart. NOT_COMPARED: a fault, or nothing that could be compared.
    """

    IDENTICAL = "identical"
    AGREES = "agrees"
    DIFFERS = "differs"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on one comparison, and why.

    Attributes:
        reasons: one line each; what tells the target apart, or why nothing was compared.
        effect: how many times the noise floor the deltas are (1: none); None if not measured.
        bias: the mean signed delta in units of the noise floor; None if not measured.
        chance: how likely noise alone is to look so, of the strongest test; None if not measured.
            All tests share it: it is compared with the false-alarm rate as it stands.
        tests: what each test found.
        notes: what limits the verdict.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    effect: float | None = None
    bias: float | None = None
    chance: float | None = None
    tests: tuple[Test, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target against the baseline."""

    comparison: Comparison
    judgement: Judgement


def judge(comparison: Comparison, noise: Noise, thresholds: Thresholds | None = None) -> Judgement:
    """The verdict on one target.

    Args:
        noise: of the same baseline.
    """
    limits = thresholds or Thresholds()
    why_not = comparison.fault or _not_finite(comparison.baseline)
    if why_not is not None:
        return Judgement(verdict=Verdict.NOT_COMPARED, reasons=(why_not,))
    if comparison.is_identical:
        return Judgement(
            verdict=Verdict.IDENTICAL, reasons=("every token and log-probability is the same bits",)
        )
    broken = _not_finite(comparison.other)
    if broken is not None:
        return Judgement(verdict=Verdict.DIFFERS, reasons=(broken,))
    halves = {half: samples(comparison, noise, half) for half in Half}
    if not any(one.pairs for found in halves.values() for one in found):
        return Judgement(verdict=Verdict.NOT_COMPARED, reasons=(_texts_only(comparison),))
    if limits.are_pinned:
        return _by_limits(comparison, halves, limits)
    return _by_tests(comparison, halves, noise, limits)


def _by_tests(
    comparison: Comparison,
    halves: dict[Half, list[Sample]],
    noise: Noise,
    limits: Thresholds,
) -> Judgement:
    good = [_measures(compare(comparison.baseline, run), noise) for run in noise.known_good]
    margin = limits.margin or _margin([times for times, _ in good])
    steady = max(SHIFT_MARGIN, *(effect for _, effect in good)) if good else SHIFT_MARGIN
    tests = tuple(_tests(halves, noise, margin, steady))
    notes = tuple(_notes(comparison, halves, noise, margin))
    found = halves[Half.FORCED] or halves[Half.FREE]
    chance = min(1.0, MOST_TESTS * min((test.chance for test in tests), default=1.0))
    telling = sorted(
        (test for test in tests if MOST_TESTS * test.chance < limits.false_alarm),
        key=lambda test: test.chance,
    )
    verdict = Verdict.DIFFERS if telling else Verdict.AGREES
    if telling:
        reasons = tuple(f"{test.says} ({odds(MOST_TESTS * test.chance)})" for test in telling)
    elif noise.is_measured:
        reasons = (
            f"not told apart from the noise floor at a false-alarm rate of {limits.false_alarm:g}",
        )
    else:
        verdict = Verdict.NOT_COMPARED
        reasons = ("no noise floor: the baseline was asked once; --floor TARGET would measure it",)
    times = next((test.effect for test in tests if test.kind is Kind.SCALE), None)
    return Judgement(
        verdict=verdict,
        reasons=reasons,
        effect=times,
        bias=bias(found) if noise.is_measured else None,
        chance=chance if tests else None,
        tests=tests,
        notes=notes,
    )


def _tests(
    halves: dict[Half, list[Sample]], noise: Noise, margin: float, steady: float
) -> Iterable[Test]:
    for half, found in halves.items():
        results = [shift(found, half, noise.unit, steady)]
        if noise.is_measured:
            results += [
                scale(found, half, margin),
                outliers(found, half, margin),
                one_prompt(found, half, margin),
            ]
        yield from (test for test in results if test is not None)


def _measures(comparison: Comparison, noise: Noise) -> tuple[float, float]:
    """Of a known-good target: times the floor, and how steadily it shifts; (1, 0) if not known."""
    found = samples(comparison, noise, Half.FORCED) or samples(comparison, noise, Half.FREE)
    size = scale(found, Half.FORCED, 1.0)
    moved = shift(found, Half.FORCED, noise.unit)
    return size.effect if size else 1.0, moved.effect if moved and moved.chance < 0.01 else 0.0


def _margin(known_good: Sequence[float]) -> float:
    return KNOWN_GOOD_MARGIN * max(1.0, *known_good) if known_good else MARGIN


def _notes(
    comparison: Comparison, halves: dict[Half, list[Sample]], noise: Noise, margin: float
) -> Iterable[str]:
    yield from noise.notes
    if not halves[Half.FORCED]:
        yield "free-running only: nothing is compared after the first difference of a prompt"
    count = max(map(len, halves.values()))
    if count < FEWEST_PROMPTS:
        yield (
            f"{count} different prompt{'s' if count > 1 else ''}: only a gross difference can be "
            f"told; {FEWEST_PROMPTS} or more would show small ones"
        )
    if noise.known_good and margin > MARGIN:
        yield (
            f"a known-good target is {margin / KNOWN_GOOD_MARGIN:.2g} times the noise floor, so "
            f"that only {margin:.2g} times the floor counts as different"
        )


def _by_limits(
    comparison: Comparison, halves: dict[Half, list[Sample]], limits: Thresholds
) -> Judgement:
    reasons = []
    for half, found in halves.items():
        summary = Summary.of(delta for one in found for delta in one.deltas)
        for name, value, limit in (
            ("mean", summary.mean, limits.mean),
            ("max", summary.most, limits.max),
        ):
            if limit is not None and value > limit:
                reasons.append(
                    f"{half} {name} |delta logprob| is {value:.3g} nats, above the pinned {limit:g}"
                )
    if reasons:
        return Judgement(verdict=Verdict.DIFFERS, reasons=tuple(reasons))
    return Judgement(verdict=Verdict.AGREES, reasons=("within the pinned limits",))


def _not_finite(run: Run) -> str | None:
    """Where a run that tells log-probabilities tells one that is none; None if nowhere."""
    for what, texts in (("score", run.scores), ("decode", run.outputs)):
        logprobs = [place.logprob for text in texts or () for place in text]
        broken = sum(not math.isfinite(logprob) for logprob in logprobs)
        is_silent = what == "decode" and all(map(math.isnan, logprobs))
        if broken and not is_silent:
            prompt, token = _first_broken(texts or ())
            return (
                f"{run.name}: {broken} of {len(logprobs)} log-probabilities of its {what} are "
                f"not finite, first in prompt {prompt}, token {token}"
            )
    return None


def _first_broken(texts: Sequence[Text]) -> tuple[int, int]:
    return next(
        (prompt, token)
        for prompt, text in enumerate(texts)
        for token, place in enumerate(text)
        if not math.isfinite(place.logprob)
    )


def _texts_only(comparison: Comparison) -> str:
    total = sum(prompt.num_tokens for prompt in comparison.prompts)
    return (
        f"no log-probabilities to compare; greedy texts share {comparison.common_tokens} of "
        f"{total} tokens before their first difference, in {comparison.same_prompts} of "
        f"{len(comparison.prompts)} prompts all"
    )


def odds(chance: float) -> str:
    """A chance as a reader says it: "1 in 20,000"."""
    if chance < 1e-12:
        return "chance below 1 in 10^12"
    return f"chance 1 in {1 / chance:,.0f}" if chance < 0.1 else f"chance {chance:.2g}"
