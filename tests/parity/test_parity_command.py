"""`isomoe parity`, as a process, on the real engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isomoe.cli.main import main
from isomoe.errors import ConfigError
from isomoe.models import known_configs
from isomoe.parity.inject import injectable, instrument_of
from isomoe.parity.targets.base import TargetError
from isomoe.prove import MUTANTS
from support import save_random, tiny_config

FEW = ("--random-prompts", "12", "--max-tokens", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_random(tiny_config("qwen3", num_hidden_layers=2, eos_token_id=0), folder)
    return folder


def parity(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isomoe.cli.main", "parity", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def document(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_a_clean_layout_agrees_one_that_sums_twice_differs_and_the_block_is_named(
    folder: Path, tmp_path: Path
) -> None:
    words = ("tp1", "tp2", "tp2+double-reduce", "--bisect", "--out", str(tmp_path))
    done = parity("--model", str(folder), *words, *FEW, "--json")
    assert done.returncode == 1, done.stderr
    found = document(done.stdout)
    clean, planted = found["targets"]
    assert clean["verdict"] in ("agrees", "identical")
    assert planted["verdict"] == "differs"
    assert planted["effect"] > 100
    (bisection,) = found["bisections"]
    assert bisection["culprit"]["block_kind"] == "experts"
    assert bisection["culprit"]["guess"] == "double reduce"
    assert done.stderr == ""
    assert document((tmp_path / "report.json").read_text()) == found
    assert "<html" in (tmp_path / "report.html").read_text()
    runs = sorted(file.name for file in tmp_path.glob("0*.json"))
    assert runs == ["01-tp1.json", "02-tp2.json", "03-tp2+double-reduce.json"]


def test_a_saved_run_is_a_baseline_on_another_day(folder: Path, tmp_path: Path) -> None:
    first = parity("--model", str(folder), "tp1", "tp2", *FEW, "--out", str(tmp_path / "a"))
    assert first.returncode == 0, first.stderr
    saved = f"file:{tmp_path / 'a' / '01-tp1.json'}"
    words = ("--model", str(folder), saved, "tp1", "--max-tokens", "8")
    again = parity(*words, "--out", str(tmp_path / "b"), "--json")
    assert again.returncode == 0, again.stderr
    (row,) = document(again.stdout)["targets"]
    assert row["verdict"] == "identical"


def test_the_layouts_flag_and_an_injected_defect_are_taken_as_before(
    folder: Path, tmp_path: Path
) -> None:
    words = ("--layouts", "tp1", "tp1", "--inject", "sglang-23731", "--out", str(tmp_path))
    done = parity("--model", str(folder), *words, *FEW)
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout
    assert "one rank: there is nothing to sum or move" in done.stdout
    assert "12/12" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no target"),
        (("tp1",), "nothing to be compared with"),
        (("tp1+double-reduce", "tp1"), "the first target is the baseline"),
        (("tp1", "tp1+double-reduce", "--inject", "scale-twice"), "one at a time"),
        (("tp1", "http://127.0.0.1:1", "--inject", "scale-twice"), "is no layout"),
        (("tp1", "tp1", "--inject", "unweighted-expert-bias"), "the model lacks biases"),
        (("tp1", "tp1", "--inject", "conditional-collective"), "wait for one another"),
        (("tp1", "tp1", "--inject", "typo"), "--inject typo: unknown"),
        (("tp1", "tp1", "--inject", "torchtitan-4332"), "not planted"),
        (("tp1", "tp1+"), "the name of a defect is missing"),
        (("tp1", "dp2"), "tpN, the number of ranks, is missing"),
        (("tp1", "./nowhere"), "is none; http://"),
        (("tp1", "file:nowhere.json"), "file:nowhere.json: not readable"),
        (("tp1", "tp1", "--max-tokens", "0"), "--max-tokens 0"),
        (("tp1", "tp1", "--num-prompts", "0"), "--num-prompts 0"),
        (("tp1", "tp1", "--top", "-1"), "--top -1"),
        (("tp1", "tp1", "--num-prompts", "3", "--random-prompts", "3"), "give one of them"),
        (("tp1", "http://a:s3cret@h", "--inject", "scale-twice"), "***@h is no layout"),
        (("tp1", "tp1", "--max-delta", "-1"), "max -1.0: must be at least 0"),
        (("tp1", "tp1", "--thresholds", "nowhere"), "--thresholds nowhere: not readable"),
        (("tp1", "tp1", "--prompts", "nowhere"), "--prompts nowhere: not readable"),
        (("tp1", "tp1", "--api-key-env", "ISOMOE_NO_SUCH"), "no such variable"),
        (("tp1", "tp1", "--only", "scale-twice"), "--only: is for --mutants"),
        (("tp1", "tp3,ep3"), "8"),
        (("tp1", "http://127.0.0.1:1", "--bisect"), "its hidden states cannot be seen"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2_before_anything_runs(
    folder: Path,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["parity", "--model", str(folder), *words, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
    assert "s3cret" not in said.err
    assert not out.exists()


@pytest.mark.slow
def test_a_saved_run_of_a_defect_may_be_the_baseline(folder: Path, tmp_path: Path) -> None:
    """Its name has a plus in it, which is no defect here."""
    words = ("tp1", "tp1+scale-twice", *FEW, "--out", str(tmp_path / "a"))
    assert parity("--model", str(folder), *words).returncode == 1
    saved = f"file:{tmp_path / 'a' / '02-tp1+scale-twice.json'}"
    words = (saved, "tp1", "--max-tokens", "8", "--out", str(tmp_path / "b"), "--json")
    done = parity("--model", str(folder), *words)
    assert done.returncode == 2, done.stderr
    found = document(done.stdout)
    (row,) = found["targets"]
    assert row["free"]["max"] > 0.1, "what it decoded is compared"
    assert row["reasons"][0].startswith("no noise floor: the baseline was asked once")
    assert any("its scores are of other tokens" in note for note in found["baseline"]["notes"])


def test_a_bisection_that_fails_is_noted_and_the_report_is_not_lost(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from isomoe.parity.bisect.engine_side import EngineSide

    def dies(self: EngineSide, *args: Any) -> Any:
        raise TargetError(f"{self.name}: rank 0 was killed")

    monkeypatch.setattr(EngineSide, "record", dies)
    words = ["tp1", "tp1+scale-twice", "--bisect", *FEW, "--out", str(tmp_path), "--json"]
    assert main(["parity", "--model", str(folder), *words]) == 1
    found = document(capsys.readouterr().out)
    assert found["bisections"] == []
    (row,) = found["targets"]
    assert row["verdict"] == "differs"
    assert "not bisected: tp1: rank 0 was killed" in row["notes"]


def test_an_instrument_is_named_for_every_defect_that_the_engine_can_run() -> None:
    mixed = known_configs()["qwen3-moe-mixed"]
    for mutant in MUTANTS:
        if mutant.name not in injectable():
            with pytest.raises(ConfigError, match="the engine can run"):
                instrument_of(mutant.name, mixed)
        elif "shared" in mutant.name:
            with pytest.raises(ConfigError, match="the model lacks a shared expert"):
                instrument_of(mutant.name, mixed)


def test_an_engine_that_dies_is_named_and_nothing_is_concluded(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from isomoe.parity.targets.engine import EngineTarget

    score = EngineTarget.score

    def dies(self: EngineTarget, *args: Any, **options: Any) -> Any:
        if self.defect:
            raise TargetError(f"{self.name}: rank 0 was killed")
        return score(self, *args, **options)

    monkeypatch.setattr(EngineTarget, "score", dies)
    words = ["tp1", "tp1+scale-twice", *FEW, "--out", str(tmp_path), "--json"]
    assert main(["parity", "--model", str(folder), *words]) == 2
    row = json.loads(capsys.readouterr().out)["targets"][0]
    assert row["verdict"] == "not compared"
    assert row["reasons"] == ["tp1+scale-twice: rank 0 was killed"]


def test_mutants_say_who_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal, a defect that cannot run, and one by its historic id."""
    names = ["norm-on-partial", "conditional-collective", "vllm-ascend-14345"]
    assert main(["parity", "--mutants", "--only", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    refused, waits = found["rows"]
    assert (refused["mutant"], refused["type_check"], refused["verdict"]) == (
        "norm-on-partial",
        True,
        "refused",
    )
    assert (waits["proof"], waits["verdict"], waits["caught"]) == (True, "not run", True)
    assert {one["fate"] for one in found["not_planted"]} == {"excluded by design", "out of scope"}
    assert all(one["reason"] for one in found["not_planted"])


@pytest.mark.slow
def test_a_mutant_that_changes_numbers_is_told_apart_and_its_block_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["parity", "--mutants", "--only", "norm-counts-copies", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["proof"], row["verdict"], row["bisect_names"]) == (True, "differs", "attention")
