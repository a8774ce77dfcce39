"""SGLang's `/generate`: its answers, whole or as they grow."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from time import monotonic
from typing import Any

from isomoe.engine import Delta, FinishReason, TokenLogprob
from isomoe.errors import RequestError
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.bounds import MAX_SCORED, MAX_STREAMED_SCORED, check_scored, num_scored
from isomoe.server.generate_request import GenerateRequest, Item
from isomoe.server.open_request import OpenRequest, deltas


async def answer(engine: AsyncEngine, body: GenerateRequest) -> Any:
    """The whole answer: an object, or a list of them for several outputs.

    Raises:
        RequestError: if the request cannot be served.
        EngineDeadError: if the engine is gone.
    """
    async with _opened(engine, body) as outputs, aclosing(_grow(outputs)) as growing:
        async for _ in growing:
            pass
    texts = body.return_text_in_logprobs
    answers = [await output.to_json(engine, texts) for output in outputs]
    return answers[0] if body.is_single else answers


async def stream(engine: AsyncEngine, body: GenerateRequest) -> AsyncGenerator[Any, None]:
    """The answer so far, whenever it has grown; `index` tells several outputs apart.

    Raises:
        RequestError: if the request cannot be served.
        EngineDeadError: if the engine is gone.
    """
    texts = body.return_text_in_logprobs
    async with _opened(engine, body) as outputs, aclosing(_grow(outputs)) as growing:
        async for index in growing:
            chunk = await outputs[index].to_json(engine, texts)
            yield chunk if body.is_single else {**chunk, "index": index}


class _Output:
    """One output as it grows."""

    def __init__(self, item: Item, request: OpenRequest) -> None:
        self.request = request
        self._item = item
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._cached_tokens = 0
        self._last = Delta()

    def add(self, delta: Delta) -> None:
        """Takes in what is new."""
        self._text += delta.text
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        self._prompt_logprobs += delta.prompt_logprobs
        self._cached_tokens += delta.cached_tokens
        self._last = delta

    async def to_json(self, engine: AsyncEngine, texts: bool) -> dict[str, Any]:
        """The output so far, as SGLang writes it; `texts` spells the tokens with logprobs."""
        meta: dict[str, Any] = {
            "id": self.request.request_id,
            "finish_reason": self._finish_reason(),
            "prompt_tokens": len(self.request.prompt_token_ids),
            "completion_tokens": len(self._token_ids),
            "cached_tokens": self._cached_tokens,
        }
        if self._item.returns_logprobs:
            meta |= await self._logprob_lists(engine, texts)
        if self._last.finish_reason is not None:
            meta["e2e_latency"] = monotonic() - self.request.times.arrival
        text = await self._shown(engine)
        return {"text": text, "output_ids": self._token_ids, "meta_info": meta}

    def _finish_reason(self) -> dict[str, Any] | None:
        match self._last.finish_reason:
            case None:
                return None
            case FinishReason.STOP:
                matched = self._last.stop_reason
                if matched is None:  # an end token of the model's own
                    matched = self._token_ids[-1]
                return {"type": "stop", "matched": matched}
            case FinishReason.LENGTH:
                return {"type": "length", "length": len(self._token_ids)}
            case FinishReason.ABORT:
                return {"type": "abort", "message": "the request was aborted"}

    async def _shown(self, engine: AsyncEngine) -> str:
        """The engine's text, or one of our own where special tokens are wanted in it."""
        if self._item.sampling.skip_special_tokens is not False:
            return self._text
        stop, last = self._last.stop_reason, self._last.finish_reason
        by_token = last is FinishReason.STOP and not isinstance(stop, str)
        ids = self._token_ids[:-1] if by_token else self._token_ids
        text = await engine.decode(ids, skip_special_tokens=False)
        if isinstance(stop, str):
            return text.partition(stop)[0]
        return text if last is not None else text.rstrip("\N{REPLACEMENT CHARACTER}")

    async def _logprob_lists(self, engine: AsyncEngine, texts: bool) -> dict[str, Any]:
        """The first token of the prompt that is asked for has no logprob, wherever it stands."""
        prompt = self.request.prompt_token_ids
        scored = [prompt[self._item.start], *(token.token_id for token in self._prompt_logprobs)]
        spelling: dict[int, str] = {}
        if texts:
            ids = {*scored, *_ids(self._prompt_logprobs), *_ids(self._logprobs)}
            spelling = dict(zip(ids, await engine.decode_each([*ids]), strict=True))
        lists: dict[str, Any] = {
            "input_token_logprobs": [
                [None, scored[0], spelling.get(scored[0])],
                *_own(self._prompt_logprobs, spelling),
            ],
            "output_token_logprobs": _own(self._logprobs, spelling),
        }
        if self._item.top:
            lists["input_top_logprobs"] = [None, *_tops(self._prompt_logprobs, spelling)]
            lists["output_top_logprobs"] = _tops(self._logprobs, spelling)
        return lists


def _own(tokens: Sequence[TokenLogprob], spelling: dict[int, str]) -> list[Any]:
    return [[token.logprob, token.token_id, spelling.get(token.token_id)] for token in tokens]


def _tops(tokens: Sequence[TokenLogprob], spelling: dict[int, str]) -> list[Any]:
    return [
        [[logprob, token_id, spelling.get(token_id)] for token_id, logprob in token.top]
        for token in tokens
    ]


def _ids(tokens: Iterable[TokenLogprob]) -> set[int]:
    return {token_id for token in tokens for token_id in (token.token_id, *dict(token.top))}


@asynccontextmanager
async def _opened(engine: AsyncEngine, body: GenerateRequest) -> AsyncIterator[list[_Output]]:
    """All that is asked for, under way; closed at the end."""
    outputs: list[_Output] = []
    scored = 0
    try:
        for item in body.items():
            outputs.append(await _open(engine, item))
            asked = outputs[-1].request
            scored += num_scored(
                len(asked.prompt_token_ids), asked.request.params, engine.info.context_length
            )
            check_scored(scored, MAX_STREAMED_SCORED if body.stream else MAX_SCORED)
        yield outputs
    finally:
        for output in outputs:
            output.request.close()


async def _open(engine: AsyncEngine, item: Item) -> _Output:
    prompt: str | Sequence[int] = item.prompt
    scoring: dict[str, Any] = {}
    if item.returns_logprobs:
        scoring["logprobs"] = item.top
        if item.start >= 0:
            prompt = await engine.encode(prompt) if isinstance(prompt, str) else prompt
            if item.start >= len(prompt):
                raise RequestError(
                    f"logprob_start_len {item.start}: must be below the prompt's "
                    f"{len(prompt)} tokens, or -1"
                )
            if item.start + 1 < len(prompt):
                scoring["prompt_logprobs"] = item.top
                scoring["prompt_logprobs_start"] = item.start + 1
    params = item.sampling.params(
        engine.sampling_defaults,
        engine.info.context_length,
        detokenize=engine.has_tokenizer,
        **scoring,
    )
    return _Output(item, await engine.submit(prompt, params, item.rid))


async def _grow(outputs: Sequence[_Output]) -> AsyncGenerator[int, None]:
    """Adds to the outputs what comes, and says to which."""
    async with aclosing(deltas([output.request for output in outputs])) as merged:
        async for index, delta in merged:
            outputs[index].add(delta)
            yield index
