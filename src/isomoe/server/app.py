"""The HTTP application around an engine."""

from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from isomoe import __version__
from isomoe.errors import EngineDeadError, RequestError
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.http import Json, describe, describe_validation, error_response
from isomoe.server.limits import ApiKey, BodyLimit, LastResort
from isomoe.server.native import native_router
from isomoe.server.openai import openai_router
from isomoe.server.request_log import RequestLog

_ERROR = {
    "description": "What went wrong, in OpenAI's form.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


def create_app(engine: AsyncEngine) -> FastAPI:
    """The application that serves `engine`; it neither starts nor ends it."""
    config = engine.config
    app = FastAPI(
        title="isomoe",
        version=__version__,
        default_response_class=Json,
        responses={"4XX": _ERROR, "5XX": _ERROR},
    )
    app.include_router(openai_router(engine))
    app.include_router(native_router(engine))
    app.add_exception_handler(RequestError, _foreseen)
    app.add_exception_handler(EngineDeadError, _foreseen)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=config.max_request_bytes)
    if config.api_key is not None:
        app.add_middleware(ApiKey, key=config.api_key)
    app.add_middleware(LastResort)
    app.add_middleware(RequestLog, metrics=engine.metrics, contents=config.log_requests)
    return app


async def _foreseen(request: Request, error: Exception) -> Response:
    return error_response(*describe(error))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, field = describe_validation(error)
    return error_response(message, 400, param=field)


async def _http(request: Request, error: Exception) -> Response:
    """The router's 404 and 405, and what middleware refuses."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    own = {404: f"{asked}: there is no such endpoint", 405: f"{asked}: the method is not allowed"}
    unsaid = error.detail == HTTPStatus(error.status_code).phrase
    message = own.get(error.status_code, error.detail) if unsaid else error.detail
    return error_response(message, error.status_code, headers=error.headers)
