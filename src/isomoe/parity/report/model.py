"""What a report says, before it is put into a table, a document or a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from isomoe.parity.compare import Summary
from isomoe.parity.noise import DECODE, Noise, delta_pairs
from isomoe.parity.run import Place, Run, Text
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import Row, Verdict

AGREEING = frozenset({Verdict.IDENTICAL, Verdict.AGREES})


class Bisection(Protocol):
    """Where two layouts part, as `parity.bisect` finds it; of it a report needs the JSON alone."""

    def to_json(self) -> Mapping[str, Any]:
        """With "baseline", "other", "curve", "culprit" and "sentence"."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorSource:
    """One measurement of the noise floor.

    Attributes:
        name: what was changed: a batch composition, prefill for decode, or a known-good target.
        deltas: signed, of each prompt, for each of the baseline's output tokens, in nats.
        is_counted: whether the verdict's floor rests on it; the charts draw no other.
    """

    name: str
    deltas: tuple[tuple[float, ...], ...]
    is_counted: bool

    @property
    def summary(self) -> Summary:
        """Over all tokens."""
        return Summary.of(delta for prompt in self.deltas for delta in prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was compared, under which conditions, and what came of it.

    Attributes:
        source: where the prompts come from.
        rows: one for each target.
        noise: the noise floor of the baseline.
        bisections: where a target parts from the baseline, for those that were bisected.
        thresholds: what the verdicts rest on.
        conditions: versions, machine and settings that all targets share.
    """

    baseline: Run
    source: str
    rows: tuple[Row, ...]
    noise: Noise
    bisections: tuple[Bisection, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 if every target is identical or agrees, 1 if one differs, else 2: not all compared."""
        found = {row.judgement.verdict for row in self.rows}
        if Verdict.DIFFERS in found:
            return 1
        return 0 if found and found <= AGREEING else 2

    @property
    def floor(self) -> tuple[FloorSource, ...]:
        """Every measurement of the noise floor; none if it was not measured."""
        baseline = self.baseline
        ours = baseline.outputs if baseline.scores is None else baseline.scores
        found = {name: (name, texts) for name, texts in baseline.again.items()}
        if baseline.scores is not None:
            found[DECODE] = (DECODE, baseline.outputs)
        for run in self.noise.known_good:
            theirs = run.outputs if baseline.scores is None else run.scores
            if theirs is not None:
                found[run.name] = (f"{run.name} (known good)", theirs)
        return tuple(
            FloorSource(
                name=shown,
                deltas=_deltas(ours, texts),
                is_counted=name in self.noise.counted,
            )
            for name, (shown, texts) in found.items()
        )

    @property
    def floor_summary(self) -> Summary | None:
        """Over all sources that are counted; None if there is none."""
        counted = [source for source in self.floor if source.is_counted]
        if not counted:
            return None
        return Summary.of(
            delta for source in counted for prompt in source.deltas for delta in prompt
        )

    def remarks(self, row: Row) -> tuple[str, ...]:
        """What to know of a target, but for what holds for all of them."""
        notes = (note for note in row.judgement.notes if note not in self.noise.notes)
        return (*notes, *row.comparison.other.notes)

    @property
    def headline(self) -> str:
        """How many targets came out how, as one sentence."""
        total = len(self.rows)
        if not total:
            return "No target was compared."
        counts = {
            verdict: sum(row.judgement.verdict is verdict for row in self.rows)
            for verdict in Verdict
        }
        found = [(counts[verdict], words) for verdict, words in _WORDS.items() if counts[verdict]]
        if len(found) == 1:
            who = "The target" if total == 1 else f"All {total} targets"
            return f"{who} {found[0][1][total > 1]}."
        parts = [f"{count} {words[count > 1]}" for count, words in found]
        return f"Of {total} targets, {'; '.join(parts)}."


_WORDS = {
    Verdict.DIFFERS: ("differs from the baseline", "differ from the baseline"),
    Verdict.NOT_COMPARED: ("was not compared", "were not compared"),
    Verdict.AGREES: ("agrees within the noise floor", "agree within the noise floor"),
    Verdict.IDENTICAL: ("is identical", "are identical"),
}


def _deltas(texts: Sequence[Text], others: Sequence[Text]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(their.logprob - our.logprob for our, their in delta_pairs(text, other))
        for text, other in zip(texts, others, strict=False)
    )


class TokenView(NamedTuple):
    """One token of the baseline's output, as both sides see it.

    Attributes:
        ours, theirs: the place as the baseline and the other tell it; `theirs` is None after the
            first difference of two free decodes.
        delta: the other's log-probability less the baseline's, in nats; None if not compared, NaN
            if it is not finite.
    """

    ours: Place
    theirs: Place | None
    delta: float | None


def is_forced(row: Row) -> bool:
    """Whether the row's tokens were scored teacher-forced; else only free decodes are compared."""
    return row.comparison.forced is not None


def token_views(row: Row, index: int) -> Sequence[TokenView]:
    """The tokens of one prompt: teacher-forced if they were scored so, else the common prefix."""
    ours, theirs = row.comparison.baseline, row.comparison.other
    if is_forced(row) and ours.scores is not None and theirs.scores is not None:
        return [
            TokenView(our, their, _finite(their.logprob - our.logprob))
            for our, their in zip(ours.scores[index], theirs.scores[index], strict=True)
        ]
    shared = row.comparison.prompts[index].common_prefix
    other = theirs.outputs[index]
    gives = ours.gives_logprobs and theirs.gives_logprobs
    views = []
    for place, our in enumerate(ours.outputs[index]):
        their = other[place] if place <= shared and place < len(other) else None
        known = gives and place < shared and their is not None
        delta = _finite(their.logprob - our.logprob) if known and their is not None else None
        views.append(TokenView(our, their, delta))
    return views


def _finite(delta: float) -> float:
    return delta if math.isfinite(delta) else math.nan


def deltas_of(row: Row) -> list[list[float]]:
    """The deltas of each prompt, by place, as far as they are compared; NaN if not finite."""
    if not row.comparison.prompts:
        return []
    return [
        [view.delta for view in token_views(row, index) if view.delta is not None]
        for index in range(len(row.comparison.prompts))
    ]
