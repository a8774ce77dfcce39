"""The corpus of historic defects: which mutant plants each here, or why none can.

The data is in corpus.json. A defect's ids name its thread (`sglang-23731` is SGLang's #23731);
`isomoe prove --mutant` and `isomoe parity --inject` take them in place of a mutant's name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any


class Level(StrEnum):
    """What it takes to see a defect."""

    STATIC = "static"
    """Placements alone, before anything runs."""
    ROWS = "rows"
    """Which row a row is."""
    COUNT = "count"
    """How often each contribution is in a sum."""
    SCHED = "sched"
    """The collectives of all ranks, held against each other."""
    NUM = "num"
    """Numbers."""


class Fate(StrEnum):
    """What becomes of a historic defect here."""

    PLANTED = "planted"
    EXCLUDED = "excluded by design"
    OUT_OF_SCOPE = "out of scope"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """A way to break a clean engine.

    Attributes:
        what: the defect in one line.
        levels: what sees it, by the corpus's judgement.
        refusals: attempts to write it down that are refused, by name.
    """

    code: str
    what: str
    levels: tuple[Level, ...]
    refusals: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One row of the corpus.

    Attributes:
        row: its number.
        ids: of the threads that report or repair it; the first is its own.
        kind: its class, such as DR for a double reduce.
        operators: the codes of the operators of which it is an instance.
        what: the defect in one line.
        mutants: the names of the mutants that plant it; empty if none does.
        reason: why none does.
        refusal: the attempt to write it down that is refused, where the design excludes it.
    """

    row: int
    ids: tuple[str, ...]
    kind: str
    operators: tuple[str, ...]
    what: str
    mutants: tuple[str, ...] = ()
    reason: str | None = None
    refusal: str | None = None

    @property
    def fate(self) -> Fate:
        """Whether it is planted, and if not, why."""
        if self.mutants:
            return Fate.PLANTED
        return Fate.OUT_OF_SCOPE if self.refusal is None else Fate.EXCLUDED


@cache
def operators() -> Mapping[str, Operator]:
    """Every operator, by its code."""
    return {
        code: Operator(
            code=code,
            what=entry["what"],
            levels=tuple(map(Level, entry["levels"])),
            refusals=tuple(entry["refusals"]),
        )
        for code, entry in _data()["operators"].items()
    }


@cache
def defects() -> tuple[Defect, ...]:
    """Every row, newest first."""
    return tuple(
        Defect(
            row=entry["row"],
            ids=tuple(entry["ids"]),
            kind=entry["kind"],
            operators=tuple(entry["operators"]),
            what=entry["defect"],
            mutants=tuple(entry.get("mutants", ())),
            reason=entry.get("reason"),
            refusal=entry.get("refusal"),
        )
        for entry in _data()["rows"]
    )


def refusals() -> Mapping[str, str]:
    """Attempts to write a defect down that are refused before a step runs, by name.

    The type check refuses most, the check of shares some, the test of the architecture the rest.
    """
    found: dict[str, str] = _data()["refusals"]
    return found


def defect_of(name: str) -> Defect | None:
    """The defect that has this id, if one has."""
    return next((defect for defect in defects() if name in defect.ids), None)


def ids_of(mutant: str) -> list[str]:
    """The own ids of the defects that a mutant plants."""
    return [defect.ids[0] for defect in defects() if mutant in defect.mutants]


@cache
def _data() -> dict[str, Any]:
    file = resources.files("isomoe") / "prove" / "corpus.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
