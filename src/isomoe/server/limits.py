"""Middleware in front of all endpoints: who may ask, how much, and what if all else fails."""

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isomoe.server.http import describe, error_response

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What may be asked without an API key: probes bring none."""


class ApiKey:
    """Lets those in who bring `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str, free: Collection[str] = OPEN_PATHS) -> None:
        self._app = app
        self._key = key.encode()
        self._free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free or self._brought(scope):
            await self._app(scope, receive, send)
            return
        answer = error_response(
            "the API key is missing or wrong; send `Authorization: Bearer KEY`",
            401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await answer(scope, receive, send)

    def _brought(self, scope: Scope) -> bool:
        """Compared in constant time."""
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        return right and scheme.lower() == "bearer"


class BodyLimit:
    """Refuses bodies of more than `max_bytes`: by their Content-Length, or as they come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            await error_response(self._refusal(), 413)(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._max_bytes:
                    raise HTTPException(413, self._refusal())
            return message

        await self._app(scope, limited, send)

    def _refusal(self) -> str:
        return f"the body is larger than the limit of {self._max_bytes} bytes"


class LastResort:
    """Answers 500 to what nobody foresaw; its traceback is logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except ClientDisconnect:
            raise  # nobody is left to answer
        except Exception as error:
            if started or scope["type"] != "http":
                raise  # all that is left is to break the connection, which the server does
            await error_response(*describe(error))(scope, receive, send)
