"""Bodies in, answers and streams out, errors: without a server."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from isomoe.errors import EngineDeadError, RequestError
from isomoe.server.http import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    Json,
    TokenIds,
    at_most,
    check_nesting,
    decode,
    describe_validation,
    disconnected,
    error_response,
    sse,
)

Message = dict[str, Any]


class Client:
    """The other end of one HTTP request."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.got: list[Message] = []

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.got.append(message)

    @property
    def request(self) -> Request:
        return Request({"type": "http"}, self.receive)

    @property
    def events(self) -> list[str]:
        """The data of each event so far."""
        body = b"".join(message.get("body", b"") for message in self.got).decode()
        return [event.removeprefix("data: ") for event in body.split("\n\n") if event]


class Chunks:
    """A stream of chunks; `closed` once its `finally` has run."""

    def __init__(self, *script: Any) -> None:
        self.closed = False
        self._script = script

    async def run(self) -> AsyncGenerator[Any, None]:
        try:
            for part in self._script:
                await asyncio.sleep(0)
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, asyncio.Event):
                    await part.wait()
                else:
                    yield part
        finally:
            self.closed = True


async def stream(client: Client, chunks: Chunks) -> None:
    await sse(chunks.run())({"type": "http"}, client.receive, client.send)


def with_client(work: Callable[[Client], Awaitable[None]]) -> None:
    async def run() -> None:
        await work(Client())

    asyncio.run(run())


def test_a_stream_is_one_event_a_chunk_and_done() -> None:
    async def check(client: Client) -> None:
        chunks = Chunks({"a": "é\n"}, {"a": 2})
        await stream(client, chunks)
        start, *_, last = client.got
        assert (start["status"], last["more_body"]) == (200, False)
        headers = dict(start["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert b"content-length" not in headers
        assert client.events == ['{"a":"é\\n"}', '{"a":2}', "[DONE]"]
        assert chunks.closed

    with_client(check)


@pytest.mark.parametrize("error", [RequestError("full", 429), EngineDeadError("gone")])
def test_an_error_before_the_first_chunk_keeps_its_status(error: Exception) -> None:
    async def check(client: Client) -> None:
        chunks = Chunks(error)
        with pytest.raises(type(error)):
            await stream(client, chunks)
        assert not client.got
        assert chunks.closed

    with_client(check)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RequestError("not finished within 2 s", 504), "server_error", "not finished within 2 s"),
        (EngineDeadError("rank 1 ended"), "server_error", "the engine is gone: rank 1 ended"),
        (ZeroDivisionError("secret"), "server_error", "internal error; the server's log has it"),
    ],
)
def test_an_error_after_the_first_chunk_is_an_event_and_ends_the_stream(
    error: Exception, kind: str, said: str
) -> None:
    async def check(client: Client) -> None:
        await stream(client, Chunks({"a": 1}, error, {"a": 2}))
        first, told, done = client.events
        assert (first, done) == ('{"a":1}', "[DONE]")
        assert json.loads(told)["error"] == {
            "message": said,
            "type": kind,
            "param": None,
            "code": None,
        }

    with_client(check)


@pytest.mark.parametrize("chunks_before", [0, 1])
def test_a_client_that_leaves_closes_the_stream(chunks_before: int) -> None:
    async def check(client: Client) -> None:
        chunks = Chunks(*[{"a": 1}] * chunks_before, asyncio.Event())
        streaming = asyncio.create_task(stream(client, chunks))
        for _ in range(10):
            await asyncio.sleep(0)
        client.left.set()
        with pytest.raises(ClientDisconnect):
            await streaming
        assert chunks.closed
        assert len(client.events) == chunks_before

    with_client(check)


def test_a_stream_whose_client_left_at_once_is_closed_all_the_same() -> None:
    async def check(client: Client) -> None:
        client.left.set()
        chunks = Chunks(asyncio.Event())
        with pytest.raises(ClientDisconnect):
            await stream(client, chunks)
        assert chunks.closed

    with_client(check)


def test_work_is_awaited_while_the_client_is_there() -> None:
    async def check(client: Client) -> None:
        assert await disconnected(client.request, asyncio.sleep(0, "done")) == "done"

        async def failing() -> None:
            raise RequestError("no")

        with pytest.raises(RequestError, match="no"):
            await disconnected(client.request, failing())

    with_client(check)


@pytest.mark.parametrize("who", ["client", "server"])
def test_work_is_cancelled_when_the_client_leaves_or_the_server_ends(who: str) -> None:
    async def check(client: Client) -> None:
        cancelled = False

        async def work() -> None:
            nonlocal cancelled
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise

        waiting = asyncio.create_task(disconnected(client.request, work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if who == "client":
            client.left.set()
        else:
            waiting.cancel()
        with pytest.raises(ClientDisconnect if who == "client" else asyncio.CancelledError):
            await waiting
        assert cancelled

    with_client(check)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def wide(containers: int) -> bytes:
    return b"[" + b",".join([b"{}"] * (containers - 1)) + b"]"


def test_json_may_be_as_deep_and_as_wide_as_the_limits_and_no_more() -> None:
    decode(nested(MAX_DEPTH))
    with pytest.raises(RequestError, match=f"nested more than {MAX_DEPTH} deep"):
        decode(nested(MAX_DEPTH + 1))
    assert len(decode(wide(MAX_CONTAINERS))) == MAX_CONTAINERS - 1
    with pytest.raises(RequestError, match=f"holds {MAX_CONTAINERS + 1} lists and objects"):
        decode(wide(MAX_CONTAINERS + 1))


def test_brackets_in_a_string_are_text() -> None:
    text = '[{\\"' * (MAX_CONTAINERS + 1)
    assert decode(json.dumps({"text": text}).encode()) == {"text": text}


@pytest.mark.parametrize(
    "unit", [rb"\"", b'"', rb"\\", b'["a', b'"[', b"["], ids=lambda unit: unit.decode()
)
@pytest.mark.parametrize("start", [b"", b'"'])
def test_hostile_text_is_looked_through_once(start: bytes, unit: bytes) -> None:
    """A pattern that went back at every quote would take hours for this."""
    text = b"[" * MAX_DEPTH + start + unit * (4_000_000 // len(unit))
    since = time.monotonic()
    with suppress(RequestError):
        check_nesting(text + b"[" * MAX_DEPTH)
    assert time.monotonic() - since < 10


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0 of a string"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(body: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        decode(body)
    assert refused.value.status == 400
    assert "\n" not in str(refused.value)


def test_the_last_of_two_equal_keys_counts() -> None:
    assert decode(b'{"a": 1, "a": 2}') == {"a": 2}


def test_an_answer_never_holds_what_json_has_not() -> None:
    assert Json({"a": float("nan"), "b": [float("-inf")]}).body == b'{"a":null,"b":[null]}'


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_the_type_of_its_status_and_429_says_when_to_come_back(
    status: int, kind: str
) -> None:
    answer = error_response("no", status, param="n", code="c", headers={"X-More": "1"})
    assert answer.status_code == status
    assert json.loads(bytes(answer.body)) == {
        "error": {"message": "no", "type": kind, "param": "n", "code": "c"}
    }
    assert ("retry-after" in answer.headers) == (status == 429)
    assert answer.headers["x-more"] == "1"


class Inner(BaseModel):
    count: int = Field(1, ge=0)


class Outer(BaseModel):
    inner: Inner | list[Inner] | None = None
    ids: TokenIds | None = None
    stop: str | list[str] | None = None
    flag: bool = False
    biases: Annotated[dict[str, float] | None, at_most(2)] = None


def told(body: Any) -> tuple[str, str | None]:
    """What a client is told of a body that is no `Outer`."""
    with pytest.raises(ValidationError) as refused:
        Outer.model_validate(body)
    errors = [{**one, "loc": ("body", *one["loc"])} for one in refused.value.errors()]
    return describe_validation(RequestValidationError(errors))


def test_the_field_that_is_wrong_is_named() -> None:
    assert told({"flag": "maybe"})[1] == "flag"
    assert told({"inner": {"count": -1}}) == (
        "inner.count: should be greater than or equal to 0",
        "inner.count",
    )
    assert told({"inner": [{}, {"count": "x"}]})[1] == "inner[1].count"
    assert told({"stop": ["a", 1]}) == ("stop[1]: should be a valid string", "stop[1]")
    assert told([]) == (
        "the body: should be a valid dictionary or instance of Outer",
        None,
    )


def test_other_fields_that_are_wrong_are_counted() -> None:
    message, field = told({"flag": "maybe", "ids": ["a"], "inner": {"count": -1}})
    assert field == "inner.count"
    assert message.endswith("(and 2 more)")


def test_of_a_list_of_ids_only_the_first_wrong_one_is_told() -> None:
    assert told({"ids": [1, *["a"] * 1000]}) == ("ids[1]: should be a valid integer", "ids[1]")
    for wrong in (True, 1.0, "1", None):
        assert told({"ids": [wrong]})[1] == "ids[0]"


def test_entries_are_counted_before_any_is_looked_at() -> None:
    many = {str(index): "not a number" for index in range(3)}
    assert told({"biases": many}) == ("biases: has 3 entries; at most 2 are allowed", "biases")
    assert told({"biases": {"1": "x"}})[0].startswith("biases: should be a valid number")
    assert Outer.model_validate({"biases": {"1": 1, "2": 2}}).biases == {"1": 1, "2": 2}
