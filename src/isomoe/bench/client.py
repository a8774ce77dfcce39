"""A client of OpenAI's API that keeps the time: streaming completions, chat, and what is served."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from time import perf_counter
from typing import Any

from isomoe.bench.metrics import Outcome
from isomoe.bench.sse import SseParser
from isomoe.bench.workload import BenchRequest
from isomoe.http import HttpClient, ResponseError


class Endpoint(StrEnum):
    """Which of OpenAI's endpoints is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        """Where it is."""
        return "/v1/completions" if self is Endpoint.COMPLETIONS else "/v1/chat/completions"


@dataclass(slots=True, eq=False)
class OpenAIClient:
    """Sends requests, greedy ones, and measures them.

    Attributes:
        http: the server.
        endpoint: of completions or of chat.
        model: the name that requests ask for.
        ignore_eos: sends `ignore_eos`, which SGLang, vLLM and isomoe know; other servers may
            refuse it.
        timeout_seconds: of a request.
    """

    http: HttpClient
    endpoint: Endpoint
    model: str
    ignore_eos: bool
    timeout_seconds: float

    async def measure(self, request: BenchRequest) -> Outcome:
        """Sends a request and reads its answer to the end. Failures are outcomes, too."""
        body = json.dumps(self._document(request)).encode()
        answer = _Answer(self.endpoint, perf_counter())
        try:
            async with asyncio.timeout(self.timeout_seconds):
                response = await self.http.post(self.endpoint.path, body, answer.feed)
        except TimeoutError:
            return answer.outcome(f"no end after {self.timeout_seconds:g} s")
        except (OSError, ResponseError) as error:
            return answer.outcome(str(error) or type(error).__name__)
        if response.status != HTTPStatus.OK:
            return answer.outcome(response.problem)
        return answer.outcome()

    def _document(self, request: BenchRequest) -> dict[str, Any]:
        document: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint is Endpoint.COMPLETIONS:
            document["prompt"] = request.prompt
        else:
            document["messages"] = [{"role": "user", "content": request.prompt}]
        if self.ignore_eos:
            document["ignore_eos"] = True
        return document


class _Answer:
    """An answer as it comes: its times and its usage."""

    def __init__(self, endpoint: Endpoint, sent: float) -> None:
        self._is_chat = endpoint is Endpoint.CHAT
        self._sent = sent
        self._events = SseParser()
        self._arrivals: list[float] = []
        self._usage: Mapping[str, Any] | None = None
        self._error: str | None = None
        self._is_done = False

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the stream.

        Raises:
            ResponseError: if they are not what OpenAI's servers send.
        """
        now = perf_counter()
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._is_done = True
                continue
            try:
                self._take(json.loads(event), now)
            except (ValueError, AttributeError, LookupError, TypeError):
                raise ResponseError(f"an event is no chunk of OpenAI's: {event[:60]!r}") from None

    def _take(self, chunk: dict[str, Any], now: float) -> None:
        if chunk.get("error"):
            error = chunk["error"]
            self._error = str(error.get("message", error) if isinstance(error, dict) else error)
            return
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            if not self._is_chat or _has_content(choice["delta"]):
                self._arrivals.append(now)
            if choice.get("finish_reason") == "abort":
                self._error = "the server aborted the request"

    def outcome(self, error: str | None = None) -> Outcome:
        """What there is to say, now that nothing follows.

        Args:
            error: why the exchange failed, if it did.
        """
        error = error or self._error
        if error is None and not self._is_done:
            error = "the stream ended without [DONE]"
        if error is None and not self._arrivals:
            error = "the answer is empty"
        usage = self._usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return Outcome(
            sent=self._sent,
            arrivals=tuple(self._arrivals),
            ended=perf_counter(),
            prompt_tokens=usage.get("prompt_tokens") or 0,
            output_tokens=usage.get("completion_tokens") or len(self._arrivals),
            cached_tokens=details.get("cached_tokens") or 0,
            is_counted=bool(usage.get("completion_tokens")),
            error=error,
        )


def _has_content(delta: Mapping[str, Any]) -> bool:
    """Whether a chunk of a chat brings more than the role."""
    return any(value for key, value in delta.items() if key != "role")
