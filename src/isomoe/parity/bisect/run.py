"""`bisect`: two sides, the same tokens, and the first place where they part."""

from collections.abc import Sequence

import torch

from isomoe.config import EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError
from isomoe.models import build
from isomoe.parity.bisect.assemble import Recording, RecordingError
from isomoe.parity.bisect.describe import describe
from isomoe.parity.bisect.engine_side import EngineSide
from isomoe.parity.bisect.locate import Rows, compare, measure_floors, settled
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.result import Bisection
from isomoe.parity.bisect.stations import Kind, Station
from isomoe.parity.bisect.transformers_side import TransformersSide
from isomoe.parity.run import Ids
from isomoe.parity.targets.base import Stage, TargetError

NUM_PROMPTS = 4
MAX_TOKENS = 256
_HF = "hf:"
_PASSES = (Pass.TOGETHER, Pass.ALONE, Pass.EQUAL, Pass.SMALL)
"""In this order: a defect may hide from ragged steps, from full ones, or from large ones."""

Side = EngineSide | TransformersSide


def side_of(name: str, config: EngineConfig, info: ModelInfo, stage: Stage) -> Side:
    """A side by its name: a layout, with a defect behind a `+` or not, or `hf:PATH`.

    Args:
        config: the engine's other settings.
        info: its checkpoint; `hf:` alone is the same one.

    Raises:
        ConfigError: if the layout or the defect cannot be.
    """
    if not name.startswith(_HF):
        return EngineSide(name, config, info, stage)
    model = build(info.hf_config, config.parallelism)
    return TransformersSide(name.removeprefix(_HF), info, model, stage)


def bisect(
    baseline: Side,
    other: Side,
    prompts: Sequence[Ids],
    num_prompts: int = NUM_PROMPTS,
    max_tokens: int = MAX_TOKENS,
) -> Bisection:
    """Runs the prompts on both sides and names the first station that leaves the noise floor.

    The noise floor is the baseline against itself, with other batches and with every block's output
    rounded once more. Files that it needs lie in a temporary folder: on every rank about
    20 bytes * layers * hidden size for each token, in each of five passes. A side remembers what
    it saw, so that one baseline serves many bisections of the same prompts.

    Args:
        prompts: tokens to prefill, outputs included.
        num_prompts: how many of them are taken.
        max_tokens: how many tokens of each. All of them must fit into one step.

    Raises:
        ConfigError: if there is no prompt, or both sides are transformers models.
        TargetError: if a side fails while it runs.
    """
    texts = [tuple(prompt[:max_tokens]) for prompt in prompts[:num_prompts] if prompt]
    if not texts:
        raise ConfigError("--bisect: there is no prompt with token ids")
    if isinstance(baseline, TransformersSide) and isinstance(other, TransformersSide):
        raise ConfigError(f"--bisect {baseline.name} {other.name}: one of them must be a layout")
    # transformers rounds where the engine does not, so that its own noise counts too.
    noisy = [side for side in (baseline, other) if side is baseline or _is_foreign(side)]
    noise: list[tuple[Rows, Rows]] = []
    for side in noisy:
        runs = side.record(texts, list(Pass))
        noise += [(runs[now], runs[Pass.TOGETHER]) for now in (Pass.ALONE, Pass.JITTERED)]
    eps = max(torch.finfo(getattr(torch, side.dtype)).eps for side in (baseline, other))
    base, found = baseline.record(texts, _PASSES), other.record(texts, _PASSES)
    bisections = (
        _bisect(
            (baseline.name, base[now]), (other.name, found[now]), now, noise, eps, now.texts(texts)
        )
        for now in _PASSES
    )
    try:
        first = next(bisections)
        if first.culprit is not None:
            return first
        return next((one for one in bisections if one.culprit is not None), first)
    except RecordingError as error:
        raise TargetError(f"{other.name}: {error}") from None


def _is_foreign(side: Side) -> bool:
    return isinstance(side, TransformersSide)


def _bisect(
    baseline: tuple[str, Rows],
    other: tuple[str, Rows],
    now: Pass,
    noise: Sequence[tuple[Rows, Rows]],
    eps: float,
    texts: Sequence[Ids],
) -> Bisection:
    """One pass of two sides, each with its name."""
    (_, base), (_, found) = baseline, other
    plan = found if isinstance(found, Recording) else base
    assert isinstance(plan, Recording)
    stations = plan.stations if isinstance(base, Recording) and plan is found else _shared(plan)
    at = list(compare(base, found, plan, stations, measure_floors(noise, stations, eps)))
    off = next((one for one in at if one.off is not None), None)
    return Bisection(
        baseline=baseline[0],
        other=other[0],
        batches=now,
        rows=max((one.point.rows for one in at), default=0),
        stations=tuple([one.point for one in at]),
        culprit=None if off is None else describe(off, plan, found, now, texts),
    )


def _shared(planned: Recording) -> list[Station]:
    """What can be told of a transformers model too: reads, and what they settle."""
    found = []
    for read in planned.steps[0].dumps[0].plan.reads:
        found += [settled(planned, read.name), Station(Kind.READ, read.name)]
    return found
