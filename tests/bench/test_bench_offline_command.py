"""`isomoe bench offline` from end to end on the bundled checkpoint, and what it refuses."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isomoe.bench.offline_engine import count_experts, lone_worker, requests_of
from isomoe.bench.offline_workload import OfflineWorkload
from isomoe.bench.profile import profile_workload
from isomoe.cli.main import main
from isomoe.engine import LLM

torch.set_num_threads(1)  # the model is tiny, and idle threads would spin on shared cores

SMALL = ["--num-requests", "4", "--input-len", "8", "--output-len", "24"]


def bench(*words: str) -> int:
    """On the CPU, where there is a GPU too."""
    return main(["bench", "offline", *words, "--device", "cpu"])


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run with everything on."""
    folder = tmp_path_factory.mktemp("offline")
    words = ["--repeats", "2", "--profile-steps", "4", "--commit", "abc"]
    code = bench(*SMALL, *words, "--json", f"{folder}/", "--trace", f"{folder}/trace.json.gz")
    assert code == 0
    (file,) = folder.glob("*-offline.json")
    found: dict[str, Any] = json.loads(file.read_text())
    assert file.name.startswith(found["date"])
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"isomoe: experts", "isomoe: attention"} <= names
    return found


def test_the_document_says_what_the_numbers_depend_on(document: dict[str, Any]) -> None:
    assert document["what"] == "offline"
    assert document["command"].startswith("isomoe ")
    assert document["versions"]["commit"] == "abc"
    assert document["versions"]["torch"]
    assert document["device"]["copy_bytes_per_s"] > 0
    assert document["settings"]["disable_radix_cache"] is True
    assert document["model"]["num_experts"] == 16


def test_the_document_has_each_repeat_beside_the_floor(document: dict[str, Any]) -> None:
    (work,) = document["workloads"]
    assert work["name"] == "custom"
    assert work["figure"] == "decode tokens/s"
    assert len(work["values"]) == len(work["samples"]) == 2
    assert min(work["values"]) <= work["value"] <= max(work["values"])
    for value, sample in zip(work["values"], work["samples"], strict=True):
        assert value == pytest.approx(4 * 23 / (sample["seconds"] - sample["first_seconds"]))
    assert work["share"] == pytest.approx(work["value"] / work["floor"]["value"])
    assert 0.0 < work["share"] < 1.5
    assert "peers" not in work


def test_the_document_tells_of_the_experts(document: dict[str, Any]) -> None:
    experts = document["workloads"][0]["experts"]
    assert experts["rows"] == 4
    assert experts["steps"] == 8
    assert 4.0 <= experts["distinct"] <= 16.0
    assert experts["expected"] == pytest.approx(16 * (1 - 0.75**4), abs=1e-3)
    assert 1.0 <= experts["busiest_over_even"] <= 4.0


def test_the_document_tells_where_the_time_goes(document: dict[str, Any]) -> None:
    profile = document["workloads"][0]["profile"]
    assert (profile["phase"], profile["steps"]) == ("decode", 4)
    assert all(profile["us"][name] > 0 for name in ("attention", "experts", "norms", "gaps"))
    assert sum(profile["us"].values()) == pytest.approx(profile["span_us"], rel=1e-3)


def test_it_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--num-requests", "2", "--input-len", "8", "--output-len", "1") == 0
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    row = next(line for line in lines if line.startswith("custom 2 requests, 8 in, 1 out"))
    assert "input tokens/s" in row
    assert "%" in row
    assert any(line.startswith("time of a step, us custom prefill") for line in lines)
    assert any(line.startswith("experts ") for line in lines)
    assert "repeat 3 of 3" in printed.err


def test_with_json_the_output_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-requests", "1", "--input-len", "4", "--output-len", "16", "--repeats", "1"]
    assert bench(*words, "--profile-steps", "0", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    work = json.loads(line)["workloads"][0]
    assert work["figure"] == "ms/token"
    assert work["lower_is_better"] is True
    assert "profile" not in work


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workloads", "W9"], "--workloads W9: must be among W1, W2, W3, W4"),
        (["--workloads", "W1", "W1"], "--workloads W1 W1: one of them stands there twice"),
        (["--workloads", "W1", "--input-len", "3"], "--workloads --input-len: give either"),
        (["--workloads", "W3"], "workload W3: needs a context of 4097 tokens"),
        (["--num-requests", "0"], "--num-requests 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--profile-steps", "-1"], "--profile-steps -1: must be at least 0"),
        (["--trace", "t.json", "--profile-steps", "0"], "--trace: needs --profile-steps"),
        (["--trace", "t.txt"], "--trace t.txt: must end in .json or .json.gz"),
        (["--trace", "/no/such/t.json"], "--trace /no/such/t.json: there is no folder"),
        (["--max-total-tokens", "32"], "workload custom: needs 96 tokens of KV cache"),
        (["--model-path", "/no/such"], "--model-path /no/such: no such folder"),
    ],
)
def test_wrong_use_is_one_clear_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*words) == 2
    printed = capsys.readouterr()
    assert not printed.out
    last = printed.err.splitlines()[-1]
    assert last.startswith("isomoe: error: ")
    assert said in last


def test_nothing_of_the_server_is_imported() -> None:
    """So that it runs where only the engine is installed."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        words = {"fastapi", "httptools", "msgspec", "prometheus_client", "pydantic", "uvicorn",
                 "uvloop", "zmq"}
        if name.split(".")[0] in words or name.startswith("isomoe.server"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from isomoe.cli.main import main
sizes = "--num-requests 1 --input-len 4 --output-len 16 --repeats 1 --profile-steps 0"
sys.exit(main(["bench", "offline", *sizes.split(), "--device", "cpu", "--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(device="cpu", disable_radix_cache=True, max_total_tokens=4096) as one:
        yield one


def test_requests_that_are_left_early_leave_nothing_behind(llm: LLM) -> None:
    work = OfflineWorkload.custom(3, 8, 50)
    with requests_of(llm, work) as core:
        for _ in range(5):
            core.step()
        assert core.has_work
    assert not core.has_work


def test_what_was_wrapped_is_as_before(llm: LLM) -> None:
    work = OfflineWorkload.custom(2, 8, 20)
    counted = count_experts(llm, work, steps=3)
    assert counted is not None
    assert (counted.rows, counted.steps) == (2, 3)
    assert profile_workload(llm, work, steps=2) is not None
    worker = lone_worker(llm)
    assert worker is not None
    assert worker.use_graphs is True
    assert not any("forward" in vars(leaf) for leaf in worker.model.leaves())


def test_answers_that_end_before_decode_settles_have_no_profile(llm: LLM) -> None:
    work = OfflineWorkload.custom(1, 8, 3)
    assert profile_workload(llm, work, steps=2) is None
    assert count_experts(llm, work, steps=2) is None


def test_a_trace_of_several_workloads_is_a_file_each(tmp_path: Path) -> None:
    from isomoe.cli.bench_offline import _trace_file

    asked = str(tmp_path / "trace.json.gz")
    assert _trace_file(asked, "W2") == tmp_path / "trace-W2.json.gz"
    assert _trace_file(asked, None) == tmp_path / "trace.json.gz"
    assert _trace_file(None, "W2") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_kernels_are_sorted_by_name(tmp_path: Path) -> None:
    file = tmp_path / "o.json"
    words = ["--device", "cuda", "--repeats", "1", "--json", str(file)]
    assert main(["bench", "offline", *SMALL, *words]) == 0
    (work,) = json.loads(file.read_text())["workloads"]
    taken = work["profile"]["us"]
    for category in ("attention", "experts", "dense linear", "norms", "routing", "sampling"):
        assert taken[category] > 0.0, category
    layers = 4
    assert work["profile"]["launches"] > 5 * layers
    assert work["profile"]["steps"] == 10
    assert work["experts"]["rows"] == 4
    assert work["experts"]["steps"] == 8
