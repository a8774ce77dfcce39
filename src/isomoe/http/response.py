"""Responses of HTTP/1.1, read from pieces that may be cut anywhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus

_MAX_HEAD_BYTES = 1 << 16
_MAX_DIGITS = 18
"""Of a Content-Length: Python refuses to read a number of thousands."""


class ResponseError(Exception):
    """What came from the server cannot be read, or broke off."""


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
            if length is not None and not (length.isdecimal() and len(length) <= _MAX_DIGITS):
                raise ResponseError(f"content-length {length[:20]!r} is no number")
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
