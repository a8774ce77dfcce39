"""/v1/chat/completions: a chat gets its next message."""

import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from isomoe.engine import Delta, FinishReason, RequestOutput, SamplingParams
from isomoe.errors import RequestError
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.open_request import deltas
from isomoe.server.openai.choices import Usage, envelope, opened, results
from isomoe.server.openai.logprobs import chat_logprobs, prompt_logprobs, spell
from isomoe.server.openai.protocol import ChatRequest
from isomoe.server.openai.tools import Found, ToolCall, ToolUse, tool_use

_NOT_SETTINGS = frozenset(
    [
        "self",
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    ]
)
"""What the rendering of a template takes beside the template's own variables."""


async def chat(engine: AsyncEngine, body: ChatRequest) -> dict[str, Any]:
    """The reply, when all choices are finished.

    Raises:
        RequestError: if the request cannot be served.
        EngineDeadError: if the engine is gone.
    """
    use = tool_use(body)
    params = _sampling(engine, body, use)
    head = envelope("chatcmpl", "chat.completion", engine.model_name)
    prompt = await _read(engine, body, use)
    usage = Usage([len(prompt)], len(params))
    async with opened(engine, head["id"], [prompt], params) as requests:
        outputs = await results(requests)
    choices = []
    for index, output in enumerate(outputs):
        usage.add(index, output)
        choices.append(await _Choice(index, engine, body, use).whole(output))
    reply = {**head, "choices": choices, "usage": usage.to_json()}
    if body.prompt_logprobs is not None:
        scored = outputs[0].prompt_logprobs or ()
        known = await spell(engine, scored, as_ids=body.return_tokens_as_token_ids)
        reply["prompt_logprobs"] = prompt_logprobs(scored, body.prompt_logprobs, known)
    if body.return_token_ids:
        reply["prompt_token_ids"] = prompt
    return reply


async def stream_chat(
    engine: AsyncEngine, body: ChatRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """The reply in chunks, the choices' as they come.

    Raises:
        As `chat`.
    """
    use = tool_use(body)
    params = _sampling(engine, body, use)
    head = envelope("chatcmpl", "chat.completion.chunk", engine.model_name)
    prompt = await _read(engine, body, use)
    usage = Usage([len(prompt)], len(params))
    choices = [_Choice(index, engine, body, use) for index in range(len(params))]
    once = {"prompt_token_ids": prompt} if body.return_token_ids else {}
    async with (
        opened(engine, head["id"], [prompt], params) as requests,
        aclosing(deltas(requests)) as merged,
    ):
        async for index, delta in merged:
            usage.add(index, delta)
            for piece in await choices[index].pieces(delta):
                chunk = {**head, "choices": [piece], **once}
                once = {}
                if body.includes_usage:
                    chunk["usage"] = usage.to_json() if body.includes_running_usage else None
                yield chunk
    if body.includes_usage:
        yield {**head, "choices": [], "usage": usage.to_json()}


def _sampling(engine: AsyncEngine, body: ChatRequest, use: ToolUse) -> list[SamplingParams]:
    return body.sampling(
        engine.sampling_defaults,
        engine.info.context_length,
        detokenize=engine.has_tokenizer,
        json_schema=use.json_schema,
    )


async def _read(engine: AsyncEngine, body: ChatRequest, use: ToolUse) -> tuple[int, ...]:
    """The chat as token ids."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt: only one can be true")
    begins = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    settings = body.chat_template_kwargs or {}
    if taken := settings.keys() & _NOT_SETTINGS:
        raise RequestError(f"chat_template_kwargs: {min(taken)!r} cannot be set here")
    text = await engine.chat_prompt(
        [message.for_template() for message in body.messages],
        use.shown,
        add_generation_prompt=begins,
        continue_final_message=continues,
        **settings,
    )
    return await engine.encode(text, add_special_tokens=bool(body.add_special_tokens))


class _Choice:
    """One choice as it grows."""

    def __init__(self, index: int, engine: AsyncEngine, body: ChatRequest, use: ToolUse) -> None:
        self._index = index
        self._engine = engine
        self._body = body
        self._use = use
        self._parser = use.parser and use.parser()
        self._begun = False
        self._calls = 0

    async def whole(self, output: RequestOutput) -> dict[str, Any]:
        """A finished choice."""
        found = self._parse(output.text, last=True)
        content = "".join(part for part in found if isinstance(part, str))
        calls = [_call(part) for part in found if isinstance(part, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": None,
            **await self._details(output),
            "finish_reason": self._finish_reason(output),
            "stop_reason": output.stop_reason,
        }

    async def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta brings: the role, before anything else; content and calls; the end."""
        if not (delta.token_ids or delta.text or delta.finish_reason):
            return []
        last = delta.finish_reason is not None
        calls = itertools.count(self._calls)
        shown: list[dict[str, Any]] = [
            {"tool_calls": [{"index": next(calls), **_call(part)}]}
            if isinstance(part, ToolCall)
            else {"content": part}
            for part in self._parse(delta.text, last=last)
        ]
        details = await self._details(delta) if delta.token_ids else {}
        if details and not shown:
            shown = [{}]
        pieces = [self._piece(each) for each in shown]
        if details:
            pieces[0] |= details
        if not self._begun:
            self._begun = True
            pieces.insert(0, self._piece({"role": "assistant", "content": ""}))
        if last:
            end = {"finish_reason": self._finish_reason(delta), "stop_reason": delta.stop_reason}
            pieces.append({**self._piece({}), **end})
        return pieces

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _parse(self, text: str, *, last: bool) -> Found:
        """Content and calls of a further text; the last one ends the choice."""
        if self._parser is None:
            return [text] if text or not last else []
        kept: Found = []
        for part in self._parser.feed(text) + (self._parser.end() if last else []):
            if isinstance(part, ToolCall):
                if self._calls and self._body.parallel_tool_calls is False:
                    continue
                self._calls += 1
            kept.append(part)
        return kept

    def _finish_reason(self, output: Delta | RequestOutput) -> str | None:
        ended = output.finish_reason is FinishReason.STOP
        return self._use.finish_reason if self._calls and ended else output.finish_reason

    async def _details(self, output: Delta | RequestOutput) -> dict[str, Any]:
        """Logprobs and token ids, if asked for."""
        found: dict[str, Any] = {}
        if output.logprobs is not None and self._body.logprobs:
            as_ids = self._body.return_tokens_as_token_ids
            known = await spell(self._engine, output.logprobs, as_ids=as_ids)
            found["logprobs"] = chat_logprobs(output.logprobs, known)
        if self._body.return_token_ids:
            found["token_ids"] = output.token_ids
        return found


def _call(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
