"""One line for every HTTP request."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from servers import Server, running

KEY = "sk-must-stay-secret"
BEARER = {"Authorization": f"Bearer {KEY}"}
GREEDY = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
WAIT_SECONDS = 5.0


@pytest.fixture(scope="module")
def talkative() -> Iterator[Server]:
    """A server that logs bodies, and has a key to keep."""
    with running("--log-requests", "--api-key", KEY) as one:
        yield one


def line_of(server: Server, request_id: str) -> str:
    """The one line about a request."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := [line for line in server.log if f" {request_id} " in line]):
        assert time.monotonic() < deadline, server.log[-3:]
        time.sleep(0.02)
    (line,) = found
    return line


def field(line: str, name: str) -> str:
    found = re.search(rf" {name}=(\S+)", line)
    assert found is not None, line
    return found[1]


def ask(server: Server, path: str, body: Any, request_id: str, **headers: str) -> httpx2.Response:
    return httpx2.post(
        f"{server.url}{path}",
        json=body,
        headers={"X-Request-Id": request_id, **headers},
        timeout=60,
    )


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_is_one_line_with_id_tokens_and_latencies(server: Server, streams: bool) -> None:
    start = time.monotonic()
    body = {"input_ids": [9] * 7, "sampling_params": GREEDY, "stream": streams}
    answer = ask(server, "/generate", body, f"line-{streams}")
    took = time.monotonic() - start
    assert answer.headers["x-request-id"] == f"line-{streams}"
    line = line_of(server, f"line-{streams}")
    assert f" I line-{streams} POST /generate 200 " in line
    assert field(line, "prompt_tokens") == "7"
    assert field(line, "output_tokens") == "5"
    assert field(line, "cached_tokens") == "0"
    assert field(line, "finish") == "length"
    first, total = (float(field(line, name).removesuffix("s")) for name in ("ttft", "total"))
    assert 0 <= first <= total <= took
    assert total > 0


def test_a_batch_is_one_line_with_the_tokens_of_all(server: Server) -> None:
    sampling = [{**GREEDY, "max_new_tokens": length} for length in (2, 3)]
    body = {"input_ids": [[9], [9, 9]], "sampling_params": sampling}
    ask(server, "/generate", body, "batch")
    line = line_of(server, "batch")
    assert field(line, "prompt_tokens") == "3"
    assert field(line, "output_tokens") == "5"


def test_a_stream_that_was_left_tells_what_it_had_brought(server: Server) -> None:
    body = {"text": "1", "sampling_params": {**GREEDY, "max_new_tokens": 900}, "stream": True}
    headers = {"X-Request-Id": "left"}
    with httpx2.stream("POST", f"{server.url}/generate", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    line = line_of(server, "left")
    assert " I left POST /generate 499 " in line
    assert field(line, "finish") == "abort"
    assert 0 < int(field(line, "output_tokens")) < 900


def test_the_id_of_a_completion_is_the_one_in_the_log(server: Server) -> None:
    answer = ask(server, "/v1/completions", {"prompt": "1", "max_tokens": 1}, "named")
    assert answer.json()["id"] == "cmpl-named"
    assert " POST /v1/completions 200 " in line_of(server, "named")


@pytest.mark.parametrize("bad", ["two words", "x" * 129, ""])
def test_an_id_that_does_not_fit_a_line_is_replaced(server: Server, bad: str) -> None:
    answer = ask(server, "/generate", {}, bad)
    given = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)
    assert " POST /generate 400 " in line_of(server, given)


def test_refusals_are_logged_and_probes_are_not(server: Server) -> None:
    since = len(server.log)
    for path in ("/health", "/metrics", "/get_server_info"):
        assert httpx2.get(f"{server.url}{path}").status_code == 200
    ask(server, "/nowhere%0Aelse", {}, "refused")
    line = line_of(server, "refused")
    assert r" refused POST '/nowhere\nelse' 404 " in line
    assert server.log[since:] == [line]


def test_contents_are_not_logged_unless_asked_for(server: Server) -> None:
    ask(server, "/generate", {"text": "quite a secret", "sampling_params": GREEDY}, "quiet")
    assert "body=" not in line_of(server, "quiet")
    assert not any("quite a secret" in line for line in server.log)


@pytest.mark.parametrize("streams", [False, True])
def test_log_requests_adds_what_was_asked_and_answered(talkative: Server, streams: bool) -> None:
    name = f"told-{streams}"
    body = {"text": "Mia's\n\u00e9", "sampling_params": GREEDY, "stream": streams}
    answer = ask(talkative, "/generate", body, name, **BEARER)
    assert answer.status_code == 200
    _, _, contents = line_of(talkative, name).rstrip("\n").partition(" body=")
    decoder = json.JSONDecoder()
    asked, end = decoder.raw_decode(contents)
    assert json.loads(asked) == body
    answered = json.loads(contents[end:].removeprefix(" answer="))
    assert answered == answer.text[: len(answered)]
    assert len(answered.encode()) == min(len(answer.content), 2048)


def test_a_long_body_is_cut(talkative: Server) -> None:
    ask(talkative, "/generate", {"text": "apples " * 5000}, "long", **BEARER)
    assert len(line_of(talkative, "long")) < 5000


def test_an_api_key_is_never_logged(talkative: Server) -> None:
    ask(talkative, "/generate", {"text": "1", "sampling_params": GREEDY}, "right", **BEARER)
    ask(talkative, "/generate", {"text": "1"}, "wrong", Authorization="Bearer sk-other-secret")
    ask(talkative, f"/generate?api_key={KEY}", {"text": "1"}, "query", Authorization=f"Basic {KEY}")
    httpx2.get(f"{talkative.url}/get_server_info", headers=BEARER)
    assert " 200 " in line_of(talkative, "right")
    assert " 401 " in line_of(talkative, "wrong")
    assert " 401 " in line_of(talkative, "query")
    assert not any(KEY in line or "sk-other-secret" in line for line in talkative.log)
