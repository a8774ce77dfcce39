"""`isomoe eval`, on the real engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from isomoe.cli.main import main
from isomoe.eval import read_problems
from isomoe.weights import bundled_checkpoint
from support import save_random, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the bundled checkpoint's tokenizer, and three problems."""
    folder = tmp_path_factory.mktemp("qwen3")
    save_random(tiny_config("qwen3", vocab_size=640, num_hidden_layers=1, eos_token_id=0), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled_checkpoint() / name).read_bytes())
    lines = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in range(3)]
    (folder / "heldout.jsonl").write_text("\n".join(lines))
    return folder


def test_the_document_counts_every_problem(folder: Path) -> None:
    words = ("--task", "arith", "--model", str(folder), "--max-tokens", "4", "--json")
    command = [sys.executable, "-m", "isomoe.cli.main", "eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["n"], found["strict"]["n"], found["flexible"]["n"]) == (3, 3, 3)
    assert found["accuracy"] == found["strict"]["accuracy"]
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert (found["layout"], found["num_fewshot"], found["data"]) == ("tp1", 0, "heldout.jsonl")
    assert 3 <= found["output_tokens"] <= 12


def test_shown_problems_are_not_scored_and_a_gate_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(folder / "heldout.jsonl")
    words = ["--task", "gsm8k", "--model", str(folder), "--max-tokens", "4", "--min-accuracy", "1"]
    assert main(["eval", *words, "--data", data, "--num-fewshot", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["n"] == 2
    words += ["--data", data, "--fewshot-data", data, "--num-fewshot", "2", "--limit", "1"]
    assert main(["eval", *words]) == 1
    assert "gsm8k, 2-shot, 1 problems of heldout.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "mmlu"), "--task mmlu: known are arith, gsm8k"),
        (("--task", "gsm8k"), "--data FILE is missing"),
        (("--task", "arith", "--data", "nowhere"), "nowhere: not readable"),
        (("--task", "arith", "--limit", "0"), "--limit 0: must be at least 1"),
        (("--task", "arith", "--num-fewshot", "3"), "nothing is left to score"),
        (("--task", "arith", "--min-accuracy", "95"), "--min-accuracy 95.0: must be from 0 to 1"),
        (("--task", "arith", "--inject", "rank-decides"), "the engine can run double-reduce"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model", str(folder), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no problem"),
        ("{", "line 1: not readable as JSON"),
        ("[]", "line 1: must be an object"),
        ('{"question": "a"}', "line 1: 'answer' must be a text"),
        ('{"question": "a", "answer": 3}', "line 1: 'answer' must be a text"),
        ('{"question": "a", "answer": "three"}', "line 1: the answer does not end in"),
    ],
)
def test_malformed_data_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_problems(file)
