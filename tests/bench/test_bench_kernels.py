"""Every case agrees with its twin, the tuner keeps what is fastest and right, and files merge."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_floors import CONFIGS, LIMITS, TINY
from torch import Tensor

import gpu_interpreter  # noqa: F401 - before any kernel
from gpu_support import DEVICE
from isomoe.bench import tuner
from isomoe.bench.compile_pool import compile_pool
from isomoe.bench.kernel_bench import Checker, copied, tensors, time_case
from isomoe.bench.kernel_cases import CASES, KernelCase, find_cases
from isomoe.bench.kernel_setting import Prepared, Setting, Sizes
from isomoe.cli.main import main
from isomoe.errors import ConfigError
from isomoe.kernels import Routing
from isomoe.kernels.gpu import configs
from isomoe.models import read_config

CONFIG = {
    **TINY,
    "vocab_size": 600,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "head_dim": 16,
    "num_experts": 8,
    "mlp_only_layers": [],
    "num_hidden_layers": 1,
}
AT = Setting(
    sizes=Sizes.of(CONFIG),
    rows=3,
    context=20,
    device=torch.device(DEVICE),
    dtype=torch.float32,
)


@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_agrees_with_its_twin_and_counts_something(case: KernelCase, rows: int) -> None:
    if not case.takes(rows):
        pytest.skip(f"{case.name} is never called with {rows} rows")
    prepared = case.prepare(replace(AT, rows=rows))
    checker = Checker(prepared, AT.dtype)
    assert checker.holds(checker.error()), checker.error()
    assert prepared.num_bytes > 0
    found = list(tensors(prepared.twin(*copied(tuple(prepared.inputs[0])))))
    assert all(out.numel() for out in found)


def test_the_router_is_the_models_own() -> None:
    for renormalize in (False, True):
        sizes = Sizes.of({**CONFIG, "norm_topk_prob": renormalize})
        assert sizes.routing == Routing(top_k=2, renormalize=renormalize)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("deepseek-v2-lite", "grouped-query attention"),
        ("ring-mini-linear-2.0", "grouped-query attention"),
        ("gpt-oss-20b", "over all keys"),
        ("mimo-v2-flash", "over all keys"),
        ("sdar-30b-a3b-chat", "over all keys"),
        ("glm-4.5-air", "correction bias"),
    ],
)
def test_a_model_that_the_cases_are_not_of_is_refused(model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sizes.of(read_config(CONFIGS / f"{model}.json"))


def test_what_is_counted_for_one_kernel_is_what_by_hand_it_is() -> None:
    (case,) = find_cases(["linear-o_proj"])
    prepared = case.prepare(AT)
    n, k = 32, 4 * 16
    assert prepared.num_bytes == 4 * (n * k + 3 * (n + k))
    assert prepared.flops == 2 * 3 * n * k
    (case,) = find_cases(["paged_attention-decode"])
    prepared = case.prepare(AT)
    assert prepared.num_bytes == 4 * (2 * 3 * 20 * 2 * 16 + 2 * 3 * 4 * 16)
    assert prepared.flops == 4 * 3 * 20 * 4 * 16


def test_a_wrong_kernel_is_found_out() -> None:
    def prepared(run: Callable[..., Any], exact: bool) -> Prepared:
        x = torch.arange(1.0, 9.0)
        return Prepared(inputs=[(x,)], run=run, twin=lambda x: x.round(), num_bytes=1, exact=exact)

    def wrong(x: Tensor) -> Tensor:
        return x + torch.tensor([0.0] * 7 + [1.0])

    def broken(x: Tensor) -> Tensor:
        return x * float("nan")

    assert Checker(prepared(lambda x: x, False), torch.float32).error() == 0.0
    for run, exact, error in ((wrong, True, 1 / 8), (broken, False, float("inf"))):
        checker = Checker(prepared(run, exact), torch.float32)
        assert checker.error() == error
        assert not checker.holds(checker.error())


def test_a_kernel_that_writes_over_its_inputs_is_checked_on_fresh_ones() -> None:
    (case,) = find_cases(["add_rms_norm"])
    prepared = case.prepare(AT)
    checker = Checker(prepared, AT.dtype)
    for _ in range(2):
        prepared.run(*prepared.inputs[0])
        assert checker.holds(checker.error())


def test_a_case_is_timed() -> None:
    (case,) = find_cases(["route"])
    timing = time_case(case, AT, LIMITS)
    assert timing.is_right
    assert timing.seconds > timing.floor_seconds > 0.0
    assert timing.share == pytest.approx(timing.floor_seconds / timing.seconds)
    assert timing.twin_seconds is not None


def test_names_ask_for_cases() -> None:
    names = [case.name for case in find_cases(["linear", "route", "linear-qkv"])]
    assert names == [
        "linear-qkv",
        "linear-o_proj",
        "linear-router",
        "linear-lm_head",
        "route",
    ]
    assert not any(case.is_variant for case in find_cases(None))
    assert [case.name for case in find_cases(["fused_experts"])] == ["fused_experts"]
    assert find_cases(["fused_experts-grouped_mm"])[0].is_variant
    with pytest.raises(ConfigError, match="kernel softmax: must be among add_rms_norm, "):
        find_cases(["softmax"])


def test_a_kernel_says_what_it_looks_for() -> None:
    (case,) = find_cases(["fused_experts"])
    for rows, kind in ((1, "few"), (18, "grouped")):
        asked = tuner.what_it_asks(case.prepare(replace(AT, rows=rows)))
        assert [one.kernel for one in asked] == [f"experts_{kind}_gate_up", f"experts_{kind}_down"]
        assert {one.shape[:4] for one in asked} == {(8, 2, 32, 16)}
        assert {one.rows for one in asked} == {rows}


@pytest.mark.slow
def test_whatever_a_kernel_looks_for_can_be_tuned() -> None:
    """In bf16, as on GPUs."""
    known = set(tuner.tunable())
    for case in CASES:
        for rows in (1, 18):
            if case.takes(rows) and not case.is_variant:
                at = replace(AT, rows=rows, dtype=torch.bfloat16)
                for asked in tuner.what_it_asks(case.prepare(at)):
                    assert asked.kernel in known, case.name
                    assert tuner.candidates_of(asked, at.dtype), (case.name, rows)


def fake_times(
    monkeypatch: pytest.MonkeyPatch, times: Callable[[configs.Config], float]
) -> configs.Config:
    """Makes a launch of add_rms_norm take what `times` says; returns a configuration of it."""

    def seconds(run: Any, inputs: Any, device: Any, **_: Any) -> float:
        return times(configs.find("add_rms_norm", (32,), 3, {"ROWS": 0}))

    monkeypatch.setattr(tuner, "run_seconds", seconds)
    (case,) = find_cases(["add_rms_norm"])
    (asked,) = tuner.what_it_asks(case.prepare(AT))
    return asked.config


def test_the_fastest_right_candidate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    good = fake_times(
        monkeypatch, lambda config: 2.0 if config["ROWS"] == 0 else config["ROWS"] / 10
    )
    monkeypatch.setattr(
        tuner, "candidates_of", lambda asked, dtype: [{**good, "ROWS": rows} for rows in (4, 1, 2)]
    )
    (case,) = find_cases(["add_rms_norm"])
    (found,) = tuner.tune_case(case, AT, seconds=60)
    assert found.config == {**good, "ROWS": 1}
    assert (found.seconds_before, found.seconds) == (2.0, 0.1)
    assert (found.tried, found.failed, found.left) == (3, {}, 0)
    assert "2,000,000.0 to 100,000.0 us (3 ran)" in found.line(case.name)


def test_what_is_no_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, lambda config: 1.0 if config["ROWS"] == 0 else 0.995)
    (case,) = find_cases(["add_rms_norm"])
    (found,) = tuner.tune_case(case, AT, seconds=60, limit=2)
    assert found.config == found.asked.config
    assert found.seconds == 1.0


def test_candidates_that_fail_or_come_too_late_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = fake_times(monkeypatch, lambda config: 1.0)
    monkeypatch.setattr(
        tuner, "candidates_of", lambda asked, dtype: [good, {"WRONG": 3}, good, good, good]
    )

    def compiles(seconds: float, kernel: str, tried: Any) -> dict[int, str | None]:
        assert kernel == "add_rms_norm"
        return {0: None, 1: None, 2: "out of resources", 3: None}

    (case,) = find_cases(["add_rms_norm"])
    (found,) = tuner.tune_case(case, AT, seconds=60, compiles=compiles)
    assert found.tried == 2
    (broken,) = set(found.failed) - {"out of resources"}
    assert broken.startswith("failed to run")
    assert found.left == 1


def test_a_wrong_candidate_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, lambda config: 1.0 if config["ROWS"] == 0 else 0.1)
    monkeypatch.setattr(tuner.Checker, "error", lambda self: 1.0)
    (case,) = find_cases(["add_rms_norm"])
    assert list(tuner.tune_case(case, AT, seconds=60, limit=2)) == []


def test_an_error_of_the_device_is_not_swallowed() -> None:
    assert tuner.cause_of(ValueError("no")) == "failed to run (ValueError)"
    with pytest.raises(RuntimeError):
        tuner.cause_of(RuntimeError("CUDA error: an illegal memory access was encountered"))


def found_for(kernel: str, rows: int, **config: int) -> tuner.Found:
    asked = tuner.Asked(kernel=kernel, shape=(8, 2), rows=rows, config={})
    return tuner.Found(asked=asked, config=config, seconds=1.0, seconds_before=2.0)


def test_a_file_is_merged_and_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "card.json"
    tuner.merge(file, [found_for("b", 16, X=1), found_for("b", 2, X=2)])
    tuner.merge(file, [found_for("a", 1, Y=3), found_for("b", 16, X=4)])
    assert configs.read(file) == {
        "a": {"8x2": {"1": {"Y": 3}}},
        "b": {"8x2": {"2": {"X": 2}, "16": {"X": 4}}},
    }
    assert list(configs.read(file)["b"]["8x2"]) == ["2", "16"]
    assert [path.name for path in file.parent.iterdir()] == ["card.json"]


@pytest.mark.skipif(DEVICE != "cpu", reason="the processes run Triton's interpreter")
def test_a_process_compiles_and_tells_what_failed() -> None:
    (case,) = find_cases(["add_rms_norm"])
    (asked,) = tuner.what_it_asks(case.prepare(AT))
    tried = [asked.config, {"WRONG": 1}, asked.config]
    with compile_pool(1) as pool:
        outcomes = pool.compile("add_rms_norm", AT, 60.0, "add_rms_norm", tried[:2])
        assert outcomes[0] is None
        assert str(outcomes[1]).startswith("failed to run")
        pool._compilers[0]._process.kill()  # type: ignore[union-attr]
        assert pool.compile("add_rms_norm", AT, 60.0, "add_rms_norm", tried[:1]) == {0: "crashed"}
        assert pool.compile("add_rms_norm", AT, 0.0, "add_rms_norm", tried) == {}


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(CONFIG))
    return str(file)


def test_the_kernel_command_prints_a_table_and_a_document(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model-path", model, "--rows", "2", "3", "--dtype", "float32"]
    code = main(["bench", "kernel", "route", "greedy", *words, "--json", str(tmp_path / "k.json")])
    assert code == 0
    printed = capsys.readouterr()
    rows = [line.split()[:2] for line in printed.out.splitlines() if "%" in line]
    assert rows == [["route", "2"], ["route", "3"], ["greedy", "2"], ["greedy", "3"]]
    document = json.loads((tmp_path / "k.json").read_text())
    assert document["what"] == "kernels"
    assert document["model"]["name"] == "tiny"
    assert [one["rows"] for one in document["kernels"]] == [2, 3, 2, 3]
    assert all(one["is_right"] and one["us"] > 0 for one in document["kernels"])


def test_the_kernel_command_lists_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernel", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in CASES]


def test_the_kernel_command_ends_with_1_if_a_kernel_is_wrong(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("isomoe.bench.kernel_bench.Checker.error", lambda self: 0.5)
    words = ["--model-path", model, "--rows", "2", "--dtype", "float32", "--json"]
    assert main(["bench", "kernel", "route", *words]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kernels"][0]["is_right"] is False
    assert printed.err.splitlines()[-1] == "isomoe: route with 2 rows is off its twin by 0.5"


def test_the_tune_command_writes_a_file(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "card.json"
    words = ["--model-path", model, "--rows", "2", "--dtype", "float32", "--max-candidates", "2"]
    code = main(["tune", "--kernels", "add_rms_norm", "route", *words, "--out", str(out), "--json"])
    assert code == 0
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)["found"]
    assert (found["kernel"], found["shape"], found["rows"]) == ("add_rms_norm", "32", 2)
    assert configs.read(out) == {"add_rms_norm": {"32": {"2": found["config"]}}}
    assert "add_rms_norm 32, 2 rows" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "kernel"], "give the kernels' names, or --all"),
        (["bench", "kernel", "route", "--all"], "give the kernels' names, or --all"),
        (["bench", "kernel", "softmax"], "kernel softmax: must be among"),
        (["bench", "kernel", "route", "--rows", "0"], "--rows 0: must be at least 1"),
        (["bench", "kernel", "route", "--dtype", "int8"], "--dtype int8: must be one of"),
        (["bench", "kernel", "route", "--dtype", "auto"], "--dtype auto: must be"),
        (["bench", "kernel", "route", "--model-path", "/no/such"], "/no/such: no such folder"),
        (["tune", "--seconds", "0"], "--seconds 0: must be above 0"),
        (["tune", "--max-candidates", "0"], "--max-candidates 0: must be at least 1"),
        (["tune", "--compilers", "-1"], "--compilers -1: must be at least 0"),
        (["tune", "--kernels", "softmax"], "kernel softmax: must be among"),
    ],
)
def test_wrong_use_is_one_clear_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("isomoe: error: ")
    assert said in line


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_without_a_gpu_the_commands_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--kernels", "route"]) == 2
    assert "--out: is needed without a GPU" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    for words in (["tune"], ["bench", "kernel", "--all"]):
        assert main(words) == 2
        assert "there is no GPU here" in capsys.readouterr().err
