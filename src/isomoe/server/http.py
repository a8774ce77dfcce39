"""What every endpoint shares: bodies in, answers and streams out, errors in OpenAI's form."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, Field, Strict
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from isomoe.errors import EngineDeadError, RequestError

RETRY_AFTER_SECONDS = 1
"""What a refused client is told to wait; a full queue moves with every step."""

MAX_DEPTH = 100
"""The deepest JSON. Templates, grammars and validation recurse into it."""

MAX_CONTAINERS = 50_000
"""The most lists and objects of a body: a few bytes each there, but some hundred in memory."""

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies: do not hold
_TYPE_NAMES = {"bool", "dict", "float", "int", "none", "str"}
_DONE = b"data: [DONE]\n\n"

_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+"?', re.DOTALL)  # an open one ends with the text
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_log = logging.getLogger(__name__)
T = TypeVar("T")

TokenIds = Annotated[list[Annotated[int, Strict()]], Field(fail_fast=True)]
"""Token ids in a body. Only the first wrong one is told of: a body can hold millions."""


def at_most(most: int) -> BeforeValidator:
    """A list or object of at most so many entries, counted before any of them is looked at."""

    def counted(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"has {len(value)} entries; at most {most} are allowed")
        return value

    return BeforeValidator(counted)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it; the type follows from the status."""
    kind = "server_error" if status >= 500 else _TYPES.get(HTTPStatus(status))
    return {
        "error": {
            "message": message,
            "type": kind or "invalid_request_error",
            "param": param,
            "code": code,
        }
    }


class Json(JSONResponse):
    """A JSON answer. Floats that are not finite become null."""

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_response(
    message: str,
    status: int,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Json:
    """An answer that says what went wrong; 429 says when to come back."""
    more = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else {}
    return Json(error_body(message, status, param, code), status, {**more, **(headers or {})})


class JsonRoute(APIRoute):
    """A route whose body is JSON, whatever the Content-Type says (`curl -d` says form data).

    The body is parsed strictly: no NaN, no lone surrogates, no bad UTF-8. Every router of the
    server is made with `route_class=JsonRoute`; `json_router` does.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            if self.body_field is None:
                return await answer(request)
            request = _JsonRequest(request.scope, request.receive)
            if not await request.body():
                raise RequestError("the body is empty; it must be a JSON object")
            await request.json()
            return await answer(request)

        return parsed


def json_router() -> APIRouter:
    """A router for endpoints that take JSON."""
    return APIRouter(route_class=JsonRoute)


class _JsonRequest(Request):
    """FastAPI asks it for the body: parsed once, here, and kept."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        super().__init__({**scope, "headers": headers}, receive)

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = decode(await self.body())
        return self._json


def decode(body: bytes) -> Any:
    """JSON as plain values.

    Raises:
        RequestError: if it is none, too deep, or made of too many parts.
    """
    check_nesting(body)
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} of a string") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None


def check_nesting(text: bytes, name: str = "the body") -> None:
    """Holds JSON to `MAX_DEPTH` and `MAX_CONTAINERS`, before anything recurses into it.

    Raises:
        RequestError: if `text` has more.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", text).translate(None, _NO_BRACKETS)
    opened = brackets.count(b"[") + brackets.count(b"{")
    if opened > MAX_CONTAINERS:
        raise RequestError(
            f"{name} holds {opened} lists and objects; at most {MAX_CONTAINERS} are allowed"
        )
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise RequestError(f"{name} is nested more than {MAX_DEPTH} deep")


async def disconnected(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled when the client goes away, or this is cancelled.

    The request's body must have been read.

    Raises:
        ClientDisconnect: if the client went away first. Nobody is left to answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse(chunks: AsyncGenerator[Any, None]) -> Response:
    """A stream of server-sent events: one for each JSON-able chunk, then `[DONE]`.

    What fails before the first chunk is answered with its own status; afterwards it is sent as an
    event with an error body, and the stream ends. `chunks` is always started and always closed,
    so that its `finally` runs even if the client went away at once.
    """
    return _EventStream(chunks)


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Any, None]) -> None:
        self._chunks = chunks
        super().__init__(chunks, headers=_EVENT_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await disconnected(Request(scope, receive), self._stream(send))

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            # Nothing is awaited before this, or a client that is gone would leave it unstarted.
            first = await anext(chunks, None)
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                if first is not None:
                    await send(_part(_event(first)))
                async for chunk in chunks:
                    await send(_part(_event(chunk)))
            except Exception as error:
                message, status = describe(error)
                await send(_part(_event(error_body(message, status))))
            await send({**_part(_DONE), "more_body": False})


def _event(chunk: Any) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _part(line: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": line, "more_body": True}


def describe(error: Exception) -> tuple[str, int]:
    """An exception as a message for the client, and a status.

    What nobody foresaw is logged with its traceback, and the client told no more than that.
    """
    if isinstance(error, RequestError):
        return str(error), error.status
    if isinstance(error, EngineDeadError):
        return f"the engine is gone: {error}", HTTPStatus.SERVICE_UNAVAILABLE
    _log.error("a request failed unexpectedly", exc_info=error)
    return "internal error; the server's log has it", HTTPStatus.INTERNAL_SERVER_ERROR


def describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a request in one line, and the field it is in.

    Of several things, the deepest is told: where a field may be of several types, that is what is
    wrong with the type that fits best.
    """
    errors = error.errors()
    worst = max(errors, key=lambda one: len(one["loc"]))
    where = _field(worst["loc"])
    others = {_field(one["loc"]) for one in errors}
    more = sum(not where.startswith(other) for other in others)
    what = str(worst["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{where or 'the body'}: {what}" + (f" (and {more} more)" if more else ""), where or None


def _field(location: tuple[int | str, ...]) -> str:
    """Such as `messages[0].content`, without where it lies (body) and the types tried for it."""
    found = ""
    for part in location[1:]:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in _TYPE_NAMES:
            found += f".{part}"
    return found.removeprefix(".")
