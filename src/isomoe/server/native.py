"""SGLang's own endpoints, and those of vLLM's that its users take for granted."""

import asyncio
from time import monotonic
from typing import Any

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from isomoe import __version__
from isomoe.engine import SamplingParams
from isomoe.errors import EngineDeadError, RequestError
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.bounds import MAX_CHOICES, MAX_DETOKENIZED
from isomoe.server.generate import answer, stream
from isomoe.server.generate_request import GenerateRequest, Texts
from isomoe.server.http import Json, TokenIds, disconnected, json_router, sse

PROBE_SECONDS = 20.0
"""How long `/health_generate` waits for a sign of life."""
_LOOK_SECONDS = 0.1
_STATE_SECONDS = 1.0


def native_router(engine: AsyncEngine) -> APIRouter:
    """The endpoints: generation, health, information, the cache, experts, tokens, metrics."""
    router = json_router()
    _add_generation(router, engine)
    _add_expert_record(router, engine)
    _add_health(router, engine)
    _add_information(router, engine)
    _add_tokens(router, engine)
    return router


class AbortRequest(BaseModel):
    """The request to end early, or all of them."""

    model_config = ConfigDict(extra="ignore")

    rid: str = ""
    abort_all: bool = False


def _add_generation(router: APIRouter, engine: AsyncEngine) -> None:
    @router.put("/generate")
    @router.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Generates for a prompt or a batch of them."""
        if body.stream:
            return sse(stream(engine, body))
        return Json(await disconnected(request, answer(engine, body)))

    @router.post("/abort_request")
    async def abort_request(body: AbortRequest) -> Json:
        """Ends a request early; its client gets what there is. Unknown ids are no error."""
        if not body.rid and not body.abort_all:
            raise RequestError("rid: name the request to abort, or set abort_all")
        return Json({"aborted": engine.abort(None if body.abort_all else body.rid)})

    @router.get("/flush_cache")
    @router.post("/flush_cache")
    async def flush_cache() -> Response:
        """Forgets all cached prefixes."""
        if not await engine.flush_cache():
            raise RequestError("the cache is not flushed while requests are running or waiting")
        return PlainTextResponse("Cache flushed.\n")


def _add_expert_record(router: APIRouter, engine: AsyncEngine) -> None:
    @router.get("/start_expert_distribution_record")
    @router.post("/start_expert_distribution_record")
    async def start_expert_distribution_record() -> Response:
        """Records how often each expert is chosen, from now on."""
        await engine.start_expert_record()
        return PlainTextResponse("Start recording the expert distribution.\n")

    @router.get("/stop_expert_distribution_record")
    @router.post("/stop_expert_distribution_record")
    async def stop_expert_distribution_record() -> Response:
        """Ends the record; it can still be dumped."""
        await engine.stop_expert_record()
        return PlainTextResponse("Stop recording the expert distribution.\n")

    @router.get("/dump_expert_distribution_record")
    @router.post("/dump_expert_distribution_record")
    async def dump_expert_distribution_record() -> Json:
        """The record, as `--init-expert-location` takes it."""
        return Json({"logical_count": await engine.expert_load()})


def _add_health(router: APIRouter, engine: AsyncEngine) -> None:
    @router.get("/ping")
    @router.get("/health")
    async def health() -> Response:
        """Whether the engine lives."""
        _check_alive(engine)
        return Response()

    @router.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """Whether the engine brings a token, or is busy bringing others."""
        await disconnected(request, _probe(engine))
        return Response()

    @router.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads."""
        try:
            async with asyncio.timeout(_STATE_SECONDS):
                engine.metrics.on_state(await engine.state())
        except (TimeoutError, EngineDeadError):
            pass  # then the last step's numbers have to do
        return Response(engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _check_alive(engine: AsyncEngine) -> None:
    if engine.dead is not None:
        raise EngineDeadError(engine.dead)


async def _probe(engine: AsyncEngine) -> None:
    """Returns at the first sign of life: a token of its own, or any step after it was asked.

    Raises:
        RequestError: 503, if none comes in time.
        EngineDeadError: if the engine is gone.
    """
    start = monotonic()
    token = asyncio.ensure_future(_one_token(engine))
    try:
        while monotonic() < start + PROBE_SECONDS:
            await asyncio.wait({token}, timeout=_LOOK_SECONDS)
            if token.done():
                return token.result()
            if engine.metrics.last_step > start:
                return
    finally:
        token.cancel()
        await asyncio.gather(token, return_exceptions=True)
    raise RequestError(f"the engine ran no step in {PROBE_SECONDS:g} s", 503)


async def _one_token(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    while True:
        try:
            request = await engine.submit([0], params)
            break
        except RequestError as error:
            if error.status != 429:
                raise
        await asyncio.sleep(_LOOK_SECONDS)
    try:
        await request.result()
    finally:
        request.close()


def _add_information(router: APIRouter, engine: AsyncEngine) -> None:
    config, info = engine.config, engine.info

    @router.get("/model_info")
    @router.get("/get_model_info")
    async def model_info() -> Json:
        """What is served."""
        return Json(
            {
                "model_path": config.engine.model_path or str(info.folder),
                "tokenizer_path": str(info.folder),
                "served_model_name": engine.model_name,
                "is_generation": True,
                "model_type": info.hf_config.get("model_type"),
                "architectures": info.hf_config.get("architectures"),
                "dtype": info.dtype,
                "context_length": info.context_length,
                "vocab_size": info.vocab_size,
            }
        )

    @router.get("/server_info")
    @router.get("/get_server_info")
    async def server_info() -> Json:
        """The settings, the layout's plan, and each attention-DP group's pages and requests."""
        state = await engine.state()
        settings: dict[str, Any] = msgspec.to_builtins(config)
        del settings["api_key"]
        of_engine = settings.pop("engine")
        return Json(
            {
                **of_engine.pop("parallelism"),
                **of_engine,
                **settings,
                "model_path": config.engine.model_path or str(info.folder),
                "context_length": info.context_length,
                "page_size": info.page_size,
                "dtype": info.dtype,
                "device": info.device,
                "version": __version__,
                "layout": str(config.engine.parallelism),
                "plan": engine.plan,
                "max_total_num_tokens": engine.limits.num_pages * engine.limits.page_size,
                "waiting": state.waiting,
                "retracted": state.retracted,
                "internal_states": [group._asdict() for group in state.groups],
            }
        )

    @router.get("/version")
    async def version() -> Json:
        """Of isomoe."""
        return Json({"version": __version__})


class TokenizeRequest(BaseModel):
    """A text, or several, as `prompt` (`text` is taken too)."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | Texts | None = None
    text: str | Texts | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Token ids, or several lists of them."""

    model_config = ConfigDict(extra="ignore")

    tokens: TokenIds | list[TokenIds]
    skip_special_tokens: bool = True


def _add_tokens(router: APIRouter, engine: AsyncEngine) -> None:
    @router.post("/v1/tokenize")
    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Json:
        """Token ids of a text, or of each of several."""
        given = body.text if body.prompt is None else body.prompt
        if given is None:
            raise RequestError("prompt: a text, or a list of texts, is needed")
        texts = [given] if isinstance(given, str) else given
        if len(texts) > MAX_CHOICES:
            raise RequestError(f"prompt: {len(texts)} texts are more than {MAX_CHOICES}")
        encoding = (engine.encode(text, body.add_special_tokens) for text in texts)
        found = await disconnected(request, asyncio.gather(*encoding))
        reply: dict[str, list[Any]] = {"tokens": found, "count": [len(ids) for ids in found]}
        if body.return_token_strs:
            reply["token_strs"] = [await engine.decode_each(ids) for ids in found]
        if isinstance(given, str):
            return Json({**_first(reply), "max_model_len": engine.info.context_length})
        return Json({**reply, "max_model_len": engine.info.context_length})

    @router.post("/v1/detokenize")
    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Json:
        """The text of token ids, or of each of several lists: vLLM's `prompt`, SGLang's `text`."""
        several = bool(body.tokens) and isinstance(body.tokens[0], list)
        lists: list[list[int]] = body.tokens if several else [body.tokens]  # type: ignore[assignment, list-item]
        if len(lists) > MAX_CHOICES or sum(map(len, lists)) > MAX_DETOKENIZED:
            raise RequestError(
                f"tokens: more than {MAX_CHOICES} lists, or {MAX_DETOKENIZED} ids in all"
            )
        decoding = (engine.decode(ids, body.skip_special_tokens) for ids in lists)
        texts = await disconnected(request, asyncio.gather(*decoding))
        reply = {"prompt": texts, "text": texts}
        return Json(reply if several else _first(reply))


def _first(lists: dict[str, list[Any]]) -> dict[str, Any]:
    return {name: values[0] for name, values in lists.items()}
