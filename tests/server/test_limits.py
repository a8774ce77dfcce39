"""Who may ask, how much, for how long, and what is left of clients that go away."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from idle import wait_idle
from starlette.types import Receive, Scope, Send

from isomoe.server.limits import LastResort
from servers import Server, running

KEY = "sk-clé-1234"
"""A key may be any printable text."""
BEARER = {b"Authorization": f"Bearer {KEY}".encode()}
MAX_BYTES = 4096
TIMEOUT_SECONDS = 2.0
CAPACITY = 4
"""One that runs, three that wait."""
FULL = {
    "text": ["1"] * CAPACITY,
    "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True},
}
"""Takes every place. One after the other takes 4000 steps, which is longer than the timeout."""
SHORT = {"text": "1", "sampling_params": {"max_new_tokens": 1}}
LONG = {"text": "1", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}
IDLE_SECONDS = 5.0
OPEN = {"/health", "/ping"}


@pytest.fixture(scope="module")
def limited() -> Iterator[Server]:
    """A server with every limit set low."""
    with running(
        *("--max-running-requests", "1", "--max-queued-requests", str(CAPACITY - 1)),
        *("--max-request-bytes", str(MAX_BYTES)),
        *("--request-timeout-seconds", str(TIMEOUT_SECONDS)),
        ISOMOE_API_KEY=KEY,
    ) as one:
        yield one


@pytest.fixture(scope="module")
def client(limited: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=limited.url, headers=BEARER, timeout=60) as one:
        yield one


def idle(client: httpx2.Client) -> None:
    """Waits until no request holds a page."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        state = client.get("/get_server_info").json()
        (group,) = state["internal_states"]
        if not (state["waiting"] or group["running"] or group["used_pages"]):
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


def endpoints(server: Server) -> list[tuple[str, str]]:
    """All of them, as (method, path)."""
    document = httpx2.get(f"{server.url}/openapi.json").json()
    found = [(method, path) for path, methods in document["paths"].items() for method in methods]
    return [*found, ("get", "/openapi.json"), ("get", "/docs"), ("get", "/unknown")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": KEY.encode()},
        {"Authorization": f"Basic {KEY}".encode()},
        {"Authorization": f"Bearer {KEY[:-1]}".encode()},
        {"Authorization": f"Bearer {KEY}5".encode()},
        {"X-Api-Key": KEY.encode()},
    ],
)
def test_without_the_key_everything_but_health_is_closed(
    server: Server, limited: Server, headers: dict[str, Any]
) -> None:
    paths = endpoints(server)
    assert len(paths) > len(OPEN) + 10
    with httpx2.Client(base_url=limited.url, headers=headers, timeout=30) as stranger:
        for method, path in paths:
            answer = stranger.request(method, path)
            if path in OPEN:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert error["type"] == "authentication_error"
            assert error["code"] == "invalid_api_key"
            assert "Authorization: Bearer KEY" in error["message"]
            assert KEY not in answer.text


def test_with_the_key_requests_are_served(client: httpx2.Client) -> None:
    assert client.post("/generate", json=SHORT).status_code == 200
    lower = {b"Authorization": f"bearer  {KEY}".encode()}
    assert client.get("/v1/models", headers=lower).status_code == 200


def test_the_server_does_not_tell_its_key(client: httpx2.Client) -> None:
    for path in ("/get_server_info", "/get_model_info", "/metrics", "/openapi.json"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert KEY not in answer.text
        assert "api_key" not in answer.text


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_413_and_one_at_it_is_not(
    client: httpx2.Client, chunked: bool
) -> None:
    def send(size: int) -> httpx2.Response:
        body = json.dumps(SHORT).encode().ljust(size)
        halves = iter((body[: size // 2], body[size // 2 :]))
        return client.post("/generate", content=halves if chunked else body)

    assert send(MAX_BYTES).status_code == 200
    refused = send(MAX_BYTES + 1)
    assert refused.status_code == 413
    error = refused.json()["error"]
    assert error["message"] == f"the body is larger than the limit of {MAX_BYTES} bytes"
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON"),
        (b'{"text": NaN}', "not valid JSON"),
        (b'{"text": "1"} {}', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1]", "the body"),
        (b'{"text": ' + b"[" * 101 + b"]" * 101 + b"}", "nested more than 100 deep"),
    ],
)
def test_a_body_that_is_not_json_is_400(client: httpx2.Client, body: bytes, said: str) -> None:
    answer = client.post("/generate", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_full_queue_is_429_and_a_request_out_of_time_is_504(client: httpx2.Client) -> None:
    start = time.monotonic()
    with client.stream("POST", "/generate", json={**FULL, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert '"finish_reason":null' in next(lines)
        for path, body in (
            ("/generate", SHORT),
            ("/generate", {**SHORT, "stream": True}),
            ("/v1/completions", {"prompt": "1", "stream": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}]}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 429, path
            assert int(refused.headers["retry-after"]) > 0
            error = refused.json()["error"]
            assert error["type"] == "rate_limit_error"
            assert "--max-queued-requests" in error["message"]
        assert time.monotonic() - start < TIMEOUT_SECONDS
        rest = [line for line in lines if line]
    # The stream had begun with 200, so that its end is told in it.
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error["message"] == f"not finished within {TIMEOUT_SECONDS:g} s"
    assert rest[-1] == "data: [DONE]"
    idle(client)
    assert client.post("/generate", json=SHORT).status_code == 200


def test_a_full_server_spells_the_tokens_of_the_request_that_fills_it(
    client: httpx2.Client,
) -> None:
    asked = {"prompt": "12 * 3", "n": CAPACITY, "max_tokens": 8, "logprobs": 5, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert not [line for line in lines if '"error"' in line]


def test_a_whole_answer_out_of_time_is_504_and_frees_its_place(client: httpx2.Client) -> None:
    start = time.monotonic()
    answer = client.post("/generate", json=FULL)
    assert answer.status_code == 504
    assert TIMEOUT_SECONDS <= time.monotonic() - start < TIMEOUT_SECONDS + 1
    error = answer.json()["error"]
    assert error["message"] == f"not finished within {TIMEOUT_SECONDS:g} s"
    assert error["type"] == "server_error"
    idle(client)
    assert client.post("/generate", json=SHORT).status_code == 200


def leave(server: Server, path: str, body: dict[str, Any], until: bytes) -> None:
    """Asks, and goes away once the answer has come to `until`; at once if that is empty."""
    address = urlsplit(server.url)
    content = json.dumps(body).encode()
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        seen = b""
        while until not in seen:
            seen += connection.recv(1 << 16)


def wait_for_lines(server: Server, since: int, path: str) -> list[str]:
    """The log's lines after `since`, once one of them is about `path`."""
    deadline = time.monotonic() + IDLE_SECONDS
    while not any(f"POST {path} " in line for line in server.log[since:]):
        assert time.monotonic() < deadline, server.log[since:]
        time.sleep(0.02)
    return server.log[since:]


COMPLETION = {"prompt": "1", "max_tokens": 1000, "ignore_eos": True}
CHAT = {**COMPLETION, "messages": [{"role": "user", "content": "1"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", LONG), ("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_frees_its_request_and_leaves_one_line(
    server: Server, path: str, body: dict[str, Any], streams: bool
) -> None:
    wait_idle(server, IDLE_SECONDS)
    since = len(server.log)
    leave(server, path, {**body, "stream": streams}, b"data: {" if streams else b"")
    (line,) = wait_for_lines(server, since, path)
    assert f" POST {path} 499 " in line
    wait_idle(server, 1.0)
    httpx2.post(f"{server.url}/nowhere")  # whatever else was logged comes before its line
    assert len(wait_for_lines(server, since, "/nowhere")) == 2


def test_a_client_that_goes_away_in_its_own_request_leaves_one_line(server: Server) -> None:
    since = len(server.log)
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    (line,) = wait_for_lines(server, since, "/generate")
    assert " POST /generate 499 " in line


def test_what_nobody_foresaw_is_500_for_the_client_and_a_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("a secret")

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(LastResort(broken))
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/")

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    (record,) = [one for one in caplog.records if one.name.startswith("isomoe")]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)
