"""`LLM` on several ranks, each a process.

Every layout gives what one rank gives. Whatever ends a worker ends the engine at once, with the
rank and the cause, and leaves nothing behind.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_llm import GREEDY, PROMPTS, same

from isomoe.engine import LLM, Request, RequestOutput, SamplingParams
from isomoe.engine.processes import ProcessExecutor
from isomoe.errors import CheckpointError, EngineDeadError

TP2 = {"tp_size": 2}
DP2 = {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2}
TP4 = {"tp_size": 4, "attn_dp_size": 2, "ep_size": 4}
ENDLESS = SamplingParams(max_tokens=240, temperature=0.0)
DEADLINE_SECONDS = 5.0


def executor_of(llm: LLM) -> ProcessExecutor:
    assert isinstance(llm.core.executor, ProcessExecutor)
    return llm.core.executor


def running(pids: list[int]) -> list[int]:
    """Those that still exist, zombies included."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def children() -> set[int]:
    """Processes that this one has started and not waited for."""
    listed = Path("/proc/self/task").glob("*/children")
    return {int(pid) for file in listed for pid in file.read_text().split()}


def generate_forever(llm: LLM) -> None:
    while True:
        llm.generate(PROMPTS, ENDLESS)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    before, files = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() == before
    assert list(scratch.iterdir()) == []
    # torch's store makes one pipe of its own, once in the life of this process.
    assert len(os.listdir("/proc/self/fd")) <= files + 2


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    with LLM(str(folder), device="cpu") as llm:
        return llm.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize(
    "layout", [DP2, *(pytest.param(each, marks=pytest.mark.slow) for each in (TP2, TP4))], ids=str
)
def test_every_layout_gives_what_one_rank_gives(
    folder: Path, expected: list[RequestOutput], layout: dict[str, int]
) -> None:
    with LLM(str(folder), device="cpu", **layout) as llm:  # type: ignore[arg-type]
        same(llm.generate(PROMPTS, GREEDY), expected)
        # One request leaves the other attention groups without any.
        same(llm.generate(PROMPTS[1], GREEDY), expected[1:2])
        params = SamplingParams(max_tokens=10, temperature=0.9, top_k=20, seed=5)
        drawn = llm.generate(PROMPTS, params)
    with LLM(str(folder), device="cpu") as llm:
        assert [one.token_ids for one in llm.generate(PROMPTS, params)] == [
            one.token_ids for one in drawn
        ]


@pytest.mark.slow
def test_chunks_and_mixed_batches_on_several_ranks(
    folder: Path, expected: list[RequestOutput]
) -> None:
    with LLM(
        str(folder), device="cpu", chunked_prefill_size=5, max_running_requests=2, **DP2
    ) as llm:
        same(llm.generate(PROMPTS * 3, GREEDY), expected * 3)


def test_a_killed_worker_ends_the_engine_with_rank_and_cause(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", **DP2)
    executor = executor_of(llm)
    port = executor._rendezvous.port if executor._rendezvous else 0
    pids = executor.pids
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        os.kill(pids[1], signal.SIGKILL)

    timer = threading.Timer(0.3, kill)
    timer.start()
    cause = rf"^rank 1 \(process {pids[1]}\) was killed by SIGKILL$"
    with pytest.raises(EngineDeadError, match=cause):
        generate_forever(llm)
    assert time.monotonic() - killed[0] < DEADLINE_SECONDS
    timer.join()
    with pytest.raises(EngineDeadError, match=cause):
        llm.generate(PROMPTS)
    assert running(pids) == []
    assert not [name for name in os.listdir("/dev/shm") for pid in pids if str(pid) in name]
    del llm, executor
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_worker_that_raises_ends_the_engine_with_rank_and_cause(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", instrument="planted:raises_on_rank_1", **TP2)
    pids = executor_of(llm).pids
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"^rank 1 \(.*\) raised ZeroDivisionError: planted"):
        generate_forever(llm)
    assert time.monotonic() - start < DEADLINE_SECONDS
    assert running(pids) == []


def test_an_error_at_load_is_the_parents_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file") as caught:
        LLM(str(tmp_path), device="cpu", **TP2)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="SIGKILL"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_workers_end_with_their_parent(folder: Path, how: signal.Signals) -> None:
    # No `__main__` guard, on purpose.
    script = (
        "from isomoe.engine import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, device='cpu', tp_size=2)\n"
        "print(*llm.core.executor.pids, flush=True)\n"
        "while True:\n"
        "    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=200, temperature=0.0))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(running(pids)) == 2
        time.sleep(0.2)
        parent.send_signal(how)
        parent.wait(DEADLINE_SECONDS)
        assert parent.stderr is not None
        if how is signal.SIGINT:
            assert parent.stderr.read().rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while running(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(pids) == []


@pytest.mark.slow
def test_an_engine_that_nobody_holds_ends(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", **TP2)  # type: ignore[arg-type]
    pids = executor_of(llm).pids
    del llm
    assert running(pids) == []


def test_a_large_answer_and_a_large_step_pass_one_another() -> None:
    """Each more than a pipe holds: a step goes out while the last one's answer comes in."""
    with LLM(device="cpu", max_total_tokens=260_000, **TP2) as llm:
        core = llm.core
        core._depth = 2
        long = [30 + index % 500 for index in range(1000)]
        scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=20)
        core.add(Request(request_id=0, prompt_token_ids=tuple(long), params=scored, max_tokens=1))
        first = core.scheduler.schedule()
        assert first is not None
        core.executor.launch(first)
        core._under_way.append(first)
        short = SamplingParams(max_tokens=1, temperature=0.0)
        for number in range(1, 240):
            prompt = (number, *long)
            core.add(
                Request(request_id=number, prompt_token_ids=prompt, params=short, max_tokens=1)
            )
        core.step()
