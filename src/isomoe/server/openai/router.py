"""The endpoints."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from isomoe.server.async_engine import AsyncEngine
from isomoe.server.http import Json, disconnected, error_response, json_router, sse
from isomoe.server.openai.chat import chat, stream_chat
from isomoe.server.openai.completions import complete, stream_completion
from isomoe.server.openai.protocol import ChatRequest, CompletionRequest


def openai_router(engine: AsyncEngine) -> APIRouter:
    """The OpenAI API of an engine."""
    router = json_router()
    created = int(time.time())

    def card() -> dict[str, Any]:
        """The model that is served, with vLLM's fields."""
        return {
            "id": engine.model_name,
            "object": "model",
            "created": created,
            "owned_by": "isomoe",
            "root": engine.config.engine.model_path or engine.model_name,
            "parent": None,
            "max_model_len": engine.info.context_length,
        }

    def unknown(model: str | None) -> Response | None:
        """The answer to those who ask for another model."""
        if model in (None, "", engine.model_name, engine.config.engine.model_path):
            return None
        return error_response(
            f"model {str(model)[:200]!r} is not served here, only {engine.model_name!r}",
            404,
            param="model",
            code="model_not_found",
        )

    @router.get("/v1/models")
    async def models() -> Response:
        """Lists the one model."""
        return Json({"object": "list", "data": [card()]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """Describes the model."""
        return unknown(model) or Json(card())

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Lets texts go on."""
        if refusal := unknown(body.model):
            return refusal
        if body.stream:
            return sse(stream_completion(engine, body))
        return Json(await disconnected(request, complete(engine, body)))

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Gives a chat its next message."""
        if refusal := unknown(body.model):
            return refusal
        if body.stream:
            return sse(stream_chat(engine, body))
        return Json(await disconnected(request, chat(engine, body)))

    return router
