"""`isomoe generate` and the flags that commands share."""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isomoe.cli import generate
from isomoe.cli.main import COMMANDS, main
from isomoe.cli.options import add_engine_options, engine_config_from
from isomoe.config import EngineConfig
from isomoe.errors import ConfigError
from isomoe.layout import Parallelism


def isomoe(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isomoe.cli.main", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_generate_prints_one_json_document(text_folder: Path) -> None:
    done = isomoe(
        "generate", "--model", str(text_folder), "--device", "cpu", "--json", "--max-tokens", "5",
        "--logprobs", "2", stdin="one apple\n\ntwo pears\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert [output["prompt"] for output in document["outputs"]] == ["one apple", "two pears"]
    assert document["layout"] == "tp1"
    for output in document["outputs"]:
        assert len(output["token_ids"]) == len(output["logprobs"]) <= 5
        assert [len(token["top"]) for token in output["logprobs"]] == [2] * len(output["logprobs"])
        assert output["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_generate_on_two_ranks_prints_the_same(text_folder: Path) -> None:
    words = ["generate", "--model", str(text_folder), "--device", "cpu", "--json", "--prompt", "hi"]
    one, two = isomoe(*words), isomoe(*words, "--tp", "2", "--dp", "2", "--enable-dp-attention")
    assert two.returncode == 0, two.stderr
    texts = [json.loads(done.stdout)["outputs"][0]["text"] for done in (one, two)]
    assert texts[0] == texts[1]
    assert json.loads(two.stdout)["layout"] == "tp2,dp2"


def test_generate_prints_text_and_a_table_of_logprobs(
    text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(text_folder), "--device", "cpu", "--max-tokens", "3"]
    words += ["--ignore-eos", "--logprobs", "1", "--prompt", "one apple", "--chat"]
    assert main(words) == 0
    printed = capsys.readouterr()
    table = printed.out[printed.out.index("logprob") :].splitlines()
    assert len(table) == 1 + 3
    assert "3 tokens in" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "2", "--dp", "2"], "--dp-size 2 counts replicas"),
        (["--enable-dp-attention"], "--dp-size N is missing"),
        (["--dp", "2", "--enable-dp-attention", "--attn-dp-size", "4"], "give one of them"),
        (["--tp", "4", "--ep", "3"], "--ep-size 3 does not divide --tp-size 4; 1, 2, 4 would"),
        (["--dtype", "int4"], "--dtype int4: must be one of"),
        (["--max-tokens", "-1"], "max_tokens -1: must be at least 0"),
        (["--model", "/nowhere"], "--model-path /nowhere: no such folder"),
        (["--max-tok", "1"], "unrecognized arguments: --max-tok"),
        (["--page-size", "x"], "--page-size: invalid int value: 'x'"),
    ],
)
def test_wrong_use_is_one_line_and_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["generate", "--prompt", "x", *words])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("isomoe: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_no_flags_are_the_defaults_and_sglangs_spellings_are_known() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_options(parser)
    assert engine_config_from(parser.parse_args([])) == EngineConfig()
    for words in (
        "--tp-size 8 --attn-dp-size 4 --ep-size 8",
        "--tensor-parallel-size 8 --attention-data-parallel-size 4 --expert-parallel-size 8",
        "--tp 8 --dp 4 --enable-dp-attention --ep 8",
        "--tp 8 --data-parallel-size 4 --enable-dp-attention --ep 8 --dp-size 4",
    ):
        config = engine_config_from(parser.parse_args(words.split()))
        assert config.parallelism == Parallelism(tp_size=8, attn_dp_size=4, ep_size=8)
    with pytest.raises(ConfigError):
        engine_config_from(parser.parse_args(["--page-size", "0"]))


def test_help_is_there_without_torch() -> None:
    code = (
        "import sys\nfrom isomoe.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert generate.NAME in COMMANDS


@pytest.mark.slow
def test_ctrl_c_ends_quietly_with_130(text_folder: Path) -> None:
    words = ["generate", "--model", str(text_folder), "--device", "cpu", "--tp", "2"]
    words += ["--context-length", "256", "--max-tokens", "200", "--ignore-eos", "--prompts", "-"]
    command = [sys.executable, "-m", "isomoe.cli.main", *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        running.stdin.write("one apple\n" * 5000)
        running.stdin.close()
        time.sleep(6)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 130
        assert running.stdout is not None
        assert running.stderr is not None
        assert (running.stdout.read(), running.stderr.read()) == ("", "")
