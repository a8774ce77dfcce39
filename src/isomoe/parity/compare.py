"""What two runs say of one another, token by token. Pure: no engine, no torch, no judgement.

Two comparisons, since each sees what the other cannot:

- free: both decode greedily. Log-probabilities are compared up to the first token in which they
  differ, for what follows answers another text.
- forced: both score the baseline's tokens, in one prefill of prompt and output, so that a first
  difference ends nothing. Prefill is compared with prefill, and decode with decode.

Everything that was recorded is counted. Nothing compared, a count that does not match, and a
log-probability that is not finite are faults, which `verdict` never takes for agreement.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isomoe.parity.run import Candidate, Place, Run, Text


class TokenDelta(NamedTuple):
    """One of the baseline's tokens, as both runs score it.

    Attributes:
        delta: the other's log-probability less the baseline's, in nats.
        rank: the other's rank of the token, from 1; None if not known.
        kl: of the baseline's candidates from the other's, in nats; None if either tells none.
        is_first: whether the other ranks it first; None if not known.
    """

    delta: float
    rank: int | None = None
    kl: float | None = None
    is_first: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """|delta logprob| over some tokens, in nats. NaN if any of them is not finite, or none is.

    Attributes:
        bias: the mean of the signed deltas.
    """

    tokens: int
    mean: float
    median: float
    p99: float
    most: float
    bias: float

    @classmethod
    def of(cls, deltas: Iterable[float]) -> "Summary":
        """Of signed deltas."""
        signed = list(deltas)
        if not signed or not all(map(math.isfinite, signed)):
            nan = math.nan
            return cls(tokens=len(signed), mean=nan, median=nan, p99=nan, most=nan, bias=nan)
        found = sorted(map(abs, signed))
        return cls(
            tokens=len(found),
            mean=math.fsum(found) / len(found),
            median=quantile(found, 0.5),
            p99=quantile(found, 0.99),
            most=found[-1],
            bias=math.fsum(signed) / len(signed),
        )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ordered values that at least `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """Where two greedy outputs part.

    Attributes:
        place: index of the output token.
        baseline, other: what each chose; None if it had ended.
        baseline_of_other: the baseline's log-probability of the other's choice; None if not known.
        other_of_baseline: the other's, of the baseline's choice.
    """

    place: int
    baseline: Candidate | None
    other: Candidate | None
    baseline_of_other: float | None
    other_of_baseline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptComparison:
    """Two runs on one prompt.

    Attributes:
        num_tokens: of the baseline's output.
        common_prefix: tokens until the first difference.
        free: signed deltas over the common prefix; empty where a run tells no log-probability.
        forced: over all of the baseline's tokens; None where the other cannot score them.
        first_difference: None if the tokens are the same.
        is_identical: whether tokens and log-probabilities are the same bits.
    """

    num_tokens: int
    common_prefix: int
    free: tuple[float, ...]
    forced: tuple[TokenDelta, ...] | None
    first_difference: FirstDifference | None
    is_identical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run against the baseline.

    Attributes:
        fault: why nothing can be concluded; None if something can.
        prompts: one for each prompt; none where there is a fault.
        free: over the common prefixes of all prompts.
        forced: over all of the baseline's tokens; None if the other cannot score them.
        kl: the mean over tokens; None if not known.
        top1: the share of the baseline's tokens that the other ranks first; None if not known.
    """

    baseline: Run
    other: Run
    fault: str | None
    prompts: tuple[PromptComparison, ...]
    free: Summary
    forced: Summary | None
    kl: float | None
    top1: float | None

    @property
    def common_tokens(self) -> int:
        """Tokens before the first difference of their prompt."""
        return sum(prompt.common_prefix for prompt in self.prompts)

    @property
    def same_prompts(self) -> int:
        """Prompts whose tokens are all the same."""
        return sum(prompt.first_difference is None for prompt in self.prompts)

    @property
    def is_identical(self) -> bool:
        """Whether everything that was compared is the same bits; not where nothing was."""
        return bool(self.prompts) and all(prompt.is_identical for prompt in self.prompts)


def compare(baseline: Run, other: Run) -> Comparison:
    """Puts two runs side by side."""
    fault = fault_of(baseline, other)
    prompts: tuple[PromptComparison, ...] = ()
    if fault is None:
        prompts = tuple(
            _compare_prompt(baseline, other, index) for index in range(len(baseline.outputs))
        )
    forced = [token for prompt in prompts for token in prompt.forced or ()]
    is_forced = bool(prompts) and all(prompt.forced is not None for prompt in prompts)
    divergences = [token.kl for token in forced if token.kl is not None]
    firsts = [token.is_first for token in forced if token.is_first is not None]
    return Comparison(
        baseline=baseline,
        other=other,
        fault=fault,
        prompts=prompts,
        free=Summary.of(delta for prompt in prompts for delta in prompt.free),
        forced=Summary.of(token.delta for token in forced) if is_forced else None,
        kl=math.fsum(divergences) / len(divergences) if divergences else None,
        top1=sum(firsts) / len(firsts) if firsts else None,
    )


def fault_of(baseline: Run, other: Run) -> str | None:
    """Why a comparison would be worth nothing; None if it is worth something."""
    return next(iter(_faults(baseline, other)), None)


def _faults(baseline: Run, other: Run) -> Iterable[str]:
    if not baseline.outputs:
        yield f"{baseline.name}: nothing to compare"
    count = len(baseline.outputs)
    for run in (baseline, other):
        if run.error is not None:
            yield run.error
            return
        if len(run.outputs) != count:
            yield f"{run.name}: outputs of {len(run.outputs)} of {count} prompts"
            return
        if run.scores is not None and len(run.scores) != count:
            yield f"{run.name}: scores of {len(run.scores)} of {count} prompts"
            return
        for index, output in enumerate(run.outputs):
            if not output:
                yield f"{run.name}: prompt {index}: no output token"
                return
    for index, wanted in enumerate(baseline.outputs):
        for run in (baseline, other):
            if run.scores is None:
                continue
            scored = run.scores[index]
            if len(scored) != len(wanted):
                yield (f"{run.name}: prompt {index}: {len(scored)} of {len(wanted)} tokens scored")
                return
            if not all(s.token.is_token_of(w.token) for s, w in zip(scored, wanted, strict=True)):
                yield f"{run.name}: prompt {index}: scored other tokens than the baseline's"
                return


def common_prefix(ones: Text, others: Text) -> int:
    """How many tokens two outputs share before they first differ."""
    for place, (one, other) in enumerate(zip(ones, others, strict=False)):
        if not one.token.is_token_of(other.token):
            return place
    return min(len(ones), len(others))


def divergence(ours: Place, theirs: Place) -> float | None:
    """KL of our distribution from theirs, in nats, as far as the candidates tell.

    Candidates that both list count one by one; all others are one candidate more, which has what
    is left of the probability. That is a lower bound of the true divergence.
    """
    if not ours.top or not theirs.top:
        return None
    pairs = [
        (mine.logprob, their)
        for mine in ours.top
        if (their := theirs.logprob_of(mine)) is not None and math.isfinite(mine.logprob)
    ]
    if not pairs:
        return None
    total = math.fsum(math.exp(p) * (p - q) for p, q in pairs)
    rest_p = 1.0 - math.fsum(math.exp(p) for p, _ in pairs)
    rest_q = 1.0 - math.fsum(math.exp(q) for _, q in pairs)
    if rest_p > _ROUNDING and rest_q > _ROUNDING:
        total += rest_p * (math.log(rest_p) - math.log(rest_q))
    return max(0.0, total)


_ROUNDING = 1e-6
"""What is left of 1 less a sum of probabilities that were rounded to fp32 is no probability."""


def _compare_prompt(baseline: Run, other: Run, index: int) -> PromptComparison:
    ours, theirs = baseline.outputs[index], other.outputs[index]
    shared = common_prefix(ours, theirs)
    gives = baseline.gives_logprobs and other.gives_logprobs
    free = tuple(
        theirs[place].logprob - ours[place].logprob for place in range(shared if gives else 0)
    )
    same = shared == len(ours) == len(theirs)
    forced = None
    if baseline.scores is not None and other.scores is not None:
        forced = tuple(
            TokenDelta(
                delta=their.logprob - our.logprob,
                rank=their.rank,
                kl=divergence(our, their),
                is_first=_is_first(their),
            )
            for our, their in zip(baseline.scores[index], other.scores[index], strict=True)
        )
    return PromptComparison(
        num_tokens=len(ours),
        common_prefix=shared,
        free=free,
        forced=forced,
        first_difference=None if same else _parting(ours, theirs, shared),
        is_identical=same
        and len(free) == shared
        and not any(free)
        and forced is not None
        and all(token.delta == 0.0 for token in forced),
    )


def _is_first(place: Place) -> bool | None:
    """Whether the token is ranked first; a token that is not among the candidates is not."""
    if place.rank is not None:
        return place.rank == 1
    return place.top[0].is_token_of(place.token) if place.top else None


def _parting(ours: Text, theirs: Text, place: int) -> FirstDifference:
    mine = ours[place] if place < len(ours) else None
    their = theirs[place] if place < len(theirs) else None
    both = mine is not None and their is not None
    return FirstDifference(
        place=place,
        baseline=mine and mine.token,
        other=their and their.token,
        baseline_of_other=mine.logprob_of(their.token) if both else None,  # type: ignore[union-attr]
        other_of_baseline=their.logprob_of(mine.token) if both else None,  # type: ignore[union-attr]
    )
