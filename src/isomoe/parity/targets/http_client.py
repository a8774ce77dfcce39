"""Asks a server for JSON, and says what is wrong if there is none."""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from isomoe.errors import ConfigError
from isomoe.http import HttpClient, Response, ResponseError, Url
from isomoe.parity.targets.base import TargetError
from isomoe.parity.targets.reading import OtherForm, short

MAX_TRIES = 6
"""How often a request is sent to a server that says it is busy."""
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_LOCKED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_PAGE_SECONDS = 10.0
_BLOT = "***"
_LEAST_SECRET = 6
"""A shorter key is a stand-in that servers ask for, and may be part of any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """How a server is spoken to.

    Attributes:
        dialect: forces one, by name; None finds it out.
        model: the name that requests carry; None takes the first that the server lists.
        api_key: sent as a bearer token, and nowhere else.
        timeout_seconds: for one request, and for the waits of one that is sent again.
        max_concurrency: the most requests that are open at once.
        max_reply_bytes: a longer reply is an error.
    """

    dialect: str | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0
    max_concurrency: int = 32
    max_reply_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds < float("inf"):
            raise ConfigError(
                f"timeout_seconds {self.timeout_seconds:g}: must be above 0 and finite"
            )
        for name in ("max_concurrency", "max_reply_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key: must be printable ASCII, without line breaks")


class Refused(Exception):
    """The server answered with an error of HTTP."""


class Barred(Refused):
    """It wants another key, or sends its clients elsewhere: no other question would help."""


class _Busy(Refused):
    """It says that it is busy, however often it is asked."""


class JsonClient:
    """One server, asked for JSON.

    Args:
        name: the target's; messages begin with it.

    Raises:
        ConfigError: if `name` is no URL, or one that holds credentials.
    """

    def __init__(self, name: str, settings: HttpSettings) -> None:
        self._name = name
        self._settings = settings
        self._http = HttpClient(
            _url(name), api_key=settings.api_key, max_body_bytes=settings.max_reply_bytes
        )

    async def page(self, path: str) -> Any:
        """One of the server's small pages; None if it does not give it, or not in JSON.

        Raises:
            TargetError: if the server cannot be reached, or does not answer.
        """
        try:
            return await self._ask(path, None, min(_PAGE_SECONDS, self._settings.timeout_seconds))
        except (Refused, OtherForm):
            return None

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers to a document; it is asked again while it says it is busy.

        Raises:
            Refused: for an error of HTTP.
            OtherForm: if the answer is no JSON.
            TargetError: if the server cannot be reached, breaks off, or does not answer in time.
        """
        try:
            return await self._ask(path, json.dumps(body).encode(), self._settings.timeout_seconds)
        except _Busy as error:
            raise self.error(str(error)) from None

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def error(self, message: str) -> TargetError:
        """An error that names the target and holds no key."""
        key = self._secret
        return TargetError(f"{self._name}: {message.replace(key, _BLOT) if key else message}")

    @property
    def _secret(self) -> str:
        key = self._settings.api_key or ""
        return key if len(key) >= _LEAST_SECRET else ""

    async def _ask(self, path: str, body: bytes | None, limit: float) -> Any:
        until = time.monotonic() + limit
        for tried in range(1, MAX_TRIES + 1):
            response = self._without_key(await self._exchange(path, body, limit))
            if response.status not in _BUSY:
                return self._read(path, response)
            if tried == MAX_TRIES:
                break
            wait = _wait_seconds(response, tried)
            if time.monotonic() + wait > until:
                raise _Busy(
                    f"{path}: {_problem(response)}; it asks to wait {wait:g} s, and the limit of "
                    f"all waits is {limit:g} s"
                )
            await asyncio.sleep(wait)
        raise _Busy(f"{path}: {_problem(response)}, {MAX_TRIES} times in a row")

    def _without_key(self, response: Response) -> Response:
        """The same, with the API key blotted out: servers echo it, and what they say is kept."""
        key = self._secret
        if not key:
            return response
        body = response.body
        for written in {key, json.dumps(key)[1:-1]}:
            body = body.replace(written.encode(), _BLOT.encode())
        headers = {name: value.replace(key, _BLOT) for name, value in response.headers.items()}
        return replace(response, body=body, headers=headers)

    async def _exchange(self, path: str, body: bytes | None, limit: float) -> Response:
        try:
            async with asyncio.timeout(limit):
                if body is None:
                    return await self._http.get(path)
                return await self._http.post(path, body)
        except TimeoutError:
            raise self.error(f"{path}: no whole answer within {limit:g} s") from None
        except ResponseError as error:
            raise self.error(f"{path}: {error}") from None
        except OSError as error:
            raise self.error(
                f"{path}: no connection ({error or type(error).__name__}); is the server started, "
                "and the address right?"
            ) from None

    def _read(self, path: str, response: Response) -> Any:
        status = response.status
        if status in _LOCKED:
            lacking = "takes another API key" if self._settings.api_key else "asks for an API key"
            raise Barred(
                f"{path}: {_problem(response)}; the server {lacking}, and --api-key-env NAME names "
                "the environment variable that holds it"
            )
        if 300 <= status < 400:
            where = response.headers.get("location", "").partition("?")[0]
            raise Barred(
                f"{path}: {status}, a redirect to {short(where)}, and none is followed; give the "
                "address that it leads to"
            )
        if status >= 400:
            raise Refused(f"{path}: {_problem(response)}")
        try:
            return json.loads(response.body)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(":")[0]
            raise OtherForm(f"{path}: the reply is broken or no JSON ({reason})") from None


def _url(text: str) -> Url:
    """The URL that `text` is.

    Raises:
        ConfigError: if it is none, or holds what would be shown or lost. Shows no credentials.
    """
    try:
        parts = urlsplit(text)
        if "@" in parts.netloc:
            raise ConfigError(
                f"target {parts.scheme}://***@{parts.netloc.rpartition('@')[2]}: a URL with "
                "credentials would show them; --api-key-env NAME names the environment variable "
                "that holds a key"
            )
        if not parts.query and not parts.fragment:
            return Url.parse(text)
    except ConfigError as error:
        if not str(error).startswith("--url"):
            raise
    except ValueError:
        pass
    # What stands before an @ may be a password, wherever a parser would cut.
    shown = f"{text.partition('//')[0]}//***" if "@" in text else re.split("[?#]", text)[0]
    raise ConfigError(f"target {shown!r}: must be like http://127.0.0.1:30000, without a query")


def _wait_seconds(response: Response, tried: int) -> float:
    """As the server asks for in `Retry-After`, in seconds or as a date; else twice the last."""
    asked = response.headers.get("retry-after", "")
    if asked.isdecimal():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 2.0**tried / 4


def _problem(response: Response) -> str:
    """Status and message of a refusal, in one line of printable characters."""
    try:
        text = response.problem
    except RecursionError:
        text = str(response.status)
    return "".join(each if each.isprintable() else "?" for each in text)
