"""Runs targets, one after the other, and records what they say."""

import time
from collections.abc import Sequence

from isomoe.errors import EngineDeadError
from isomoe.parity.compare import Ids, Recording
from isomoe.parity.target import Stage, Target


def record(
    target: Target,
    prompts: Sequence[Ids],
    *,
    reference: Recording | None,
    max_tokens: int,
    ignore_eos: bool,
    stage: Stage,
) -> Recording:
    """Starts a target, lets it decode and score, and ends it.

    Args:
        reference: the baseline, whose tokens are scored; None if this is the baseline, which
            scores its own.

    Returns:
        What it said. An engine that dies underway gives a recording with an error, unless it is
        the baseline.

    Raises:
        EngineDeadError: if the baseline's engine dies.
    """
    began = time.monotonic()
    try:
        with target:
            with stage(f"{target.name}: decoding") as progress:
                outputs = target.generate(
                    prompts, max_tokens=max_tokens, ignore_eos=ignore_eos, progress=progress
                )
            given = reference.outputs if reference is not None else outputs
            with stage(f"{target.name}: scoring") as progress:
                scores = target.score(prompts, [output.token_ids for output in given], progress)
    except EngineDeadError as error:
        if reference is None:
            raise
        seconds = time.monotonic() - began
        return Recording(name=target.name, seconds=seconds, notes=target.notes, error=str(error))
    return Recording(
        name=target.name,
        outputs=tuple(outputs),
        scores=tuple(scores),
        seconds=time.monotonic() - began,
        notes=target.notes,
    )
