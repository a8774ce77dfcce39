"""Defects of `isomoe prove` that can be planted in the real engine."""

from isomoe.errors import ConfigError
from isomoe.prove.mutants import MUTANTS, find_mutant


def instrument_of(name: str) -> str:
    """What `EngineConfig.instrument` must say to plant a defect.

    Raises:
        ConfigError: if there is no such defect, or the engine cannot run it; lists those it can.
    """
    able = [mutant.name for mutant in MUTANTS if mutant.runs_in_engine]
    if name not in able:
        known = any(mutant.name == name for mutant in MUTANTS)
        why = (
            "changes more than the stream (`isomoe prove --mutant` has it)" if known else "unknown"
        )
        raise ConfigError(f"--inject {name}: {why}; the engine can run {', '.join(able)}")
    return f"isomoe.prove.mutants:{find_mutant(name).name.replace('-', '_')}"
