"""Defects of `isomoe prove` that can be planted in the real engine."""

from isomoe.errors import ConfigError
from isomoe.models import HFConfig
from isomoe.prove import expressible
from isomoe.prove.mutants import MUTANTS, Mutant

_SCHEDULE = ("M19", "M23", "M24")
"""Operators that change which ranks enter a collective: the engine would wait for ever."""


def injectable() -> list[str]:
    """The defects that the engine can run."""
    return [mutant.name for mutant in MUTANTS if _refusal(mutant) is None]


def instrument_of(name: str, model: HFConfig) -> str:
    """What `EngineConfig.instrument` must say to plant a defect.

    Raises:
        ConfigError: if there is no such defect, or the engine cannot run it (lists those it can),
            or the model has no block that it changes.
    """
    found = [mutant for mutant in MUTANTS if mutant.name == name]
    why = _refusal(found[0]) if found else "unknown"
    if why is not None:
        raise ConfigError(f"--inject {name}: {why}; the engine can run {', '.join(injectable())}")
    if not expressible(name, [model]):
        raise ConfigError(f"--inject {name}: the model has no block of the kind that it changes")
    return f"isomoe.prove.mutants:{name.replace('-', '_')}"


def _refusal(mutant: Mutant) -> str | None:
    if not mutant.runs_in_engine:
        return "changes more than the stream (`isomoe prove --mutant` runs it)"
    if mutant.code == "M14":
        return "needs padding rows, which the scheduler never makes"
    if mutant.code in _SCHEDULE:
        return "makes ranks wait for one another for ever (`isomoe prove --mutant` runs it)"
    return None
