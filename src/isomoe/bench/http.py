"""A lean HTTP/1.1 client: it shares the machine with the server that it measures.

Bytes go from the socket to the caller's function without a task switch between them. Proxies,
redirects and compression are left out.
"""

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from typing import Self, cast
from urllib.parse import urlsplit

from isomoe.errors import ConfigError

Sink = Callable[[bytes], None]
"""Takes a piece of a body as soon as it is there."""

_MAX_HEAD_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}


class ResponseError(Exception):
    """What came from the server cannot be read, or broke off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Url:
    """Where a server is.

    Attributes:
        host: a name or an address.
        port: a number.
        tls: whether the scheme is https.
        path: of the API's root, without `/v1`; empty or `/some/prefix`.
    """

    host: str
    port: int
    tls: bool = False
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The URL that `text` names, with or without `/v1` at its end.

        Raises:
            ConfigError: if it is none.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
            is_url = parts.scheme in _PORTS and parts.hostname and text.isascii()
        except ValueError:
            is_url = False
        if not is_url or text.split() != [text]:
            raise ConfigError(f"--url {text}: must be like http://127.0.0.1:30000")
        assert parts.hostname is not None
        return cls(
            host=parts.hostname,
            port=port or _PORTS[parts.scheme],
            tls=parts.scheme == "https",
            path=parts.path.rstrip("/").removesuffix("/v1"),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The end of an exchange.

    Attributes:
        status: of HTTP.
        body: all of it; empty where a sink took it.
        headers: by name in lower case; of a repeated one the last.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> object:
        """The body, parsed; None if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def problem(self) -> str:
        """Status and message of a refusal, in one line."""
        document = self.json()
        found = document.get("error", document) if isinstance(document, dict) else document
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or found
        text = " ".join(str(found or self.body.decode(errors="replace")).split())[:300]
        try:
            name = f"{self.status} {HTTPStatus(self.status).phrase}"
        except ValueError:
            name = str(self.status)
        return f"{name}: {text}" if text else name


class _Part(Enum):
    """What the next bytes of a response belong to."""

    HEAD = auto()
    CHUNK_SIZE = auto()
    BODY = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    BODY_TO_CLOSE = auto()
    DONE = auto()


class ResponseReader:
    """One response, read from pieces that may be cut anywhere.

    Attributes:
        status: of HTTP; 0 until the head is there.
        headers: by name in lower case, from then on.
        can_reuse: whether the connection is good for another exchange.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.can_reuse = True
        self._part = _Part.HEAD
        self._rest = b""
        self._left = 0
        self._chunked = False

    @property
    def is_done(self) -> bool:
        """Whether the response is complete."""
        return self._part is _Part.DONE

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes; returns what they hold of the body.

        Raises:
            ResponseError: if this is no HTTP/1.1.
        """
        if self._rest:
            data = self._rest + data
        body = []
        at = 0
        while True:
            part = self._part
            if part is _Part.BODY:
                piece = data[at : at + self._left]
                body.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._part = _Part.CHUNK_END if self._chunked else _Part.DONE
            elif part is _Part.CHUNK_END:
                if len(data) < at + 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ResponseError("a chunk is longer than it says")
                at += 2
                self._part = _Part.CHUNK_SIZE
            elif part is _Part.CHUNK_SIZE or part is _Part.TRAILERS:
                end = data.find(b"\r\n", at)
                if end < 0:
                    break
                if part is _Part.CHUNK_SIZE:
                    self._left = _chunk_size(data[at:end])
                    self._part = _Part.BODY if self._left else _Part.TRAILERS
                elif end == at:
                    self._part = _Part.DONE
                at = end + 2
            elif part is _Part.HEAD:
                end = data.find(b"\r\n\r\n", at)
                if end < 0:
                    break
                self._read_head(data[at:end])
                at = end + 4
            elif part is _Part.BODY_TO_CLOSE:
                body.append(data[at:])
                at = len(data)
                break
            else:
                if at < len(data):
                    raise ResponseError("bytes came after the end of the response")
                break
        self._rest = data[at:]
        if len(self._rest) > _MAX_HEAD_BYTES:
            raise ResponseError(f"a head or a line of more than {_MAX_HEAD_BYTES} bytes")
        return body[0] if len(body) == 1 else b"".join(body)

    def end(self) -> None:
        """The connection was closed.

        Raises:
            ResponseError: if the response is not complete.
        """
        if self._part is _Part.BODY_TO_CLOSE:
            self._part = _Part.DONE
        if not self.is_done:
            said = "in mid-response" if self.status else "without an answer"
            raise ResponseError(f"the server closed the connection {said}")

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (code.isdecimal() and len(code) == 3):
            raise ResponseError(f"no HTTP/1.1: {first[:60]!r}")
        if code.startswith("1"):  # an interim answer; the real one follows
            return
        self.status = int(code)
        headers = self.headers = dict(_header(line) for line in lines)
        connection = headers.get("connection", "").lower()
        self.can_reuse = connection == "keep-alive" or (version == "HTTP/1.1" and not connection)
        encoding = headers.get("transfer-encoding")
        length = headers.get("content-length")
        if encoding is not None:
            if encoding.lower() != "chunked":
                raise ResponseError(f"transfer-encoding {encoding!r} is not known")
            self._chunked = True
            self._part = _Part.CHUNK_SIZE
        elif length is not None or self.status in (204, 304):
            if length is not None and not length.isdecimal():
                raise ResponseError(f"content-length {length!r} is no number")
            self._left = int(length or 0)
            self._part = _Part.BODY if self._left else _Part.DONE
        else:
            self.can_reuse = False
            self._part = _Part.BODY_TO_CLOSE


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


def _chunk_size(line: bytes) -> int:
    size = line.partition(b";")[0].strip()
    try:
        if size.isalnum():  # int() alone would take a sign or an underscore
            return int(size, 16)
    except ValueError:
        pass
    raise ResponseError(f"chunk size {line[:20]!r} is no number")


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
