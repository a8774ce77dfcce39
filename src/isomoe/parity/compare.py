"""What two recorded runs say of one another. Pure: no engine, no torch.

Two comparisons, since each sees what the other cannot:

- free: both decode greedily. Their log-probabilities are compared up to the first token in which
  they differ, for what follows answers another text.
- forced: both score the baseline's tokens, prompt and output in one prefill, so that a first
  difference ends nothing. The baseline's own scores come from such a prefill too: prefill is
  compared with prefill, and decode with decode.

Everything that was recorded is counted. Nothing compared, a count that does not match, and a
log-probability that is not finite are differences.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from isomoe.errors import ConfigError

Ids = tuple[int, ...]


class Verdict(StrEnum):
    """IDENTICAL: same tokens, and every log-probability the same bits. AGREES: within tolerance."""

    IDENTICAL = "identical"
    AGREES = "agrees"
    DIFFERS = "differs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The most that |delta logprob| may be, in nats.

    Attributes:
        mean: over all tokens.
        most: of any one token.

    Raises:
        ConfigError: if one is negative or not finite.
    """

    mean: float
    most: float

    def __post_init__(self) -> None:
        for flag, value in (("--max-mean-delta", self.mean), ("--max-delta", self.most)):
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"{flag} {value}: must be at least 0 and finite")


TOLERANCES = {
    "bfloat16": Tolerance(mean=0.04, most=1.0),
    "float32": Tolerance(mean=1e-4, most=1e-2),
}
"""By the model's dtype; they hold for the teacher-forced and for the decoded deltas.

Teacher-forced mean / max, on CPUs with torch 2.13. Clean is the worst of tp2,dp2, tp2,dp2,ep2 and
tp4,dp2,ep4 against tp2; mildest is the planted defect with the least effect (of double-reduce,
double-reduce-attention, uncompensated-scale, scale-twice, missing-reduce, last-reduce-lost,
one-axis-of-two and ragged-offsets in tp4,dp2,ep2; in float32 of double-reduce alone):

    bfloat16, bundled, shipped questions     clean 0.0004 / 0.004 double-reduce 0.78 / 2.43
    bfloat16, random weights and prompts     clean 0.008 / 0.25   mildest 0.167 / 0.594
    float32, random weights and prompts      clean 4e-7 / 2e-6    mildest 0.501 / 1.35

In bfloat16 neither limit alone finds every defect; the two together do, with a factor of 4 on
either side. The maximum leaves room for a token whose experts a last bit chooses: the report
behind SGLang #23731 has 0.28 at most after its fix.

They are no promise for prompts far from what a model was trained on: with random prompts an earlier
bundled checkpoint had places where bfloat16 rounding alone cost 19 nats (mean 0.04), and 0.001 in
float32.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A greedy continuation of one prompt.

    Attributes:
        token_ids: the token that ended it is included.
        logprobs: one for each token.
        tops: for each token, the likeliest candidates in its place: (token id, logprob).
    """

    token_ids: Ids
    logprobs: tuple[float, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]

    def logprob_of(self, token_id: int | None, place: int) -> float | None:
        """What a candidate got in a place; None if it is not among those recorded."""
        if place >= len(self.token_ids):
            return None
        if self.token_ids[place] == token_id:
            return self.logprobs[place]
        return dict(self.tops[place]).get(token_id) if token_id is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one target gave.

    Attributes:
        name: the target's.
        outputs: one for each prompt.
        scores: for each prompt, the log-probabilities of the baseline's output tokens, scored in
            one prefill of prompt and output.
        seconds: wall time, of the start, the decode and the scoring.
        notes: what a reader of the row should know.
        error: why the recording is incomplete, if it is.
    """

    name: str
    outputs: tuple[Output, ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens of all prompts."""
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def mean_logprob(self) -> float:
        """Of the output tokens as they were decoded; NaN if there is none."""
        found = [logprob for output in self.outputs for logprob in output.logprobs]
        return math.fsum(found) / len(found) if found else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Deltas:
    """|delta logprob| over some tokens, in nats. NaN if any of them is not finite, or none is."""

    tokens: int
    mean: float
    most: float

    @classmethod
    def of(cls, ones: Iterable[float], others: Iterable[float]) -> "Deltas":
        """Of two lists of the same length."""
        found = [abs(one - other) for one, other in zip(ones, others, strict=True)]
        if not found or not all(map(math.isfinite, found)):
            return cls(tokens=len(found), mean=math.nan, most=math.nan)
        return cls(tokens=len(found), mean=math.fsum(found) / len(found), most=max(found))

    def within(self, tolerance: Tolerance) -> bool:
        """Whether both hold; NaN does not."""
        return self.mean <= tolerance.mean and self.most <= tolerance.most


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A token that one of two runs chose, with the logprob that each gave it (None: not known)."""

    token_id: int | None
    baseline: float | None
    other: float | None

    @property
    def delta(self) -> float:
        """|delta logprob|; infinite where a run had it below its recorded candidates."""
        if self.baseline is None or self.other is None:
            return math.inf
        return abs(self.baseline - self.other)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """Where two greedy outputs part.

    Attributes:
        place: index of the output token.
        baseline: what the baseline chose; its token is None if it had ended.
        other: what the other chose.
    """

    place: int
    baseline: Candidate
    other: Candidate

    def is_near_tie(self, tolerance: Tolerance) -> bool:
        """Whether both runs give both candidates the same logprob, up to the tolerance."""
        return max(self.baseline.delta, self.other.delta) <= tolerance.most


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptComparison:
    """Two runs on one prompt.

    Attributes:
        num_tokens: of the baseline's output.
        common_prefix: tokens until the first difference.
        free: over the common prefix.
        forced: over all of the baseline's tokens.
        first_difference: None if the tokens are the same.
        is_identical: whether tokens and log-probabilities are the same bits.
    """

    num_tokens: int
    common_prefix: int
    free: Deltas
    forced: Deltas
    first_difference: FirstDifference | None
    is_identical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A row of the table: one run against the baseline.

    Attributes:
        num_prompts: the baseline's.
        num_tokens: the baseline's output tokens.
        prompts: one for each prompt; none if the recording was incomplete.
        free: over the common prefixes of all prompts.
        forced: over all of the baseline's tokens.
        reasons: why it differs; empty if it does not.
    """

    name: str
    verdict: Verdict
    reasons: tuple[str, ...]
    num_prompts: int
    num_tokens: int
    prompts: tuple[PromptComparison, ...]
    free: Deltas
    forced: Deltas
    notes: tuple[str, ...]
    seconds: float

    @property
    def common_tokens(self) -> int:
        """Tokens before the first difference of their prompt."""
        return sum(prompt.common_prefix for prompt in self.prompts)

    @property
    def same_prompts(self) -> int:
        """Prompts whose tokens are all the same."""
        return sum(prompt.first_difference is None for prompt in self.prompts)


def compare(baseline: Recording, other: Recording, tolerance: Tolerance) -> Comparison:
    """The verdict on `other`.

    It differs if the forced deltas exceed the tolerance, if the free ones do, or if a token
    differs where the two runs do not see a near tie. A token that differs in a near tie alone is
    no difference: it is reported as a note. (The free half is needed: a defect that only decode
    has leaves no trace in a prefill.)
    """
    reasons = list(_faults(baseline, other))
    prompts: tuple[PromptComparison, ...] = ()
    nothing = Deltas.of((), ())
    free = forced = nothing
    notes = list(other.notes)
    if not reasons:
        prompts = tuple(
            _compare_prompt(*each)
            for each in zip(
                baseline.outputs, other.outputs, baseline.scores, other.scores, strict=True
            )
        )
        ones = [
            logprob
            for output, prompt in zip(baseline.outputs, prompts, strict=True)
            for logprob in output.logprobs[: prompt.common_prefix]
        ]
        others = [
            logprob
            for output, prompt in zip(other.outputs, prompts, strict=True)
            for logprob in output.logprobs[: prompt.common_prefix]
        ]
        free = Deltas.of(ones, others)
        forced = Deltas.of(_joined(baseline.scores), _joined(other.scores))
        reasons += _over("teacher-forced", forced, tolerance)
        if free.tokens:
            reasons += _over("decoded", free, tolerance)
        parted = [p.first_difference for p in prompts if p.first_difference is not None]
        ties = sum(difference.is_near_tie(tolerance) for difference in parted)
        if ties < len(parted):
            reasons.append(f"{_count(len(parted) - ties, 'prompt')} part where neither run is torn")
        if ties:
            notes.append(f"{_count(ties, 'prompt')} part in a near tie")
    if reasons:
        verdict = Verdict.DIFFERS
    elif all(prompt.is_identical for prompt in prompts):
        verdict = Verdict.IDENTICAL
    else:
        verdict = Verdict.AGREES
    return Comparison(
        name=other.name,
        verdict=verdict,
        reasons=tuple(reasons),
        num_prompts=len(baseline.outputs),
        num_tokens=baseline.num_tokens,
        prompts=prompts,
        free=free,
        forced=forced,
        notes=tuple(notes),
        seconds=other.seconds,
    )


def common_prefix(ones: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences share before they first differ."""
    for place, (one, other) in enumerate(zip(ones, others, strict=False)):
        if one != other:
            return place
    return min(len(ones), len(others))


def _compare_prompt(
    ours: Output, theirs: Output, scores: tuple[float, ...], other_scores: tuple[float, ...]
) -> PromptComparison:
    shared = common_prefix(ours.token_ids, theirs.token_ids)
    same = ours.token_ids == theirs.token_ids
    return PromptComparison(
        num_tokens=len(ours.token_ids),
        common_prefix=shared,
        free=Deltas.of(ours.logprobs[:shared], theirs.logprobs[:shared]),
        forced=Deltas.of(scores, other_scores),
        first_difference=None if same else _parting(ours, theirs, shared),
        is_identical=same and ours.logprobs == theirs.logprobs and scores == other_scores,
    )


def _parting(ours: Output, theirs: Output, place: int) -> FirstDifference:
    def candidate(output: Output) -> Candidate:
        token = output.token_ids[place] if place < len(output.token_ids) else None
        return Candidate(
            token_id=token,
            baseline=ours.logprob_of(token, place),
            other=theirs.logprob_of(token, place),
        )

    return FirstDifference(place=place, baseline=candidate(ours), other=candidate(theirs))


def _faults(baseline: Recording, other: Recording) -> Iterable[str]:
    """What forbids a comparison."""
    for recording in (baseline, other):
        who = "" if recording is other else "baseline: "
        if recording.error is not None:
            yield f"{who}{recording.error}"
            return
        for what, found in (("outputs", recording.outputs), ("scores", recording.scores)):
            if len(found) != len(baseline.outputs):
                yield f"{who}{what} of {len(found)} of {len(baseline.outputs)} prompts"
                return
        for index, output in enumerate(recording.outputs):
            wanted = len(baseline.outputs[index].token_ids)
            scored = len(recording.scores[index])
            if scored != wanted:
                yield f"{who}prompt {index}: {scored} of {wanted} tokens scored"
                return
            if not len(output.token_ids) == len(output.logprobs) == len(output.tops):
                yield f"{who}prompt {index}: not every output token has a log-probability"
                return
            if not output.token_ids:
                yield f"{who}prompt {index}: no output token"
                return
    if not baseline.outputs:
        yield "nothing was compared"


def _over(what: str, deltas: Deltas, tolerance: Tolerance) -> Iterable[str]:
    if math.isnan(deltas.mean):
        yield f"{what}: a log-probability is not finite"
        return
    for name, value, limit in (
        ("mean", deltas.mean, tolerance.mean),
        ("max", deltas.most, tolerance.most),
    ):
        if value > limit:
            yield f"{what}: {name} |delta| {value:.3g} is above {limit:g}"


def _joined(scores: Sequence[Sequence[float]]) -> list[float]:
    return [score for each in scores for score in each]


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
