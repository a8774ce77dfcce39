"""Runs targets, one after the other, and records what they say."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from isomoe.errors import IsomoeError
from isomoe.parity.run import ALONE, PAIRS, TOGETHER, Composition, Prompt, Run, Text
from isomoe.parity.targets.base import Stage, Target
from isomoe.parity.targets.saved import SavedRun

NOISE_COMPOSITIONS = (ALONE, PAIRS)
"""How the baseline's own tokens are batched again, to see what that moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every target is asked.

    Attributes:
        prompts: the first ones are sent all together; the last fifth, at most 24, one at a time: a
            defect may hide from large steps, or where every attention-DP group has rows.
        max_tokens: the most that are decoded for a prompt.
        top: how many of the likeliest candidates to record in each place.
        alone: how many of the last prompts are sent one at a time; None for a fifth.
    """

    prompts: tuple[Prompt, ...]
    max_tokens: int
    ignore_eos: bool = False
    top: int = 8
    alone: int | None = None

    @property
    def num_together(self) -> int:
        """Prompts that are open at once."""
        fifth = min(_MOST_ALONE, len(self.prompts) // 5)
        return len(self.prompts) - (fifth if self.alone is None else self.alone)

    def as_asked(self, baseline: Run) -> Self:
        """The same, as the baseline was asked: one that was saved may have been asked for less."""
        most = self.max_tokens if baseline.max_tokens is None else baseline.max_tokens
        return replace(self, max_tokens=min(self.max_tokens, most), alone=baseline.alone)


_MOST_ALONE = 24
"""Enough for one of the verdict's tests to see a defect that only they have."""


def record(
    target: Target | SavedRun, work: Workload, *, reference: Run | None, stage: Stage
) -> Run:
    """Starts a target, lets it decode and score, and ends it.

    Args:
        reference: the baseline, whose prompts and tokens are scored; None if this is the baseline,
            which scores its own, again under other batch compositions.

    Returns:
        What it said. A target that fails gives a run with an error, unless it is the baseline.

    Raises:
        IsomoeError: if the baseline fails.
    """
    began = time.monotonic()
    prompts = work.prompts if reference is None else reference.prompts
    try:
        if isinstance(target, SavedRun):
            return target.answer(
                prompts,
                max_tokens=work.max_tokens,
                ignore_eos=work.ignore_eos,
                reference=reference,
            )
        with target:
            return _driven(target, work, prompts, reference, stage, began)
    except IsomoeError as error:
        if reference is None:
            raise
        return Run(
            name=target.name,
            dialect=getattr(target, "dialect", "unknown"),
            prompts=tuple(prompts),
            seconds=time.monotonic() - began,
            notes=getattr(target, "notes", ()),
            error=str(error),
        )


def _driven(
    target: Target,
    work: Workload,
    prompts: Sequence[Prompt],
    reference: Run | None,
    stage: Stage,
    began: float,
) -> Run:
    if reference is None:
        prompts = target.encode(prompts)
    outputs: list[Text] = []
    scored: list[Text] = []
    split = work.num_together
    for composition, part in ((TOGETHER, slice(split)), (ALONE, slice(split, None))):
        if not (asked := prompts[part]):
            continue
        outputs += _outputs(target, work, asked, composition, stage)
        given = (outputs if reference is None else reference.outputs)[part]
        if target.can_score:
            scored += _scores(target, work, asked, given, composition, stage)
    again: dict[str, tuple[Text, ...]] = {}
    for composition in NOISE_COMPOSITIONS if reference is None else ():
        if target.can_score:
            found = _scores(target, work, prompts, outputs, composition, stage)
        else:
            found = _outputs(target, work, prompts, composition, stage)
        again[composition.name] = tuple(found)
    return Run(
        name=target.name,
        dialect=target.dialect,
        facts=dict(target.facts()),
        prompts=tuple(prompts),
        outputs=tuple(outputs),
        scores=tuple(scored) if target.can_score else None,
        again=again,
        gives_logprobs=target.gives_logprobs,
        max_tokens=work.max_tokens,
        ignore_eos=work.ignore_eos,
        top=work.top,
        alone=len(prompts[split:]),
        seconds=time.monotonic() - began,
        notes=target.notes,
    )


def _outputs(
    target: Target,
    work: Workload,
    prompts: Sequence[Prompt],
    composition: Composition,
    stage: Stage,
) -> list[Text]:
    with stage(f"{target.name}: decoding {composition.name}") as progress:
        return target.generate(
            prompts,
            max_tokens=work.max_tokens,
            ignore_eos=work.ignore_eos,
            top=work.top,
            composition=composition,
            progress=progress,
        )


def _scores(
    target: Target,
    work: Workload,
    prompts: Sequence[Prompt],
    given: Sequence[Text],
    composition: Composition,
    stage: Stage,
) -> list[Text]:
    with stage(f"{target.name}: scoring {composition.name}") as progress:
        return target.score(
            prompts, given, top=work.top, composition=composition, progress=progress
        )
