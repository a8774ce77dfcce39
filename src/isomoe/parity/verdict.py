"""Whether a target is told apart from the baseline's noise floor. Pure."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from isomoe.parity.compare import Comparison, Summary, compare
from isomoe.parity.evidence import (
    FEWEST_PROMPTS,
    SHIFT_MARGIN,
    Half,
    Kind,
    Part,
    Sample,
    Test,
    bias,
    one_prompt,
    outliers,
    partings,
    samples,
    scale,
    shift,
)
from isomoe.parity.noise import Noise, not_finite
from isomoe.parity.thresholds import Thresholds

MARGIN = 2.0
"""Times the floor. Between layouts and engines, honest rounding was 0.7 to 1.3 times the rounding
between batch compositions: docs/parity.md."""
KNOWN_GOOD_MARGIN = 1.25
"""Times what a known-good target has, which has shown how much another layout rounds."""
MOST_TESTS = 13
"""On two halves, four kinds on all prompts and two on those sent one at a time; and partings."""
FAR_OFF = (2, 5, 10, 100, 1000)
"""Times as far off, tried on few prompts: which of them would have been told apart."""
LITTLE = 0.5
"""The share of the tokens below which what the free halves have in common is said to be little."""


Halves = Mapping[Half, Sequence[Sample]]
"""What is compared, teacher-forced and free-running."""


class Verdict(StrEnum):
    """What is concluded of a target.

    IDENTICAL: same tokens, and every log-probability the same bits. AGREES: not told apart from the
    noise floor. DIFFERS: told apart. NOT_COMPARED: a fault, or too little that could be compared.
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
    why_not = comparison.fault or not_finite(comparison.baseline)
    if why_not is not None:
        return Judgement(verdict=Verdict.NOT_COMPARED, reasons=(why_not,))
    if comparison.is_identical:
        return Judgement(
            verdict=Verdict.IDENTICAL, reasons=("every token and log-probability is the same bits",)
        )
    broken = not_finite(comparison.other)
    if broken is not None:
        return Judgement(verdict=Verdict.DIFFERS, reasons=(broken,))
    halves = {half: samples(comparison, noise, half) for half in Half}
    if not any(halves.values()):
        return Judgement(verdict=Verdict.NOT_COMPARED, reasons=(_why_nothing(comparison),))
    notes = (*noise.notes, *_notes(comparison, halves))
    if limits.are_pinned:
        return _by_limits(halves, limits, notes)
    return _by_tests(comparison, halves, noise, limits, notes)


def _by_tests(
    comparison: Comparison,
    halves: Halves,
    noise: Noise,
    limits: Thresholds,
    notes: tuple[str, ...],
) -> Judgement:
    good = [compare(comparison.baseline, run) for run in noise.known_good]

    def tried(found: Halves) -> list[Test]:
        return list(_tests(found, comparison, good, noise, limits))

    tests = tried(halves)
    telling = sorted((test for test in tests if _tells(test, limits)), key=lambda test: test.chance)
    count = max(map(len, halves.values()))
    verdict = Verdict.AGREES
    reasons: tuple[str, ...] = (_not_told(limits),)
    if telling:
        verdict = Verdict.DIFFERS
        reasons = tuple(f"{test.says} ({odds(MOST_TESTS * test.chance)})" for test in telling)
    elif not noise.is_measured:
        verdict, reasons = Verdict.NOT_COMPARED, (_NO_FLOOR,)
    elif count < FEWEST_PROMPTS:
        times = _would_tell(halves, tried, limits)
        few = f"{count} different prompt{'s' if count > 1 else ''}"
        if times is None:
            verdict = Verdict.NOT_COMPARED
            reasons = (f"{few}, too few tokens: nothing would have been told, however far off",)
        else:
            notes += (
                f"{few}: what is {times} times as far off would have been told; {FEWEST_PROMPTS} "
                "or more would show small differences",
            )
    return Judgement(
        verdict=verdict,
        reasons=reasons,
        effect=next((test.effect for test in tests if test.kind is Kind.SCALE), None),
        bias=bias(halves[Half.FORCED] or halves[Half.FREE]) if noise.is_measured else None,
        chance=min(1.0, MOST_TESTS * min(test.chance for test in tests)) if tests else None,
        tests=tuple(tests),
        notes=(*notes, *_wide(good, noise, limits)),
    )


_NO_FLOOR = "no noise floor: the baseline was asked once; --floor TARGET would measure it"


def _not_told(limits: Thresholds) -> str:
    return f"not told apart from the noise floor at a false-alarm rate of {limits.false_alarm:g}"


def _tells(test: Test, limits: Thresholds) -> bool:
    return MOST_TESTS * test.chance < limits.false_alarm


def _would_tell(
    halves: Halves, tried: Callable[[Halves], list[Test]], limits: Thresholds
) -> int | None:
    """How many times as far off the target would be told apart; None if it never would."""
    for times in FAR_OFF:
        farther = {
            half: [
                replace(one, floors=tuple(floor - math.log(times) for floor in one.floors))
                for one in found
            ]
            for half, found in halves.items()
        }
        if any(_tells(test, limits) for test in tried(farther)):
            return times
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What honest rounding may look like in one half.

    Attributes:
        margin: times the floor.
        steady: standard deviations of a prompt by which it may shift.
    """

    margin: float
    steady: float

    @classmethod
    def of(
        cls,
        known_good: Sequence[Sequence[Sample]],
        half: Half,
        noise: Noise,
        limits: Thresholds,
    ) -> "Allowed":
        """By what known-good targets have in that half, where there are any that speak of it."""
        sizes = [scale(found, half, 1.0) for found in known_good]
        moves = [shift(found, half, noise.unit) for found in known_good]
        times = [size.effect for size in sizes if size is not None]
        steady = [move.effect for move in moves if move is not None and move.chance < 0.01]
        margin = KNOWN_GOOD_MARGIN * max(1.0, *times) if times else MARGIN
        return cls(margin=limits.margin or margin, steady=max(SHIFT_MARGIN, *steady, 0.0))


def _tests(
    halves: Halves,
    comparison: Comparison,
    good: Sequence[Comparison],
    noise: Noise,
    limits: Thresholds,
) -> Iterator[Test]:
    for half, found in halves.items():
        known = [samples(one, noise, half) for one in good]
        yield from _tests_of_all(found, half, noise, Allowed.of(known, half, noise, limits))
        if alone := _alone(found, comparison):
            known += [_alone(one, comparison) for one in known]
            allowed = Allowed.of(known, half, noise, limits)
            yield from _tests_of_alone(alone, half, noise, allowed)


def _tests_of_all(
    found: Sequence[Sample], half: Half, noise: Noise, allowed: Allowed
) -> Iterable[Test]:
    tests = [shift(found, half, noise.unit, allowed.steady)]
    if noise.is_measured:
        tests += [
            scale(found, half, allowed.margin),
            outliers(found, half, allowed.margin),
            one_prompt(found, half, allowed.margin),
            # Known-good targets say how much is rounded, not where the model hesitates.
            partings(found, half, max(MARGIN, allowed.margin)),
        ]
    return (test for test in tests if test is not None)


def _tests_of_alone(
    found: Sequence[Sample], half: Half, noise: Noise, allowed: Allowed
) -> Iterable[Test]:
    """What a defect of small steps does to few prompts is little beside all of them."""
    tests = [shift(found, half, noise.unit, allowed.steady, Part.ALONE)]
    if noise.is_measured:
        tests.append(scale(found, half, allowed.margin, Part.ALONE))
    return (test for test in tests if test is not None)


def _alone(found: Sequence[Sample], comparison: Comparison) -> list[Sample]:
    """Those of prompts that were sent one at a time; none if all were."""
    count = len(comparison.prompts)
    first = count - (comparison.other.alone or 0)
    return [one for one in found if one.prompt >= first] if first > 0 else []


def _wide(good: Sequence[Comparison], noise: Noise, limits: Thresholds) -> Iterable[str]:
    """Which known-good targets widen the margin."""
    for half in Half if limits.margin is None else ():
        margin = Allowed.of([samples(one, noise, half) for one in good], half, noise, limits).margin
        if margin > MARGIN:
            yield (
                f"a known-good target is {margin / KNOWN_GOOD_MARGIN:.2g} times the noise floor "
                f"({half}), so that only {margin:.2g} times it counts as different"
            )


def _notes(comparison: Comparison, halves: Halves) -> Iterable[str]:
    if not halves[Half.FORCED]:
        yield "free-running only: nothing is compared after the first difference of a prompt"
    elif not halves[Half.FREE]:
        yield "teacher-forced only: of no decoded token do both tell a log-probability"
    total = sum(prompt.num_tokens for prompt in comparison.prompts)
    if comparison.common_tokens < LITTLE * total:
        yield (
            f"free-running, {comparison.common_tokens} of {total} tokens could be compared: "
            "outputs part, or end, early"
        )


def _by_limits(halves: Halves, limits: Thresholds, notes: tuple[str, ...]) -> Judgement:
    reasons = []
    for half, found in halves.items():
        values = []
        if limits.mean is not None:
            summary = Summary.of(delta for one in found for delta in one.deltas)
            values.append(("mean", summary.mean, limits.mean))
        if limits.max is not None:
            values.append(("max", max((one.most for one in found), default=math.nan), limits.max))
        reasons += [
            f"{half} {name} |delta logprob| is {value:.3g} nats, above the pinned {limit:g}"
            for name, value, limit in values
            if value > limit
        ]
    if reasons:
        return Judgement(verdict=Verdict.DIFFERS, reasons=tuple(reasons), notes=notes)
    return Judgement(verdict=Verdict.AGREES, reasons=("within the pinned limits",), notes=notes)


def _why_nothing(comparison: Comparison) -> str:
    if comparison.baseline.gives_logprobs and comparison.other.gives_logprobs:
        return "no tokens to compare: no output begins with the baseline's token"
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
