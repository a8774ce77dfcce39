"""`isomoe parity`, as a process, on the real engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isomoe.errors import ConfigError
from isomoe.parity import injectable, instrument_of
from isomoe.prove import MUTANTS, known_configs
from support import save_random, tiny_config

FEW = ("--random-prompts", "2", "--max-tokens", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_random(tiny_config("qwen3", num_hidden_layers=2, eos_token_id=0), folder)
    return folder


def parity(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isomoe.cli.main", "parity", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def document(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))


def test_a_clean_layout_agrees_and_one_that_sums_twice_differs(folder: Path) -> None:
    layouts = ("--layouts", "tp1", "tp2", "tp2+double-reduce")
    done = parity("--model", str(folder), *layouts, *FEW, "--json")
    assert done.returncode == 1, done.stderr
    found = document(done)
    clean, planted = found["rows"]
    assert clean["verdict"] in ("agrees", "identical")
    assert clean["teacher_forced"]["max"] < 1e-4
    assert planted["layout"] == "tp2+double-reduce"
    assert planted["verdict"] == "differs"
    assert planted["teacher_forced"]["mean"] > 0.1
    assert planted["teacher_forced"]["tokens"] == found["tokens"]
    assert sum(prompt["n_tokens"] for prompt in planted["prompts"]) == found["tokens"]
    assert found["conditions"]["dtype"] == "float32"
    assert done.stderr == ""


def test_the_same_layout_twice_is_identical_and_one_rank_has_nothing_to_sum(folder: Path) -> None:
    words = ("--layouts", "tp1", "tp1", "--inject", "double-reduce")
    done = parity("--model", str(folder), *words, *FEW)
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout
    assert "tp1+double-reduce: one rank: there is nothing to sum or move" in done.stdout
    assert "2/2 prompts" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layouts", "tp1"), "nothing to be compared with"),
        (("--layouts", "tp1+double-reduce", "tp1"), "the first one is the baseline"),
        (("--layouts", "tp1", "tp1+double-reduce", "--inject", "scale-twice"), "one at a time"),
        (
            ("--layouts", "tp1", "tp1", "--inject", "bias-on-every-rank"),
            "the engine can run double",
        ),
        (("--layouts", "tp1", "tp1", "--inject", "conditional-collective"), "wait for one another"),
        (("--layouts", "tp1", "tp1", "--inject", "typo"), "--inject typo: unknown"),
        (("--layouts", "tp1", "tp1+"), "the name of a defect is missing"),
        (("--layouts", "tp1", "dp2"), "tpN, the number of ranks, is missing"),
        (("--layouts", "tp1", "tp1", "--max-tokens", "0"), "--max-tokens 0"),
        (("--layouts", "tp1", "tp1", "--max-delta", "-1"), "--max-delta -1.0"),
        (("--layouts", "tp1", "tp1", "--prompts", "nowhere"), "--prompts nowhere: not readable"),
        (("--layouts", "tp1", "tp3,ep3"), "8"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from isomoe.cli.main import main

    assert main(["parity", "--model", str(folder), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


def test_an_instrument_is_named_for_every_defect_that_the_engine_can_run() -> None:
    mixed = known_configs()["qwen3-moe-mixed"]
    for mutant in MUTANTS:
        if mutant.name not in injectable():
            with pytest.raises(ConfigError, match="the engine can run"):
                instrument_of(mutant.name, mixed)
        elif "shared" in mutant.name:
            with pytest.raises(ConfigError, match="has no block of the kind"):
                instrument_of(mutant.name, mixed)
        else:
            assert mutant.runs_in_engine
            assert instrument_of(mutant.name, mixed).endswith(mutant.name.replace("-", "_"))


def test_an_engine_that_dies_is_a_row_that_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isomoe.cli.main import main
    from isomoe.errors import EngineDeadError
    from isomoe.parity import EngineTarget

    score = EngineTarget.score

    def dies(self: EngineTarget, *args: Any) -> Any:
        if self.defect:
            raise EngineDeadError("rank 0 was killed")
        return score(self, *args)

    monkeypatch.setattr(EngineTarget, "score", dies)
    words = ["--model", str(folder), "--layouts", "tp1", "tp1+scale-twice", *FEW, "--json"]
    assert main(["parity", *words]) == 1
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert (row["verdict"], row["reasons"]) == ("differs", ["rank 0 was killed"])
