"""A lean HTTP/1.1 client: it may share the machine with the server that it measures.

Bytes go from the socket to the caller's function without a task switch between them. Proxies,
redirects and compression are left out.
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import cast

from isomoe.http.response import Response, ResponseError, ResponseReader
from isomoe.http.url import Url

Sink = Callable[[bytes], None]
"""Takes a piece of a body as soon as it is there."""


class _Connection(asyncio.Protocol):
    """One connection, for one exchange at a time.

    Args:
        max_body_bytes: a longer body breaks the exchange off; None takes any.
    """

    def __init__(self, max_body_bytes: int | None = None) -> None:
        self._max_body_bytes = max_body_bytes
        self.is_open = False
        self.answered = False
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._sink: Sink | None = None
        self._body = bytearray()
        self._end: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, sink: Sink | None) -> Response:
        """Sends a request and reads its response.

        Args:
            sink: takes the body of a 200; other bodies are kept.

        Raises:
            ResponseError: if it cannot be read, or breaks off.
        """
        assert self._transport is not None
        reader = self._reader = ResponseReader()
        self._sink, self._body, self.answered = sink, bytearray(), False
        self._end = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            await self._end
        except BaseException:
            self.abort()
            raise
        finally:
            self._reader = self._sink = self._end = None
        if not reader.can_reuse:
            self.abort()
        return Response(status=reader.status, body=bytes(self._body), headers=reader.headers)

    def abort(self) -> None:
        """Closes the connection at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:  # nobody asked: this connection is out of step
            self.abort()
            return
        self.answered = True
        try:
            body = reader.feed(data)
            if body:
                if self._sink is not None and reader.status == HTTPStatus.OK:
                    self._sink(body)
                else:
                    self._keep(body)
        except ResponseError as error:
            self._finish(error)
        else:
            if reader.is_done:
                self._finish(None)

    def _keep(self, body: bytes) -> None:
        self._body += body
        most = self._max_body_bytes
        if most is not None and len(self._body) > most:
            raise ResponseError(f"the body has more than {most} bytes")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._reader is not None:
            try:
                self._reader.end()
            except ResponseError as problem:
                self._finish(problem)
            else:
                self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._end is None or self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)


@dataclass(slots=True, eq=False)
class HttpClient:
    """A server, with connections that are kept for further requests.

    Attributes:
        url: of the server.
        api_key: sent as a bearer token, where there is one.
        max_body_bytes: a longer body that no sink takes is an error; None takes any.
    """

    url: Url
    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int | None = None
    _idle: list[_Connection] = field(default_factory=list)
    _tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if self.url.tls:
            self._tls = ssl.create_default_context()

    async def get(self, path: str) -> Response:
        """Asks for a page.

        Raises:
            ResponseError: if the response cannot be read, or breaks off.
            OSError: if the server cannot be reached.
        """
        return await self._exchange(self._head("GET", path) + b"\r\n", None)

    async def post(self, path: str, body: bytes, sink: Sink | None = None) -> Response:
        """Sends JSON.

        Args:
            sink: takes the body of a 200 as it comes.

        Raises:
            ResponseError: if the response cannot be read, or breaks off.
            OSError: if the server cannot be reached.
        """
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return await self._exchange(self._head("POST", path) + length.encode() + body, sink)

    def close(self) -> None:
        """Closes every connection that is not in use."""
        while self._idle:
            self._idle.pop().abort()

    def _head(self, method: str, path: str) -> bytes:
        lines = [
            f"{method} {self.url.path}{path} HTTP/1.1",
            f"Host: {str(self.url).removesuffix(self.url.path).partition('//')[2]}",
            "User-Agent: isomoe",
            "Accept-Encoding: identity",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "".join(f"{line}\r\n" for line in lines).encode()

    async def _exchange(self, request: bytes, sink: Sink | None) -> Response:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    return await self._use(connection, request, sink)
                except ResponseError:
                    # The server may have closed an idle connection just when we wrote to it.
                    if connection.answered:
                        raise
        return await self._use(await self._connect(), request, sink)

    async def _use(self, connection: _Connection, request: bytes, sink: Sink | None) -> Response:
        response = await connection.exchange(request, sink)
        if connection.is_open:
            self._idle.append(connection)
        return response

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            partial(_Connection, self.max_body_bytes), self.url.host, self.url.port, ssl=self._tls
        )
        return connection
