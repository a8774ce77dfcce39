import argparse
import json
import os
import signal
from pathlib import Path

import pytest
from fake_server import FakeServer

from isomoe.bench import BenchRequest, OfflineEngine
from isomoe.cli import bench_serve
from isomoe.cli.main import main
from isomoe.cli.options import add_engine_options
from isomoe.config import EngineConfig
from isomoe.errors import CheckpointError, EngineDeadError

SMALL = ["--num-prompts", "6", "--input-len", "5", "--output-len", "4", "--max-concurrency", "3"]


def bench(*words: str) -> int:
    return main(["bench", "serve", *words])


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_it_prints_the_table_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert bench("--url", server.url, *SMALL) == 0
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert "Successful requests: 6" in lines
    assert "Total input tokens: 30" in lines
    assert "Total generated tokens: 24" in lines
    assert "Peak concurrent requests: 3" in lines
    assert "error" not in printed.err
    assert len(server.requests) == 1 + 1 + 6, "one to ask, one to warm up"
    assert 1 < server.most_open <= 3


def test_with_json_the_output_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert bench("--url", server.url + "/v1", *SMALL, "--json", "--warmup", "0") == 0
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert document["completed"] == 6
    assert document["total_output_tokens"] == 24
    assert document["conditions"]["prompts"] == "random token ids below 40"
    assert document["conditions"]["max_concurrency"] == 3
    assert document["conditions"]["request_rate"] is None
    assert document["conditions"]["model"] == "fake"


def test_one_failed_request_makes_it_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(breaks="refuse") as server:
        assert bench("--url", server.url, *SMALL, "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["failed"] == 6
    assert printed.err == ("isomoe: 6 requests failed, the first: 400 Bad Request: too long\n")


def test_waves_with_a_shared_prefix_show_what_the_cache_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FakeServer() as server:
        words = ["--waves", "2", "--shared-prefix-len", "16", "--max-concurrency", "6", "--json"]
        assert bench("--url", server.url, *SMALL[:-2], *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["completed"] == 12
    assert document["total_input_tokens"] == 12 * 21
    first, second = document["waves"]
    assert second["cached_input_tokens"] >= 6 * 16
    assert first["cached_input_tokens"] < second["cached_input_tokens"]
    assert first["ttft_ratio"] == 1.0
    assert second["ttft_ratio"] > 0.0


def test_chat_sends_words(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert bench("--url", server.url, *SMALL, "--endpoint", "chat", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["conditions"]["prompts"] == "random words"
    assert document["total_input_tokens"] == 30
    assert len(server.requests[-1]["messages"][0]["content"].split()) == 5


def test_the_prompts_of_a_dataset_are_sent_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    texts = ["first of all", "the second", "and third"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with FakeServer() as server:
        words = ["--dataset", str(file), "--max-concurrency", "1", "--output-len", "2", "--json"]
        assert bench("--url", server.url, *words) == 0
        assert [body["prompt"] for body in server.requests[-3:]] == texts
        assert bench("--url", server.url, *words, "--num-prompts", "2") == 0
        assert [body["prompt"] for body in server.requests[-2:]] == texts[:2]
        assert bench("--url", server.url, *words, "--num-prompts", "4") == 2
    assert "prompts.jsonl has 3" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_and_is_never_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer(key="k-123") as server:
        assert bench("--url", server.url, *SMALL) == 2
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-456")
        assert bench("--url", server.url, *SMALL) == 2
        monkeypatch.setenv("OTHER_KEY", "k-123")
        assert bench("--url", server.url, *SMALL, "--json", "--api-key-env", "OTHER_KEY") == 0
        monkeypatch.setenv("OTHER_KEY", "k-123\r\nX: y")
        assert bench("--url", server.url, *SMALL, "--api-key-env", "OTHER_KEY") == 2
    printed = capsys.readouterr()
    assert "401 Unauthorized: wrong key" in printed.err
    for secret in ("k-123", "wrong-456"):
        assert secret not in printed.out + printed.err


def test_documents_gather_in_the_output_file(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with FakeServer() as server:
        for seed in ("1", "2"):
            words = ["--seed", seed, "--output-file", str(file)]
            assert bench("--url", server.url, *SMALL, *words) == 0
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    assert [document["conditions"]["seed"] for document in documents] == [1, 2]


def test_a_server_that_is_not_there_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        pass
    assert bench("--url", server.url, *SMALL) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"isomoe: error: --url {server.url}: not reachable")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--url localhost", "--url localhost: must be like"),
        ("--url http://h --launch", "give one of them"),
        ("--tp 2", "--tp-size: is for the server that --launch starts"),
        ("--disable-radix-cache", "--disable-radix-cache: is for the server"),
        ("--compare-offline", "--compare-offline: needs --launch"),
        ("--launch --compare-offline --waves 2", "do not go with it"),
        ("--launch --compare-offline --endpoint chat", "do not go with it"),
        ("--launch --compare-offline --request-rate 3", "do not go with it"),
        ("--repeats 3", "--repeats: is for --compare-offline"),
        ("--launch --compare-offline --repeats 0", "--repeats 0: must be at least 1"),
        ("--num-prompts 0", "--num-prompts 0: must be at least 1"),
        ("--max-concurrency 0", "--max-concurrency 0: must be at least 1"),
        ("--request-rate 0", "--request-rate 0.0: must be above 0"),
        ("--request-rate nan", "--request-rate nan: must be above 0"),
        ("--warmup -1", "--warmup -1: must be at least 0"),
        ("--timeout 0", "--timeout 0: must be above 0"),
        ("--vocab-size 0", "--vocab-size 0: must be at least 1"),
        ("--endpoint embeddings", "must be one of completions, chat"),
        ("--dataset none.jsonl", "--dataset none.jsonl: not readable"),
        ("--dataset x --waves 2", "are for random prompts"),
        ("--launch --tp 3 --model none/such/folder", "isomoe serve ended with 2: isomoe: error:"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message in line


def test_a_measurement_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["train"], ["serve", "--num-prompt", "3"]):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *words])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("isomoe: error: ")


def test_every_flag_of_the_engine_reaches_the_launched_server() -> None:
    engine, whole = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_engine_options(engine)
    bench_serve.add_arguments(whole)
    defaults = vars(engine.parse_args([]))
    assert len(defaults) > 15
    for name, default in defaults.items():
        value = [] if isinstance(default, bool) else ["7"]
        typed = [f"--{name.replace('_', '-')}", *value]
        args = whole.parse_args(["--launch", *typed])
        words = bench_serve._engine_words(args)
        assert engine.parse_args(words) == engine.parse_args(typed)
        assert vars(engine.parse_args(words))[name] != default
    assert bench_serve._engine_words(whole.parse_args(["--tp", "1", "--seed", "4"])) == []


def test_a_launched_server_is_measured_and_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--launch", *SMALL, "--shared-prefix-len", "64", "--waves", "2", "--json"]
    assert bench(*words) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert "error" not in printed.err
    assert document["completed"] == 12
    assert document["total_input_tokens"] == 12 * 69
    assert document["total_output_tokens"] == 12 * 4
    assert document["conditions"]["prompts"] == "random token ids below 640"
    assert document["conditions"]["launched"] == "isomoe serve"
    assert document["waves"][1]["cached_input_tokens"] >= 6 * 64
    with pytest.raises(ConnectionRefusedError):
        _connect(document["conditions"]["url"])


def _connect(url: str) -> None:
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    socket.create_connection((parts.hostname, parts.port or 0), timeout=5).close()


@pytest.mark.slow
def test_the_server_is_compared_with_the_offline_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--launch", "--compare-offline", *SMALL, "--attn-dp-size", "2", "--tp", "2", "--json"]
    assert bench(*words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["completed"] == 2 * 6
    assert document["total_output_tokens"] == 2 * 6 * 4
    assert document["conditions"]["warmup"] == 3
    assert document["conditions"]["launched"] == (
        "isomoe serve --tp-size 2 --attn-dp-size 2 --max-running-requests 2"
    )
    offline = document["offline"]
    assert len(offline["rounds"]) == 2
    rates = [one["online_output_throughput"] for one in offline["rounds"]]
    assert offline["online_output_throughput"] == pytest.approx(sum(rates) / 2, abs=1e-2)


def test_the_offline_engine_answers_and_its_end_is_said() -> None:
    requests = [BenchRequest(prompt=(1, 2, 3), max_tokens=3)] * 2
    with OfflineEngine(EngineConfig()) as engine:
        done = engine.run(requests, ignore_eos=True)
        assert done.output_tokens == 6
        assert done.seconds > 0.0
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="the offline engine's process ended by SIGKILL"):
            engine.run(requests, ignore_eos=True)


def test_what_the_offline_engine_refuses_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        OfflineEngine(EngineConfig(model_path=str(tmp_path)))
