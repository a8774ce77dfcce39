"""The noise floor: how far the baseline is from itself, token by token. Pure.

Its sources are the baseline's scores of its own tokens under other batch compositions, and its
decode beside its prefill of the same tokens. Whoever is known to be good is measured against this
floor as well; how far it is from it is what another layout may cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isomoe.parity.compare import Summary, fault_of, quantile
from isomoe.parity.run import Place, Run, Text

DECODE = "decode against prefill"
QUANTUM = 1e-7
"""Nats: a log-probability near 0 is a difference of fp32 numbers, which rounds to about this."""
LEAST_NOISE = {"float32": 1e-5, "float16": 3e-4, "bfloat16": 1e-3}
"""Nats of a logit that rounding of that dtype carries into logits of 10 or so, at the very least.
A floor below it would tell apart what no dtype of that width can promise."""
ASSUMED_NOISE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Nats of a logit where the baseline gives the same bits however it is batched: that tells nothing
of what another layout rounds. 0.1 is what bf16 does to models of some 30 billion parameters."""
ASSUMED_WORST = 10.0
"""Times that: what one token may be off where the floor is assumed. A near tie in routing moves a
token by far more than rounding does."""
WILD = 3.0
"""How many times further than the compositions decode may be from prefill, to be taken as noise."""

_FEW = 0.1
"""A GPU's kernels give nearly every row the same bits in any batch; what little moves tells nothing
of how another layout rounds."""

Deltas = tuple[float, ...]
Source = tuple[Deltas, ...]
"""Signed deltas in nats of each prompt's first tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The floor under every token of the baseline.

    Attributes:
        sources: |delta logprob| of the baseline from itself, by source.
        counted: the sources that the floors rest on; none where they are assumed.
        known_good: those against which others are measured as well; `verdict` compares them.
        floors: ln of the floor in nats, of each prompt's tokens.
        logits: ln of the noise of a logit in nats, of each prompt.
        maxima: of each prompt, the largest |delta| of each source that says something of it; what
            is assumed where the floor is.
        unit: the typical delta of a candidate, in nats.
        is_measured: whether anything at all tells the floor.
        notes: what a reader should know of it.
    """

    sources: Mapping[str, Summary]
    counted: frozenset[str] = frozenset()
    known_good: tuple[Run, ...] = ()
    floors: tuple[Deltas, ...] = ()
    logits: Deltas = ()
    maxima: tuple[Deltas, ...] = ()
    unit: float = LEAST_NOISE["bfloat16"]
    is_measured: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, baseline: Run, known_good: Sequence[Run] = ()) -> "Noise":
        """The baseline's, by what it said of its own tokens."""
        texts = baseline.outputs if baseline.scores is None else baseline.scores
        faults = [fault_of(baseline, run) or not_finite(run) for run in known_good]
        notes = [f"not used as a noise floor: {fault}" for fault in faults if fault is not None]
        usable = [run for run, fault in zip(known_good, faults, strict=True) if fault is None]
        sources, used, found = _own(baseline, texts)
        if not used:
            good = {run.name: _source(texts, _same_half(baseline, run)) for run in usable}
            used = [one for one in good.values() if _is_rounding(one)]
            sources |= good
        if not used and sources:
            found.append(
                f"{baseline.name} {_silence(baseline, texts)}, which tells nothing of other "
                "layouts: the floor is assumed; --floor TARGET would measure it"
            )
        notes += found
        typical = _typical(texts, used)
        least = _by_dtype(LEAST_NOISE, baseline)
        assumed = _by_dtype(ASSUMED_NOISE, baseline)
        if typical is None:
            typical = assumed
        floors = [
            _floors(text, [source[index] for source in used], max(typical, least), least)
            for index, text in enumerate(texts)
        ]
        return cls(
            sources={
                name: Summary.of(delta for deltas in source for delta in deltas)
                for name, source in sources.items()
            },
            counted=frozenset(
                name for name, one in sources.items() if any(one is other for other in used)
            ),
            known_good=tuple(usable),
            floors=tuple(floors),
            logits=tuple(map(_logit, texts, floors)),
            maxima=tuple(
                tuple(max(map(abs, source[index])) for source in used if any(source[index]))
                if used
                else (ASSUMED_WORST * assumed,)
                for index in range(len(texts))
            ),
            unit=max(least, _unit(texts, baseline) or typical),
            is_measured=bool(sources),
            notes=tuple(notes),
        )


def _own(baseline: Run, texts: Sequence[Text]) -> tuple[dict[str, Source], list[Source], list[str]]:
    """The baseline's sources by name, those that count as noise, and notes."""
    again = {name: _source(texts, other) for name, other in baseline.again.items()}
    used = [source for source in again.values() if _is_rounding(source)]
    if baseline.scores is None:
        return again, used, []
    decode = _source(texts, baseline.outputs)
    sources = {**again, DECODE: decode}
    size, batched = _typical(texts, [decode]), _typical(texts, used)
    if size is None or not _is_rounding(decode):
        return sources, used, []
    most = _by_dtype(ASSUMED_NOISE, baseline) if batched is None else WILD * batched
    if size <= most:
        return sources, [*used, decode], []
    note = (
        f"{baseline.name}: decode is {size:.2g} nats of a logit from prefill, of which rounding "
        f"explains {most:.2g}; it does not count as noise"
    )
    return sources, used, [note]


def _silence(baseline: Run, texts: Sequence[Text]) -> str:
    """Why a baseline that was read more than once has no floor."""
    if not baseline.again:
        return "was scored in one batch composition alone"
    moved = any(
        any(deltas) for other in baseline.again.values() for deltas in _source(texts, other)
    )
    return f"gives {'nearly ' if moved else ''}the same bits under every batch composition"


def _same_half(baseline: Run, run: Run) -> Sequence[Text]:
    """What a run says of the baseline's tokens, read as the baseline reads them where it can."""
    return run.outputs if baseline.scores is None or run.scores is None else run.scores


def doubt(place: Place) -> float:
    """1 - p of the token: how much of the noise of its logit reaches its log-probability."""
    return -math.expm1(min(0.0, place.logprob)) if math.isfinite(place.logprob) else 1.0


def not_finite(run: Run) -> str | None:
    """Where a run that tells log-probabilities tells one that is none; None if nowhere."""
    if not run.gives_logprobs:
        return None
    again = "decode" if run.scores is None else "score"
    told = [("score", run.scores or ()), ("decode", run.outputs)]
    told += [(f"{again}, {name}", texts) for name, texts in run.again.items()]
    for what, texts in told:
        logprobs = [place.logprob for text in texts for place in text]
        if broken := sum(not math.isfinite(logprob) for logprob in logprobs):
            prompt, token = _first_broken(texts)
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


def delta_pairs(ours: Text, theirs: Text) -> list[tuple[Place, Place]]:
    """The places of two texts up to the first token that they do not share."""
    found = []
    for our, their in zip(ours, theirs, strict=False):
        if not our.token.is_token_of(their.token):
            break
        found.append((our, their))
    return found


def _source(texts: Sequence[Text], others: Sequence[Text]) -> Source:
    return tuple(
        tuple(their.logprob - our.logprob for our, their in delta_pairs(text, other))
        for text, other in zip(texts, others, strict=True)
    )


def _log_sizes(texts: Sequence[Text], source: Source) -> list[float]:
    """ln of |delta| over what of it is certain, of prompts that were not computed the same way.

    A prompt whose deltas are all 0 was batched as before, and says nothing of rounding.
    """
    return [
        math.log(abs(delta) + QUANTUM) - math.log(doubt(place) + QUANTUM)
        for text, deltas in zip(texts, source, strict=True)
        if any(deltas)
        for place, delta in zip(text, deltas, strict=False)
        if math.isfinite(delta)
    ]


def _typical(texts: Sequence[Text], sources: Sequence[Source]) -> float | None:
    """The geometric mean of the noise of a logit, in nats; None if there is none."""
    found = [size for source in sources for size in _log_sizes(texts, source)]
    return math.exp(math.fsum(found) / len(found)) if found else None


def _is_rounding(source: Source) -> bool:
    """Whether it moved more than a few tokens."""
    moved = [delta != 0.0 for deltas in source for delta in deltas if math.isfinite(delta)]
    return sum(moved) > _FEW * len(moved)


def _floors(text: Text, sources: Sequence[Deltas], typical: float, least: float) -> Deltas:
    live = [deltas for deltas in sources if any(deltas)]
    floors = []
    for index, place in enumerate(text):
        known = [
            math.log(abs(deltas[index]) + QUANTUM)
            for deltas in live
            if index < len(deltas) and math.isfinite(deltas[index])
        ]
        share = doubt(place)
        if known:
            # The geometric mean is what an equally noisy target has on average, and one token
            # that took another expert moves it little.
            lowest = math.log(least * share + QUANTUM)
            floors.append(max(lowest, math.fsum(known) / len(known)))
        else:
            floors.append(math.log(typical * share + QUANTUM))
    return tuple(floors)


def _logit(text: Text, floors: Deltas) -> float:
    """ln of the noise of a logit in a prompt, in nats: what the floors have, but for 1 - p."""
    found = [
        floor - math.log(doubt(place) + QUANTUM) for place, floor in zip(text, floors, strict=True)
    ]
    return math.fsum(found) / len(found) if found else 0.0


def _unit(texts: Sequence[Text], baseline: Run) -> float | None:
    """The median |delta| of candidates under other compositions, where they moved at all."""
    found = sorted(
        abs(logprob - candidate.logprob)
        for others in baseline.again.values()
        for text, other in zip(texts, others, strict=True)
        for our, their in delta_pairs(text, other)
        for candidate in our.top
        if not candidate.is_token_of(our.token)
        and (logprob := their.logprob_of(candidate)) is not None
        and math.isfinite(logprob - candidate.logprob)
        and logprob != candidate.logprob
    )
    return quantile(found, 0.5) if found else None


def _by_dtype(table: Mapping[str, float], run: Run) -> float:
    """bf16 where the dtype is not known: what servers run."""
    return table.get(str(run.facts.get("dtype")).removeprefix("torch."), table["bfloat16"])
