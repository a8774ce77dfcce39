"""Wrong flags of the ways between attention and experts: one line, and exit code 2."""

import json
from pathlib import Path

import pytest

from isomoe.cli.main import main
from isomoe.weights import bundled_checkpoint

GROUPS = ("--tp", "2", "--ep", "2")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code, and the one line on stderr; nothing may go to stdout."""
    try:
        code = main(list(words))
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return code, printed.err


@pytest.mark.parametrize("command", [("plan",), ("generate", "--device", "cpu", "--prompt", "1")])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--moe-a2a-backend", "x"), "--moe-a2a-backend x: must be one of none, torch"),
        (("--moe-wire-format", "x"), "--moe-wire-format x: must be one of none, fp8, nvfp4"),
        (("--moe-wire-format", "FP8"), "--moe-wire-format FP8: must be one of none, fp8, nvfp4"),
        (("--moe-a2a-backend", ""), "--moe-a2a-backend : must be one of none, torch"),
        (
            ("--tp", "2", "--moe-a2a-backend", "torch"),
            "--moe-a2a-backend torch: needs experts on several groups of ranks; --ep-size 2 would",
        ),
        (
            ("--ep-num-redundant-experts", "2"),
            "--ep-num-redundant-experts 2: needs experts on several groups of ranks",
        ),
        (
            (*GROUPS, "--ep-num-redundant-experts", "-2"),
            "--ep-num-redundant-experts -2: must be at least 0",
        ),
        (
            (*GROUPS, "--ep-num-redundant-experts", "two"),
            "--ep-num-redundant-experts: invalid int value: 'two'",
        ),
        ((*GROUPS, "--ep-num-redundant-experts", "1"), "over 2 EP ranks; 0 or 2 would"),
    ],
)
def test_a_wrong_way_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    words: tuple[str, ...],
    message: str,
) -> None:
    code, line = said(capsys, *command, *words)
    assert code == 2
    assert message in line
    assert line.startswith("isomoe: error: ")


@pytest.mark.parametrize("layout", [(), GROUPS])
def test_rows_that_nvfp4_cannot_hold_are_one_line_and_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    config = json.loads((bundled_checkpoint() / "config.json").read_text())
    config["hidden_size"] = 264
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--model-path", str(tmp_path), *layout, "--moe-wire-format")
    run = ("generate", "--device", "cpu", "--load-format", "dummy", "--prompt", "1")
    for command in (("plan",), run):
        code, line = said(capsys, *command, *words, "nvfp4")
        assert code == 2
        assert "--moe-wire-format nvfp4: rows of 264 values do not split into runs of 16" in line
        assert "fp8 would work" in line
    assert main(["plan", *words, "fp8"]) == 0


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("plan", GROUPS, "--ep-size 2"),
        ("generate", ("--moe-wire-format", "fp8"), "--moe-wire-format fp8"),
        (
            "serve",
            (*GROUPS, "--moe-a2a-backend", "deepep", "--init-expert-location", "load.json"),
            "--ep-size 2, --moe-a2a-backend deepep, --init-expert-location load.json",
        ),
        ("serve", ("--record-expert-load",), "recording the experts' load"),
        ("generate", ("--expert-load", "OUT/load.json"), "recording the experts' load"),
        ("eval", ("--task", "arith", *GROUPS), "--ep-size 2"),
        ("parity", ("tp1", "tp2,ep2"), "--ep-size 2"),
    ],
)
def test_flags_of_experts_are_refused_by_a_model_without_any(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    words: tuple[str, ...],
    message: str,
) -> None:
    config = json.loads((bundled_checkpoint() / "config.json").read_text())
    config["mlp_only_layers"] = list(range(config["num_hidden_layers"]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = () if command == "plan" else ("--device", "cpu", "--load-format", "dummy")
    more = {"generate": ("--prompt", "1"), "serve": ("--port", "0")}.get(command, ())
    words = tuple(word.replace("OUT", str(tmp_path)) for word in words)
    code, line = said(capsys, command, "--model-path", str(tmp_path), *engine, *more, *words)
    assert code == 2
    assert f"{message}: the model has no routed experts; it works without" in line


def test_a_location_needs_several_groups(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--device", "cpu", "--prompt", "1", "--init-expert-location", str(tmp_path / "none"))
    code, line = said(capsys, "generate", *words)
    assert code == 2
    assert "--init-expert-location: there is one group of ranks for all experts" in line
    code, line = said(capsys, "generate", *GROUPS, *words)
    assert code == 2
    assert f"--init-expert-location {tmp_path / 'none'}: not readable as JSON" in line
