"""Defects of `isomoe prove` that can be planted in the real engine."""

from isomoe.errors import ConfigError
from isomoe.models import HFConfig
from isomoe.prove import MUTANTS, expressible, find_mutant
from isomoe.prove.corpus import defect_of


def injectable() -> list[str]:
    """The defects that the engine can run."""
    return [mutant.name for mutant in MUTANTS if mutant.runs_in_engine]


def instrument_of(name: str, model: HFConfig) -> str:
    """What `EngineConfig.instrument` must say to plant a defect.

    Args:
        name: of a mutant, or the historic id of a defect that one plants (`sglang-23731`).

    Raises:
        ConfigError: if there is no such defect, or the engine cannot run it (lists those it can),
            or the model has not the part that it changes.
    """
    why = why_not(name)
    if why is not None:
        raise ConfigError(f"--inject {name}: {why}; the engine can run {', '.join(injectable())}")
    mutant = find_mutant(name)
    if not expressible(name, [model]):
        raise ConfigError(f"--inject {name}: the model lacks {mutant.needs.value}")
    return f"isomoe.prove.mutants:{mutant.name.replace('-', '_')}"


def why_not(name: str) -> str | None:
    """Why the engine cannot run a defect; None if it can."""
    defect = defect_of(name)
    if defect is not None and not defect.mutants:
        return f"not planted: {defect.reason}"
    if defect is None and name not in (mutant.name for mutant in MUTANTS):
        return "unknown"
    return find_mutant(name).engine_refusal
