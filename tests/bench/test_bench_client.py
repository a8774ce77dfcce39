import asyncio
import errno

import pytest
from fake_server import FakeServer

from isomoe.bench import (
    BenchRequest,
    Endpoint,
    OpenAIClient,
    Outcome,
    Workload,
    send_all,
)
from isomoe.bench.metrics import Run
from isomoe.http import HttpClient, Url

REQUEST = BenchRequest(prompt=(1, 2, 3, 4), max_tokens=6)
TEXT = BenchRequest(prompt="one two three four", max_tokens=6)


def measure(
    server: FakeServer,
    request: BenchRequest = REQUEST,
    endpoint: Endpoint = Endpoint.COMPLETIONS,
    timeout_seconds: float = 20.0,
) -> Outcome:
    async def main() -> Outcome:
        client = OpenAIClient(
            HttpClient(Url.parse(server.url)), endpoint, "fake", True, timeout_seconds
        )
        try:
            return await client.measure(request)
        finally:
            client.http.close()

    return asyncio.run(main())


def test_tokens_are_the_servers_count_and_not_the_chunks() -> None:
    with FakeServer(tokens_per_chunk=4) as server:
        found = measure(server)
    assert found.error is None
    assert (found.prompt_tokens, found.output_tokens, found.is_counted) == (4, 6, True)
    assert len(found.arrivals) == 2
    assert found.sent < found.arrivals[0] <= found.arrivals[1] <= found.ended


def test_without_usage_chunks_are_counted_and_it_says_so() -> None:
    with FakeServer(has_usage=False) as server:
        found = measure(server)
    assert (found.prompt_tokens, found.output_tokens, found.is_counted) == (0, 6, False)


def test_a_request_is_greedy_streamed_and_of_exact_length() -> None:
    with FakeServer() as server:
        measure(server)
        measure(server, TEXT, Endpoint.CHAT)
    common = {
        "model": "fake", "max_tokens": 6, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    assert server.requests[0] == {**common, "prompt": [1, 2, 3, 4]}
    message = {"role": "user", "content": "one two three four"}
    assert server.requests[1] == {**common, "messages": [message]}


def test_the_first_token_of_a_chat_is_not_the_chunk_with_the_role() -> None:
    with FakeServer(seconds=0.02) as server:
        found = measure(server, TEXT, Endpoint.CHAT)
    assert len(found.arrivals) == found.output_tokens == 6
    assert found.ttft >= 0.02
    assert all(gap > 0.0 for gap in found.itl)


def test_the_time_to_the_first_token_is_what_the_server_took() -> None:
    with FakeServer(seconds=0.05) as server:
        found = measure(server)
    assert found.ttft >= 0.05
    assert found.e2e >= 0.3
    assert found.tpot is not None
    assert found.tpot >= 0.05


def test_cached_tokens_are_read_from_the_usage() -> None:
    with FakeServer() as server:
        measure(server)
        again = measure(server, BenchRequest(prompt=(1, 2, 3, 9, 9), max_tokens=1))
    assert again.cached_tokens == 3


@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        ("refuse", "400 Bad Request: too long"),
        ("error-event", "the engine is gone"),
        ("abort", "the server aborted the request"),
        ("no-done", "the stream ended without [DONE]"),
        ("cut", "the server closed the connection in mid-response"),
        ("empty", "the answer is empty"),
        ("garbage", "an event is no chunk of OpenAI's: b'[1]'"),
        ("stall", "no end after 0.2 s"),
    ],
)
def test_an_answer_that_goes_wrong_is_a_failure_that_says_why(breaks: str, error: str) -> None:
    with FakeServer(breaks=breaks) as server:
        found = measure(server, timeout_seconds=0.2 if breaks == "stall" else 20.0)
    assert found.error == error


def test_a_server_that_is_not_there_is_a_failure() -> None:
    with FakeServer() as server:
        pass
    assert f"[Errno {errno.ECONNREFUSED}]" in (measure(server).error or "")


def send(server: FakeServer, count: int, **load: float | None) -> Run:
    async def main() -> Run:
        http = HttpClient(Url.parse(server.url))
        client = OpenAIClient(http, Endpoint.COMPLETIONS, "fake", True, 20.0)
        requests = Workload(num_prompts=count, input_len=5, output_len=3).wave(0, 30)
        try:
            return await send_all(client, requests, **load)  # type: ignore[arg-type]
        finally:
            http.close()

    return asyncio.run(main())


def test_no_more_requests_are_open_than_allowed_and_their_connections_are_reused() -> None:
    with FakeServer(seconds=0.01) as server:
        run = send(server, 20, max_concurrency=4)
    assert all(outcome.error is None for outcome in run.outcomes)
    assert run.peak == server.most_open == server.connections == 4
    assert run.seconds >= 5 * 3 * 0.01
    assert [body["prompt"] for body in server.requests] == [
        list(request.prompt)
        for request in Workload(num_prompts=20, input_len=5, output_len=3).wave(0, 30)
    ], "they leave in order"


def test_without_a_bound_all_are_open_at_once() -> None:
    with FakeServer(seconds=0.05) as server:
        assert send(server, 20).peak == server.most_open == 20


def test_a_rate_spaces_the_requests() -> None:
    with FakeServer() as server:
        run = send(server, 40, request_rate=100.0, seed=1)
    sent = [outcome.sent for outcome in run.outcomes]
    assert sent == sorted(sent)
    assert 0.2 < sent[-1] - sent[0] < 1.2
    assert run.peak < 40


def test_a_failure_does_not_hold_the_others_up() -> None:
    with FakeServer(breaks="cut") as server:
        run = send(server, 6, max_concurrency=2)
    assert len(run.outcomes) == 6
    assert {outcome.error for outcome in run.outcomes} == {
        "the server closed the connection in mid-response"
    }
