"""One line for every HTTP request, on the logger `isomoe.request`.

Requests that reached the engine and refusals are logged at INFO, the rest (health, metrics) at
DEBUG. The line of a request is found through a context variable, so that the engine's side can
add to it without knowing of HTTP.
"""

import json
import logging
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isomoe.server.metrics import FinishedRequest, Metrics

_CLIENT_GONE = 499
_KEPT_BYTES = 2048
_MAX_ID_LENGTH = 128
_current: "ContextVar[RequestLine | None]" = ContextVar("request_line", default=None)
_PROBES = frozenset({"/health_generate"})
"""Asked every few seconds, and of no interest while they succeed."""
_log = logging.getLogger("isomoe.request")


@dataclass(slots=True)
class RequestLine:
    """What is known of one HTTP request so far.

    Attributes:
        request_id: the client's X-Request-Id, or one of our own.
        status: None until the answer starts; 499 if the client went away before it ended.
        body, answer: their first bytes, if they are to be logged.
    """

    request_id: str
    endpoint: str
    start: float = field(default_factory=monotonic)
    status: int | None = None
    finished: list[FinishedRequest] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)

    def add(self, request: FinishedRequest) -> None:
        """Takes in a request of the engine that ended on this one's behalf."""
        self.finished.append(request)

    def __str__(self) -> str:
        parts = [self.request_id, self.endpoint, str(self.status)]
        if self.finished:
            first = [
                request.time_to_first_token
                for request in self.finished
                if request.time_to_first_token is not None
            ]
            parts += [
                f"prompt_tokens={sum(request.prompt_tokens for request in self.finished)}",
                f"output_tokens={sum(request.output_tokens for request in self.finished)}",
                f"cached_tokens={sum(request.cached_tokens for request in self.finished)}",
                f"ttft={f'{min(first):.3f}s' if first else '-'}",
                f"finish={_distinct(request.outcome for request in self.finished)}",
            ]
        parts.append(f"total={monotonic() - self.start:.3f}s")
        for name, content in (("body", self.body), ("answer", self.answer)):
            if content:
                text = content[:_KEPT_BYTES].decode(errors="replace")
                parts.append(f"{name}={json.dumps(text, ensure_ascii=False)}")
        return " ".join(parts)


def current_line() -> RequestLine | None:
    """The line of the HTTP request that this code runs for; None outside of one."""
    return _current.get()


class RequestLog:
    """Middleware: gives each request its id and its line.

    A `ClientDisconnect` ends here: the line tells of it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, contents: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._contents = contents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line = RequestLine(_request_id(scope), _endpoint(scope))

        async def observed_receive() -> Message:
            message = await receive()
            if self._contents and message["type"] == "http.request":
                _keep(line.body, message)
            return message

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                line.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = line.request_id
            elif self._contents and message["type"] == "http.response.body":
                _keep(line.answer, message)
            await send(message)

        token = _current.set(line)
        try:
            await self._app(scope, observed_receive, observed_send)
        except ClientDisconnect:
            line.status = _CLIENT_GONE
        finally:
            _current.reset(token)
            line.status = line.status or _CLIENT_GONE
            self._metrics.on_response(line.status)
            served = line.finished and scope["path"] not in _PROBES
            matters = served or line.status >= 400
            _log.log(logging.INFO if matters else logging.DEBUG, "%s", line)


def _keep(kept: bytearray, message: Message) -> None:
    if len(kept) < _KEPT_BYTES:
        kept += message.get("body", b"")[:_KEPT_BYTES]


def _request_id(scope: Scope) -> str:
    """The client's own, if it fits in a line of the log."""
    given = Headers(scope=scope).get("x-request-id", "")
    fits = given.isascii() and given.isprintable() and " " not in given
    return given if given and fits and len(given) <= _MAX_ID_LENGTH else uuid4().hex


def _endpoint(scope: Scope) -> str:
    """Such as `POST /v1/completions`, in one line whatever the client made of it."""
    path = scope["path"]
    return f"{scope['method']} {path if path.isprintable() else ascii(path)}"[:200]


def _distinct(outcomes: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(outcomes))
