"""/v1/completions: a text goes on."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from isomoe.engine import Delta, RequestOutput, TokenLogprob
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.open_request import deltas
from isomoe.server.openai.choices import Usage, envelope, opened, results
from isomoe.server.openai.logprobs import Texts, completion_logprobs, prompt_logprobs, spell
from isomoe.server.openai.protocol import CompletionRequest


async def complete(engine: AsyncEngine, body: CompletionRequest) -> dict[str, Any]:
    """The reply, when all choices are finished.

    Raises:
        RequestError: if the request cannot be served.
        EngineDeadError: if the engine is gone.
    """
    params = body.sampling(engine.sampling_defaults, detokenize=engine.has_tokenizer)
    head = envelope("cmpl", "text_completion", engine.model_name)
    prompts = await _read(engine, body)
    usage = Usage([len(prompt.token_ids) for prompt in prompts], len(params))
    ids = [prompt.token_ids for prompt in prompts]
    async with opened(engine, head["id"], ids, params) as requests:
        outputs = await results(requests)
    choices = []
    for index, output in enumerate(outputs):
        usage.add(index, output)
        choice = _Choice(index, prompts[index // len(params)], engine, body)
        choice.prompt_scored += (output.prompt_logprobs or ())[1:]
        choices.append(await choice.piece(output))
    return {**head, "choices": choices, "usage": usage.to_json()}


async def stream_completion(
    engine: AsyncEngine, body: CompletionRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """The reply in chunks, the choices' as they come.

    Raises:
        As `complete`.
    """
    params = body.sampling(engine.sampling_defaults, detokenize=engine.has_tokenizer)
    head = envelope("cmpl", "text_completion", engine.model_name)
    prompts = await _read(engine, body)
    usage = Usage([len(prompt.token_ids) for prompt in prompts], len(params))
    choices = [
        _Choice(index, prompts[index // len(params)], engine, body)
        for index in range(len(prompts) * len(params))
    ]
    ids = [prompt.token_ids for prompt in prompts]
    async with (
        opened(engine, head["id"], ids, params) as requests,
        aclosing(deltas(requests)) as merged,
    ):
        async for index, delta in merged:
            usage.add(index, delta)
            choice = choices[index]
            choice.prompt_scored += delta.prompt_logprobs
            if delta.token_ids or delta.text or delta.finish_reason:
                chunk = {**head, "choices": [await choice.piece(delta)]}
                if body.includes_usage:
                    chunk["usage"] = usage.to_json() if body.includes_running_usage else None
                yield chunk
    if body.includes_usage:
        yield {**head, "choices": [], "usage": usage.to_json()}


class _Prompt(NamedTuple):
    token_ids: tuple[int, ...]
    text: str


async def _read(engine: AsyncEngine, body: CompletionRequest) -> list[_Prompt]:
    return await asyncio.gather(*(_read_one(engine, body, each) for each in body.prompt))


async def _read_one(
    engine: AsyncEngine, body: CompletionRequest, prompt: str | tuple[int, ...]
) -> _Prompt:
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        return _Prompt(await engine.encode(prompt, add_special_tokens=special), prompt)
    if not body.echo:
        return _Prompt(prompt, "")
    engine.check_prompt(prompt)
    return _Prompt(prompt, await engine.decode(prompt))


class _Choice:
    """One choice as it grows.

    Attributes:
        prompt_scored: the prompt's tokens from its second on, as far as they are scored.
    """

    def __init__(
        self, index: int, prompt: _Prompt, engine: AsyncEngine, body: CompletionRequest
    ) -> None:
        self._index = index
        self._prompt = prompt
        self._engine = engine
        self._body = body
        self._begun = False
        self._offset = 0
        self.prompt_scored: list[TokenLogprob | None] = []

    async def piece(self, output: Delta | RequestOutput) -> dict[str, Any]:
        """What has come, as the choice of a reply; the first piece holds the echoed prompt."""
        body, prompt, first = self._body, self._prompt, not self._begun
        self._begun = True
        text, ids = output.text, output.token_ids
        scored: tuple[TokenLogprob | None, ...] = output.logprobs or ()
        if body.echo and first:
            text, ids = prompt.text + text, prompt.token_ids + ids
            scored = (None, *self.prompt_scored, *scored)
        found: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if body.logprobs is not None:
            known = await self._spell(scored, ids)
            found["logprobs"] = completion_logprobs(ids, scored, body.logprobs, known, self._offset)
            self._offset += sum(map(len, found["logprobs"]["tokens"]))
        if body.prompt_logprobs is not None:
            scored = (None, *self.prompt_scored)
            known = await self._spell(scored)
            found["prompt_logprobs"] = prompt_logprobs(scored, body.prompt_logprobs, known)
        if body.return_token_ids:
            found["token_ids"] = output.token_ids
            if first:
                found["prompt_token_ids"] = prompt.token_ids
        return found

    async def _spell(
        self, scored: tuple[TokenLogprob | None, ...], token_ids: tuple[int, ...] = ()
    ) -> Texts:
        as_ids = self._body.return_tokens_as_token_ids
        return await spell(self._engine, scored, token_ids, as_ids=as_ids)
