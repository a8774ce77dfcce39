"""Every mutant, and how one is found by its name or by the id of a defect that it re-enacts."""

from isomoe.errors import ConfigError
from isomoe.prove.corpus import defect_of
from isomoe.prove.mutants import chain, model, paths, rows, sums
from isomoe.prove.mutants.base import Mutant

MUTANTS: tuple[Mutant, ...] = tuple(
    sorted(
        (*sums.MUTANTS, *rows.MUTANTS, *chain.MUTANTS, *model.MUTANTS, *paths.MUTANTS),
        key=lambda mutant: mutant.code,
    )
)
"""By operator."""

_BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def find_mutant(name: str) -> Mutant:
    """The mutant of that name, or the first one that plants the defect of that historic id.

    Raises:
        ConfigError: if there is none; says why, or lists them.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    defect = defect_of(name)
    if defect is None:
        raise ConfigError(f"mutant {name!r}: known are {', '.join(_BY_NAME)}")
    if not defect.mutants:
        raise ConfigError(f"mutant {name!r}: not planted: {defect.reason}")
    return _BY_NAME[defect.mutants[0]]


def mutant_attribute(name: str) -> Mutant:
    """The mutant that is an attribute of the package (`double_reduce`), for the engine to import.

    Raises:
        AttributeError: if there is none.
    """
    found = _BY_NAME.get(name.replace("_", "-"))
    if found is None:
        raise AttributeError(name)
    return found
