"""One request under way, as the endpoints see it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from isomoe.engine import Delta, Request, RequestOutput
from isomoe.engine.reply import Reply, Transcript
from isomoe.errors import IsomoeError
from isomoe.server.metrics import Metrics
from isomoe.server.request_log import current_line


@dataclass(slots=True)
class Times:
    """When a request came, first brought a token, and ended; monotonic seconds."""

    arrival: float
    first_token: float | None = None
    end: float | None = None


class OpenRequest:
    """A request under way: iterate over its deltas, or ask for its result.

    Deltas that have come while nobody looked are merged. Whoever holds it must `close` it.

    The engine calls `add` and `end`, on the event loop.

    Args:
        cancel: what `close` calls.

    Attributes:
        request_id: what clients call it.
        reply: makes its deltas, in the receiver thread.
        timer: ends it when its time is up.
        line: of the log, for the HTTP request that it is a part of.
    """

    def __init__(
        self,
        request_id: str,
        request: Request,
        prompt: str | None,
        reply: Reply,
        cancel: "Callable[[OpenRequest], None]",
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.prompt_text = prompt
        self.times = Times(time.monotonic())
        self.output_tokens = 0
        self.cached_tokens = 0
        self.reply = reply
        self.timer: asyncio.TimerHandle | None = None
        self.line = current_line()
        self._cancel = cancel
        self._pending: list[Delta] = []
        self._error: IsomoeError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._last_token = 0.0

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model sees it."""
        return self.request.prompt_token_ids

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """What is new.

        Raises:
            EngineDeadError: if the engine is gone.
            RequestError: if the time for the request is up.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else _merged(pending)

    async def result(self) -> RequestOutput:
        """The whole answer; raises as the iteration does."""
        transcript = Transcript(self.request, self.prompt_text)
        async for delta in self:
            transcript.add(delta)
        return transcript.output()

    def close(self) -> None:
        """Ends it, if it goes on."""
        self._cancel(self)

    def add(self, delta: Delta, metrics: Metrics) -> None:
        """Takes the next delta."""
        now = time.monotonic()
        if delta.token_ids:
            if self.times.first_token is None:
                self.times.first_token = now
            else:
                metrics.on_inter_token(now - self._last_token, len(delta.token_ids))
            self._last_token = now
            self.output_tokens += len(delta.token_ids)
        self.cached_tokens += delta.cached_tokens
        self._pending.append(delta)
        self._wake()

    def end(self, error: IsomoeError | None = None) -> None:
        """No delta comes after this; an error is raised once those before are read."""
        self.times.end = time.monotonic()
        self._ended = True
        self._error = error
        if self.timer is not None:
            self.timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def deltas(requests: Sequence[OpenRequest]) -> AsyncGenerator[tuple[int, Delta], None]:
    """What each request brings, with its index, as it comes."""
    if len(requests) == 1:
        async for delta in requests[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(_next(each)): i for i, each in enumerate(requests)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                delta = task.result()
                if delta.finish_reason is None:
                    waiting[asyncio.ensure_future(_next(requests[index]))] = index
                yield index, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(request: OpenRequest) -> Delta:
    return await anext(request)


def _merged(deltas: Sequence[Delta]) -> Delta:
    """Several deltas of one request as one."""
    return Delta(
        text="".join([delta.text for delta in deltas]),
        token_ids=tuple([token for delta in deltas for token in delta.token_ids]),
        logprobs=tuple([one for delta in deltas for one in delta.logprobs]),
        prompt_logprobs=tuple([one for delta in deltas for one in delta.prompt_logprobs]),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
        cached_tokens=sum(delta.cached_tokens for delta in deltas),
    )
