"""An engine that brings what it is told to, with a real tokenizer."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Self, cast

from isomoe.engine import Delta, RequestOutput, SamplingParams
from isomoe.engine.reply import Transcript
from isomoe.errors import IsomoeError
from isomoe.server.async_engine import AsyncEngine
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint

Script = Sequence[Delta | IsomoeError | asyncio.Event]
"""What a request brings in turn. An error is raised, an event waited for."""


class ScriptedRequest:
    def __init__(self, prompt: Sequence[int], params: SamplingParams, script: Script) -> None:
        self.prompt_token_ids = tuple(prompt)
        self.params = params
        self.closed = False
        self._script = list(script)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        await asyncio.sleep(0)
        if not self._script:
            raise StopAsyncIteration
        part = self._script.pop(0)
        if isinstance(part, asyncio.Event):
            await part.wait()
            return await self.__anext__()
        if isinstance(part, IsomoeError):
            raise part
        return part

    async def result(self) -> RequestOutput:
        request = SimpleNamespace(prompt_token_ids=self.prompt_token_ids, params=self.params)
        transcript = Transcript(cast(Any, request), None)
        async for delta in self:
            transcript.add(delta)
        return transcript.output()

    def close(self) -> None:
        self.closed = True


class ScriptedEngine:
    """`script` gives the deltas of a request from its index; an error refuses it."""

    model_name = "scripted"
    sampling_defaults: Mapping[str, Any] = {}

    def __init__(
        self, script: Callable[[int], Script | IsomoeError], has_tokenizer: bool = True
    ) -> None:
        self.has_tokenizer = has_tokenizer
        self.info = SimpleNamespace(context_length=1024)
        self.tokenizer = Tokenizer(bundled_checkpoint())
        self.requests: list[ScriptedRequest] = []
        self._script = script

    def as_engine(self) -> AsyncEngine:
        return cast(AsyncEngine, self)

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        pass

    async def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        return self.tokenizer.encode(text, add_special_tokens)

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.token(token) for token in token_ids]

    async def chat_prompt(self, messages: Any, tools: Any = None, **settings: Any) -> str:
        return self.tokenizer.chat(messages, tools, **settings)

    async def submit(
        self, prompt: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> ScriptedRequest:
        script = self._script(len(self.requests))
        if isinstance(script, IsomoeError):
            raise script
        self.requests.append(ScriptedRequest(prompt, params, script))
        return self.requests[-1]
