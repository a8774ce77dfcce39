"""How a server starts, drains, and ends when a part of it dies. Real processes, real signals."""

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from isomoe.cli.main import main
from isomoe.weights import bundled_checkpoint
from servers import Server, running

LIMIT_SECONDS = 5.0
"""Within this after a death, clients have their error and the process has ended."""
LONG = {"text": "1", "stream": True, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
SHORT = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}
DP2 = ("--tp-size", "2", "--attn-dp-size", "2", "--ep-size", "2")


def exists(pid: int) -> bool:
    """Whether a process lives; one that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(map(exists, pids)):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.05)


async def lines_until_error(server: Server, begun: asyncio.Event) -> list[str]:
    """What one long stream brings; `begun` is set with the first line."""
    lines = []
    async with (
        httpx2.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{server.url}/generate", json=LONG) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line:
                lines.append(line)
                begun.set()
    return lines


async def kill_in_mid_stream(server: Server, pid: int) -> list[list[str]]:
    begun = [asyncio.Event() for _ in range(4)]
    streams = [asyncio.create_task(lines_until_error(server, event)) for event in begun]
    for event in begun:
        await event.wait()
    os.kill(pid, signal.SIGKILL)
    return await asyncio.gather(*streams)


@pytest.mark.parametrize("victim", [pytest.param("worker", marks=pytest.mark.slow), "engine"])
def test_a_dead_part_ends_every_stream_with_an_error_and_the_server_with_exit_code_1(
    victim: str,
) -> None:
    with running(*DP2) as server:
        pid = server.worker_pids[1] if victim == "worker" else server.engine_pid
        killed = time.monotonic()
        for lines in asyncio.run(kill_in_mid_stream(server, pid)):
            assert '"error"' in lines[-2], lines[-2:]
            assert "the engine is gone" in lines[-2]
            assert lines[-1] == "data: [DONE]"
        assert httpx2.get(f"{server.url}/health").status_code == 503
        refused = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "1"})
        assert refused.status_code == 503
        assert "engine is gone" in refused.json()["error"]["message"]
        assert server.process.wait(LIMIT_SECONDS) == 1
        assert time.monotonic() - killed < 2 * LIMIT_SECONDS  # the streams had to begin first
        wait_gone([server.engine_pid, *server.worker_pids])
        assert "was killed by" in "".join(server.log)


@pytest.mark.slow
def test_a_worker_that_dies_while_nothing_runs_ends_the_server() -> None:
    with running("--tp-size", "2") as server:
        os.kill(server.worker_pids[0], signal.SIGKILL)
        assert server.process.wait(LIMIT_SECONDS) == 1
        wait_gone([server.engine_pid, *server.worker_pids])


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "named"), [("worker", "rank 1"), ("engine", "engine process")])
def test_a_part_that_hangs_is_given_up(victim: str, named: str) -> None:
    with running(*DP2, "--watchdog-timeout-seconds", "2") as server:
        pid = server.worker_pids[1] if victim == "worker" else server.engine_pid
        os.kill(pid, signal.SIGSTOP)
        answer = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "1"}, timeout=20)
        assert answer.status_code == 503
        assert named in answer.json()["error"]["message"]
        assert server.process.wait(LIMIT_SECONDS) == 1
        wait_gone([server.engine_pid, *server.worker_pids])


@pytest.mark.slow
def test_requests_that_arrive_while_the_engine_dies_are_answered_and_the_server_ends() -> None:
    async def arrive(server: Server) -> Counter[int | str]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=LIMIT_SECONDS) as client:

            async def ask() -> int | str:
                try:
                    return (await client.post("/generate", json=SHORT)).status_code
                except httpx2.TransportError as error:
                    return type(error).__name__

            asking = []
            for index in range(120):  # 3 seconds; nobody waits for an answer to ask again
                asking.append(asyncio.create_task(ask()))
                if index == 40:
                    os.kill(server.engine_pid, signal.SIGKILL)
                await asyncio.sleep(0.025)
            return Counter(await asyncio.gather(*asking))

    with running() as server:
        found = asyncio.run(arrive(server))
        assert found[503] > 0
        # Once the server has ended nobody listens.
        assert set(found) <= {200, 503, "ConnectError", "ReadError", "RemoteProtocolError"}, found
        assert server.process.wait(LIMIT_SECONDS) == 1


@pytest.mark.slow
def test_nothing_is_left_of_a_front_end_that_was_killed() -> None:
    with running(*DP2) as server:
        server.process.kill()
        wait_gone([server.engine_pid, *server.worker_pids])


def test_sigterm_lets_open_requests_finish_and_takes_no_more() -> None:
    async def drained(server: Server) -> tuple[list[str], bool]:
        begun = asyncio.Event()
        stream = asyncio.create_task(lines_until_error(server, begun))
        await begun.wait()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        try:
            async with httpx2.AsyncClient() as client:
                await client.get(f"{server.url}/health")
        except httpx2.ConnectError:
            return await stream, True
        return await stream, False

    with running() as server:
        lines, refused = asyncio.run(drained(server))
        assert refused
        assert '"length":500' in lines[-2].replace(" ", "")
        assert server.process.wait(LIMIT_SECONDS) == 0
        wait_gone([server.engine_pid])


@pytest.mark.slow
def test_a_drain_that_takes_too_long_is_cut_short_with_exit_code_0() -> None:
    with running("--drain-timeout-seconds", "0") as server:

        async def cut() -> list[str]:
            begun = asyncio.Event()
            stream = asyncio.create_task(lines_until_error(server, begun))
            await begun.wait()
            server.process.send_signal(signal.SIGTERM)
            return await stream

        lines = asyncio.run(cut())
        assert "the server was told to stop" in lines[-2]
        assert lines[-1] == "data: [DONE]"
        assert server.process.wait(LIMIT_SECONDS) == 0
        wait_gone([server.engine_pid])


def test_a_port_in_use_is_said_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port}: Address already in use" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model-path", "/nowhere"), "/nowhere"),
        (("--port", "70000"), "--port 70000: must be from 0 to 65535"),
        (("--max-total-tokens", "3"), "--max-total-tokens 3"),
        (("--chat-template", "/nowhere"), "--chat-template /nowhere: not readable"),
        (("--api-key", ""), "--api-key"),
        (("--tp-size", "3"), "3"),  # the engine process finds out
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["serve", "--port", "0", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("isomoe: error: ")
    assert said in line


def test_an_error_of_the_engine_process_reaches_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for file in bundled_checkpoint().iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert main(["serve", "--port", "0", "--model-path", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: missing model." in line


def test_the_address_and_the_layout_are_told() -> None:
    with running(*DP2) as server:
        pass
    log = "".join(server.log)
    assert "layout tp2,dp2,ep2; plan: " in log
    assert "KV cache: 262144 tokens" in log
    assert f"listening on {server.url}" in log
    assert server.process.returncode == 0
