"""The application as a whole, around an engine that does what the test says."""

import asyncio
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from isomoe.errors import EngineDeadError, RequestError
from isomoe.server.app import create_app
from isomoe.server.async_engine import AsyncEngine
from isomoe.server.config import ServerConfig
from isomoe.server.http import JsonRoute
from isomoe.server.limits import LastResort
from isomoe.server.metrics import Metrics

ASK = {"text": "1"}


class Engine:
    """Fails every request with `error`."""

    model_name = "broken"
    has_tokenizer = True

    def __init__(self) -> None:
        self.sampling_defaults: dict[str, Any] = {}
        self.config = ServerConfig()
        self.info = SimpleNamespace(
            context_length=64, vocab_size=8, folder="", hf_config={}, dtype="", device=""
        )
        self.metrics = Metrics()
        self.dead: str | None = None
        self.error: Exception = RequestError("no")

    async def submit(self, *args: Any) -> None:
        raise self.error

    async def state(self) -> None:
        raise self.error


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def app(engine: Engine) -> FastAPI:
    return create_app(cast(AsyncEngine, engine))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as one:
        yield one


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RequestError("the prompt is empty"), 400, "the prompt is empty"),
        (RequestError("full", 429), 429, "full"),
        (RequestError("late", 504), 504, "late"),
        (EngineDeadError("rank 1 ended"), 503, "the engine is gone: rank 1 ended"),
        (KeyError("secret"), 500, "internal error; the server's log has it"),
        (RecursionError(), 500, "internal error; the server's log has it"),
    ],
)
def test_every_error_has_an_answer(
    client: TestClient, engine: Engine, error: Exception, status: int, said: str, streams: bool
) -> None:
    engine.error = error
    answer = client.post("/generate", json={**ASK, "stream": streams})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == said
    assert ("retry-after" in answer.headers) == (status == 429)
    assert answer.headers["x-request-id"]


def test_what_nobody_foresaw_is_logged_with_its_traceback(
    client: TestClient, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = KeyError("secret")
    assert client.post("/generate", json=ASK).status_code == 500
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is engine.error


def test_an_answer_that_broke_off_breaks_the_connection() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError

    async def ask() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        with pytest.raises(KeyError):
            await LastResort(broken)({"type": "http"}, receive, send)
        return sent

    assert [message["type"] for message in asyncio.run(ask())] == ["http.response.start"]


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "", None, "x"]
)
def test_a_body_is_json_whatever_its_content_type_says(
    client: TestClient, kind: str | None
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post("/generate", content=b'{"text": "1"}', headers=headers)
    assert answer.json()["error"]["message"] == "no"


def test_endpoints_without_a_body_do_not_look_at_it(client: TestClient, engine: Engine) -> None:
    assert client.request("GET", "/health", content=b"{").status_code == 200
    engine.dead = "rank 1 ended"
    assert client.request("GET", "/health", content=b"{").status_code == 503


def test_metrics_are_told_of_a_dead_engine_too(client: TestClient, engine: Engine) -> None:
    engine.error = EngineDeadError("gone")
    assert client.post("/generate", json=ASK).status_code == 503
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert 'isomoe_http_responses_total{status="503"} 1.0' in answer.text


def test_every_endpoint_parses_bodies_strictly(app: FastAPI) -> None:
    routes = [one for one in routes_of(app) if one.body_field is not None]
    assert {one.path for one in routes} >= {"/generate", "/v1/completions", "/tokenize"}
    assert all(isinstance(one, JsonRoute) for one in routes)


def routes_of(app: Any) -> list[APIRoute]:
    """All of them; newer FastAPI keeps included routers as they are."""
    found: list[APIRoute] = []
    for route in app.routes:
        if isinstance(route, APIRoute):
            found.append(route)
        elif inner := getattr(route, "original_router", None):
            found += routes_of(inner)
    return found


def test_the_documentation_tells_every_endpoint_and_its_errors(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/generate", "/v1/chat/completions", "/metrics", "/health"} <= paths.keys()
    for methods in paths.values():
        for endpoint in methods.values():
            assert endpoint["description"]
            assert {"4XX", "5XX"} <= endpoint["responses"].keys()
            assert "422" not in endpoint["responses"]
