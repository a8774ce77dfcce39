"""The engine's requests behind one call: for each prompt its choices."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from isomoe.engine import Delta, RequestOutput, SamplingParams
from isomoe.errors import RequestError
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.bounds import check_scored, num_scored
from isomoe.server.open_request import OpenRequest
from isomoe.server.request_log import current_line


@asynccontextmanager
async def opened(
    engine: AsyncEngine,
    call_id: str,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
) -> AsyncIterator[list[OpenRequest]]:
    """Every prompt with every one of `params`, in that order; closed at the end.

    Raises:
        RequestError: if one of them is refused; then none is left open.
    """
    pairs = [(prompt, each) for prompt in prompts for each in params]
    context = engine.info.context_length
    check_scored(sum(num_scored(len(prompt), each, context) for prompt, each in pairs))
    requests: list[OpenRequest] = []
    try:
        for index, (prompt, each) in enumerate(pairs):
            name = call_id if len(pairs) == 1 else f"{call_id}-{index}"
            try:
                requests.append(await engine.submit(prompt, each, request_id=name))
            except RequestError as error:
                if len(prompts) == 1:
                    raise
                which = index // len(params)
                raise RequestError(f"prompt[{which}]: {error}", error.status) from None
        yield requests
    finally:
        for request in requests:
            request.close()


async def results(requests: Sequence[OpenRequest]) -> list[RequestOutput]:
    """The finished outputs, in order."""
    tasks = [asyncio.ensure_future(request.result()) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class Usage:
    """Counts a call's tokens. A prompt counts once, however many choices it has.

    Args:
        prompts: how many tokens each prompt has.
        n: choices of each.
    """

    def __init__(self, prompts: Sequence[int], n: int) -> None:
        self._prompt_tokens = sum(prompts)
        self._n = n
        self._completion_tokens = 0
        self._cached_tokens = 0

    def add(self, index: int, output: Delta | RequestOutput) -> None:
        """Counts what a choice has brought."""
        self._completion_tokens += len(output.token_ids)
        if index % self._n == 0:
            self._cached_tokens += output.cached_tokens

    def to_json(self) -> dict[str, Any]:
        """The counts so far, as OpenAI writes them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def envelope(kind: str, object_name: str, model: str) -> dict[str, Any]:
    """What a reply and each of its chunks begin with.

    Args:
        kind: such as `cmpl`, the start of the call's id; the rest is the one in the log.
    """
    line = current_line()
    return {
        "id": f"{kind}-{uuid4().hex if line is None else line.request_id}",
        "object": object_name,
        "created": int(time.time()),
        "model": model,
    }
