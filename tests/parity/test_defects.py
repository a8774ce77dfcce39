"""What counts as caught, and how a row of the mutants' table says what was seen."""

from pathlib import Path
from typing import Any

import pytest

from isomoe.cli import parity_mutants
from isomoe.engine import LLM
from isomoe.errors import EngineDeadError, IsomoeError, PlacementError
from isomoe.parity import defects
from isomoe.parity.defects import Outcome, Row
from isomoe.prove.finding import Finding
from isomoe.prove.levels import Levels
from isomoe.prove.mutants import find_mutant


def row(name: str, level: int | None, verdict: Outcome, **said: Any) -> Row:
    mutant = find_mutant(name)
    finding = Finding(
        model="arith-moe", layout="tp2", level=level or 0, regime="", case="", block="", message=""
    )
    seen = Levels(
        mutant=mutant,
        model=mutant.model,
        layout=mutant.layout,
        finding=None if level is None else finding,
        blocks=frozenset(),
    )
    return Row(mutant=mutant, ids=(), seen=seen, verdict=verdict, **said)


@pytest.mark.parametrize(
    ("name", "level", "verdict", "caught"),
    [
        ("double-reduce", 2, Outcome.CAUGHT, True),
        ("double-reduce", None, Outcome.CAUGHT, False),
        ("double-reduce", 2, Outcome.MISSED, False),
        ("double-reduce", 2, Outcome.NOT_COMPARED, False),
        ("double-reduce", 2, Outcome.DIED, True),
        ("double-reduce", 2, Outcome.UNCHANGED, True),
        ("norm-on-partial", 1, Outcome.REFUSED, True),
        ("conditional-collective", 2, Outcome.NOT_RUN, True),
        ("unweighted-expert-bias", 2, Outcome.UNCHANGED, False),
        ("overwritten-input", None, Outcome.CAUGHT, True),
        ("overwritten-input", None, Outcome.DIED, True),
        ("overwritten-input", None, Outcome.UNCHANGED, False),
        ("overwritten-input", None, Outcome.NOT_RUN, False),
    ],
)
def test_a_defect_is_caught_if_every_level_sees_it_that_ought_to(
    name: str, level: int | None, verdict: Outcome, caught: bool
) -> None:
    assert row(name, level, verdict).is_caught is caught


def test_a_bisection_that_broke_is_not_one_that_names_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    broke = row("scale-twice", 2, Outcome.CAUGHT, broke="tp1: rank 0 was killed")
    silent = row("scale-twice", 2, Outcome.CAUGHT)
    assert parity_mutants._named(broke) == "broke"
    assert parity_mutants._named(silent).startswith("nothing, not")
    assert (broke.to_json()["bisect_names"], broke.to_json()["bisect_error"]) == (
        None,
        "tp1: rank 0 was killed",
    )
    parity_mutants._print([broke], is_whole=False)
    assert "scale-twice: not bisected: tp1: rank 0 was killed" in capsys.readouterr().out


def test_a_comparison_that_concludes_nothing_is_no_agreement(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = row("scale-twice", 2, Outcome.NOT_COMPARED, why="no noise floor")
    assert not found.changes_numbers
    parity_mutants._print([found], is_whole=False)
    assert "scale-twice: not compared: no noise floor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (PlacementError("experts: needs P"), "experts: needs P"),
        (EngineDeadError("rank 1 was killed"), None),
    ],
)
def test_a_refusal_is_what_the_engine_says_and_not_what_the_type_check_would(
    error: IsomoeError, seen: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raises(config: Any) -> LLM:
        raise error

    monkeypatch.setattr(LLM, "from_config", raises)
    mutant = find_mutant("norm-on-partial")
    bench = defects._Bench(mutant.model, mutant.layout, tmp_path, lambda what: pytest.fail(what))
    assert bench.refusal(mutant) == seen
