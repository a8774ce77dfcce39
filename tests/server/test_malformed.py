"""Thousands of malformed requests: each is answered, none with a 5xx, and nothing of them stays."""

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httpx2
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from idle import wait_idle
from schemathesis import GenerationMode

from isomoe.server.config import ServerConfig
from servers import Server, running

ANSWER_SECONDS = 10.0
"""Whoever waits longer is stuck."""
PATIENCE_SECONDS = 0.5
"""How long an incomplete request waits for an answer before its client goes away."""
CLOSE_SECONDS = 5.0
CONCURRENT = 8
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
KIB_A_REQUEST = 3
"""A round of requests that has been sent before may let a process grow by so much for each. What
a forgotten request holds is more: a task, its context, the tokens."""
MOST_ROUNDS = 12
"""In the first rounds processes do grow: allocators keep what is freed, and matrix products keep
code for each shape they have met."""
LIMIT_BYTES = ServerConfig().max_request_bytes

QUESTION = "Question: Mia has 3 apples and buys 4. How many apples does she have?\nAnswer:"
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 2,
    },
    "/generate": {"text": QUESTION, "sampling_params": {"max_new_tokens": 2}},
    "/tokenize": {"prompt": QUESTION},
    "/detokenize": {"tokens": [1, 2]},
    "/abort_request": {"rid": "unknown"},
}
"""A good body of each endpoint that takes one."""
INNER = {"/generate": "sampling_params", "/v1/chat/completions": "messages"}
"""Where an object is in them, or the first of a list."""

WILD = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-1", "0", "-0.0", "0.1", "1e308"),
    *("5e-324", "2147483648", "9223372036854775807", "9223372036854775808"),
    *("-9223372036854775809", "18446744073709551616", "1" + "0" * 400, "-" + "9" * 5000),
    *("01", "1.", ".5", "+1", "0x10", "true", "false", "null", "undefined", "'single'", "nul"),
    *('""', '" "', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\uD83D\\uDE00"', '"\\x"'),
    *('"\n"', '"' + "x" * 20_000 + '"', '"1e5"', '"NaN"', '"("', '"(a*)*b"'),
    '"a{1000}{1000}{1000}"',
    *("[]", "[[]]", "[null]", '[""]', "[{}]", "[true]", "[1.5]", "[-1]", "[640]", "[0, -1]"),
    *("[9223372036854775808]", "[-9223372036854775809]", "[1e30]", '["\\ud800"]'),
    *('[[0], ["a"]]', '[0, "a"]', "[[[0]]]"),
    *("[" + "0, " * 20_000 + "0]", "[" + '"a", ' * 3000 + '"a"]'),
    *("{}", '{"a": 1}', '{"": null}', '{"0": NaN}', '{"-1": 5}', '{"640": 1}', '{"0": 1e9}'),
    *('{"9223372036854775808": 1}', '{"\\ud800": 1}', '{"1": 1, "1": 2}'),
    *('{"type": "json_schema"}', '{"type": "json_schema", "json_schema": {"schema": 3}}'),
    '{"type": "object", "$ref": "#"}',
    *("[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300, "[" * 50_000),
]
"""JSON, or nearly so, in the place of a value."""
REFUSED = [
    *(("/v1/completions", "temperature", value) for value in ("NaN", "-1", "1e999", '"hot"')),
    *(("/v1/completions", "top_p", value) for value in ("Infinity", "-0.1", "1.1", "[]")),
    *(("/v1/completions", "max_tokens", value) for value in ("-1", "1.5", "1e30", "{}")),
    *(("/v1/completions", "n", value) for value in ("0", "-1", "1000000")),
    *(("/v1/completions", "prompt", value) for value in ("[640]", "[-1]", "[1.5]", "[true]")),
    *(("/v1/completions", "prompt", value) for value in ("[]", "3", "{}", '"\\ud800"')),
    ("/v1/completions", "prompt", "[9223372036854775808]"),
    ("/v1/completions", "stop", '["\\udfff"]'),
    ("/v1/completions", "logit_bias", '{"640": 1}'),
    ("/v1/completions", "stop_token_ids", "[18446744073709551616]"),
    ("/v1/completions", "guided_regex", '"("'),
    ("/v1/chat/completions", "messages", "[]"),
    ("/v1/chat/completions", "messages", '[{"role": "nobody", "content": "x"}]'),
    ("/v1/chat/completions", "max_tokens", "-1"),
    ("/v1/chat/completions", "top_logprobs", "-1"),
    ("/generate", "sampling_params", '{"temperature": NaN}'),
    ("/generate", "sampling_params", '{"max_new_tokens": -1}'),
    ("/generate", "input_ids", "[0]"),  # beside the text
    ("/generate", "text", '"\\ud800"'),
    ("/tokenize", "prompt", "[[0]]"),
    ("/detokenize", "tokens", "[640]"),
    ("/detokenize", "tokens", "[-9223372036854775809]"),
]
"""A field with a value that it must not have."""


def refused_bodies() -> Iterator[tuple[str, bytes]]:
    """What cannot be meant by anything."""
    for path, field, value in REFUSED:
        yield path, spoiled({**BASES[path], field: "@"}, value)
    for path, base in BASES.items():
        good = json.dumps(base).encode()
        bodies = [
            *(b"", b" ", b"null", b"true", b"3", b'"text"', b"[]", b"[{}]", b"{}", b"{", b"}"),
            *(good[:-1], good[: len(good) // 2], good + good, good + b"x"),
            *(good.decode().encode(name) for name in ("utf-16", "utf-32")),
            *(good[:-2] + bad + good[-2:] for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80")),
            *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000),
            *(b"prompt=text&max_tokens=2", b"--x\r\n\r\n--x--", b"\x00" * 1000, b"9" * 100_000),
        ]
        yield from ((path, body) for body in bodies)


def odd_bodies() -> Iterator[tuple[str, bytes]]:
    """What may be ignored."""
    for path, base in BASES.items():
        good = json.dumps(base).encode()
        yield path, b"\xef\xbb\xbf" + good
        yield path, good[:-1] + b', "more": ' + b"[" * 2000 + b"]" * 2000 + b"}"
        yield path, good[:-1] + b"".join(b', "%d": 0' % key for key in range(20_000)) + b"}"
        yield path, good[:-1] + b"," + good[1:]  # every key twice


def wild_fields(schema: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Good bodies but for one field, each of the server's own fields with each wild value."""
    for path, base in BASES.items():
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name in properties(schema, body["schema"]):
            yield from ((path, spoiled({**base, name: "@"}, value)) for value in WILD)
        if path in INNER:
            inner = base[INNER[path]]
            some = inner[0] if isinstance(inner, list) else inner
            kind = properties(schema, body["schema"])[INNER[path]]
            for name in properties(schema, kind):
                bad = {**some, name: "@"}
                whole = {**base, INNER[path]: [bad] if isinstance(inner, list) else bad}
                yield from ((path, spoiled(whole, value)) for value in WILD)


def properties(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The fields of the first object that a part of an OpenAPI schema leads to."""
    if "properties" in part:
        fields: dict[str, Any] = part["properties"]
        return fields
    if "$ref" in part:
        return properties(schema, schema["components"]["schemas"][part["$ref"].split("/")[-1]])
    nested = [*part.get("anyOf", ()), *([part["items"]] if "items" in part else ())]
    return next((found for each in nested if (found := properties(schema, each))), {})


def spoiled(body: dict[str, Any], value: str) -> bytes:
    return json.dumps(body).replace('"@"', value).encode()


def wild_http(rng: Random, count: int) -> Iterator[bytes]:
    """Requests that are no good HTTP, or stop half-way; whether they get an answer is open."""
    for _ in range(count):
        data = bytearray(good_http(rng))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            end = at + rng.randint(1, 20)
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at:at] = rng.randbytes(end - at)
                case 2:
                    data[at:at] = data[at:end]
                case 3:
                    del data[at:end]
        yield bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)


def good_http(rng: Random) -> bytes:
    path = rng.choice([*BASES, "/health", "/v1/models", "/nowhere"])
    body = json.dumps(BASES[path]).encode() if path in BASES else b""
    method = rng.choice((b"POST", b"GET", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE"))
    if path in BASES and rng.random() < 0.8:
        method = b"POST"
    head = method + b" " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
    if rng.random() < 0.3:
        chunks = [body[at : at + 20] for at in range(0, len(body), 20)]
        sized = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + sized + b"0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
REFUSED_HTTP = [
    b"\r\n\r\n\r\nnonsense\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET  HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: many\r\n\r\n",
    HEAD + b"Content-Length: 1e3\r\n\r\n",
    HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}",
    HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT_BYTES + 1),
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n",
    HEAD + b"X: " + b"x" * (1 << 20) + b"\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\n\r\n{}surplus\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.0\r\n\r\n",
    b"BREW /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n",
    b"GET /%ff%00%zz/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
]
"""Requests that must be refused at once, though some promise more to come."""
UNFINISHED_HTTP = [
    b"",
    b"P",
    HEAD,
    HEAD + b"Content-Length: 500\r\n\r\n",
    HEAD + b"Content-Length: 500\r\nExpect: 100-continue\r\n\r\n",
    HEAD + b'Content-Length: 500\r\n\r\n{"prompt": "',
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{",
    HEAD + b'Transfer-Encoding: chunked\r\n\r\n2\r\n{"\r\n',
]
"""Requests that nobody can answer yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How many requests of each kind are sent; of the others all are."""

    by_schema: int
    by_field: int | None
    by_bytes: int


async def attack(server: Server, round_: Round, seed: int) -> Counter[int | None]:
    """Sends all kinds of malformed requests; how many had which status (None: no answer)."""
    rng = Random(seed)
    schema = httpx2.get(f"{server.url}/openapi.json").json()
    fields = list(wild_fields(schema))
    if round_.by_field is not None:
        fields = rng.sample(fields, round_.by_field)
    async with AsyncExitStack() as stack:
        for data in UNFINISHED_HTTP:
            _, writer = await stack.enter_async_context(connection(server))
            writer.write(data)
        statuses: Counter[int | None] = Counter()
        statuses.update(await asyncio.to_thread(send_by_schema, server, round_.by_schema, seed))
        wrong = list(refused_bodies())
        refused = await send_bodies(server, wrong)
        for (path, body), status in zip(wrong, refused, strict=True):
            assert status == 400, (path, body[:300], status)
        statuses.update(refused)
        statuses.update(await send_bodies(server, [*odd_bodies(), *fields]))
        raw = [
            send_bytes(server, data, PATIENCE_SECONDS) for data in wild_http(rng, round_.by_bytes)
        ]
        statuses.update(await few_at_once(raw))
        refused = await few_at_once(
            [send_bytes(server, data, ANSWER_SECONDS) for data in REFUSED_HTTP]
        )
        for data, status in zip(REFUSED_HTTP, refused, strict=True):
            assert status in range(400, 500), (data[:100], status)
        statuses.update(refused)
        assert await endless(server) == 413
    statuses.update([413, *[None] * len(UNFINISHED_HTTP)])
    return statuses


def send_by_schema(server: Server, count: int, seed: int) -> list[int]:
    """Requests that fit the server's own description, and such that do not."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = []
    cases = []
    for found in schema.get_all_operations():
        operation = found.ok()
        cases.append(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        if operation.body:
            cases.append(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.one_of(cases))
    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            shorten(case.body)
        answer = case.call(timeout=ANSWER_SECONDS)
        statuses.append(check(answer.status_code, answer.content, case))

    send()
    return statuses


def shorten(body: dict[str, Any]) -> None:
    """Keeps what turns out to be well-formed from generating for long."""
    for fields in (body, body.get("sampling_params")):
        if isinstance(fields, dict):
            if isinstance(fields.get("n"), int):
                fields["n"] = min(fields["n"], 2)
            for name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
                if isinstance(fields.get(name), int):
                    fields[name] = min(fields[name], 2)


def check(status: int, body: bytes, what: object) -> int:
    """The status, if the answer is what a client can make sense of."""
    assert status < 500, (status, body[:500], str(what)[:500])
    if status >= 400:
        error = json.loads(body)["error"]
        assert error["message"].strip() == error["message"] != "", str(what)[:500]
        assert "\n" not in error["message"], error
        assert error["type"], error
    return status


async def send_bodies(server: Server, bodies: Sequence[tuple[str, bytes]]) -> list[int]:
    async with httpx2.AsyncClient(base_url=server.url, timeout=ANSWER_SECONDS) as client:

        async def send(path: str, body: bytes) -> int:
            try:
                answer = await client.post(path, content=body)
            except httpx2.TimeoutException:
                raise AssertionError(f"{path}: stuck with {body[:300]!r}") from None
            return check(answer.status_code, answer.content, (path, body))

        return await few_at_once([send(*one) for one in bodies])


async def few_at_once(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """What they return; a few of them run at once."""
    gate = asyncio.Semaphore(CONCURRENT)

    async def run(call: Awaitable[Any]) -> Any:
        async with gate:
            return await call

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(call)) for call in calls]
    return [task.result() for task in tasks]


@asynccontextmanager
async def connection(server: Server) -> AsyncIterator[Streams]:
    url = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def send_bytes(server: Server, data: bytes, seconds: float) -> int | None:
    """The status of the first answer; None if none comes. Then the client is gone."""
    async with connection(server) as (reader, writer):
        writer.write(data)
        try:
            async with asyncio.timeout(seconds):
                line = await reader.readline()
        except (TimeoutError, ConnectionResetError):
            return None
        if not line:
            return None
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", line)
        assert found, line
        status = int(found[1])
        assert status < 500, (data, line)
        return status


async def endless(server: Server) -> int | None:
    """The answer to a body without end."""
    chunk = b"%x\r\n%s\r\n" % (1 << 20, bytes(1 << 20))
    async with connection(server) as (reader, writer):
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = asyncio.ensure_future(reader.readline())
        async with asyncio.timeout(ANSWER_SECONDS):
            while not answer.done():
                writer.write(chunk)
                await asyncio.sleep(0)
                try:
                    await writer.drain()
                except ConnectionError:
                    break
            return int((await answer).split()[1])


def resident_kib(pid: int) -> int:
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def wait_closed(pid: int, files: int) -> None:
    """Waits until a process has let go of its clients."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while open_files(pid) > files:
        assert time.monotonic() < deadline, f"{open_files(pid)} open files, {files} before"
        time.sleep(0.05)


def is_level(sizes: Sequence[Sequence[int]], count: int) -> bool:
    """Whether the last round, of `count` requests, brought no process above its peak before."""
    return all(
        after[-1] - max(after[:-1]) <= KIB_A_REQUEST * count for after in zip(*sizes, strict=True)
    )


@pytest.fixture(scope="module")
def target() -> Iterator[Server]:
    """A server of its own: others would notice what it is put through.

    Its steps come in few shapes, and few pages become resident as they are first used, so that
    it soon has all the memory it ever takes.
    """
    with running("--max-running-requests", "2", "--max-total-tokens", "2048") as server:
        yield server
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert server.stop() == 0
        log = "".join(server.log)
        assert "draining, 0 requests are open" in log
        assert "Traceback" not in log, log[log.index("Traceback") :][:10_000]


@pytest.mark.parametrize(
    ("first", "least"),
    [
        (None, 500),
        pytest.param(
            Round(by_schema=4000, by_field=None, by_bytes=1500), 10_000, marks=pytest.mark.slow
        ),
    ],
)
def test_malformed_requests_are_answered_and_leave_nothing_behind(
    target: Server, first: Round | None, least: int
) -> None:
    again = Round(by_schema=100, by_field=200, by_bytes=40)
    files = open_files(target.process.pid)
    statuses: Counter[int | None] = Counter()
    if first is not None:
        statuses += asyncio.run(attack(target, first, seed=0))
    sizes: list[Sequence[int]] = []
    count = 0
    while len(sizes) < 2 or not is_level(sizes, count):
        assert len(sizes) < MOST_ROUNDS, f"KiB of front end and engine grow: {sizes}"
        sent = asyncio.run(attack(target, again, seed=1))
        count = sent.total()
        statuses += sent
        wait_idle(target, CLOSE_SECONDS)
        wait_closed(target.process.pid, files)
        sizes.append([resident_kib(pid) for pid in (target.process.pid, target.engine_pid)])
    print(f"{dict(statuses)}; {count} a round, after each KiB of front end and engine: {sizes}")
    assert statuses.total() >= least
    assert {200, 400, 404, 405, 413, None} <= statuses.keys()


HUGE = {
    "a text": ("/v1/completions", '{"prompt": "%s"}', "ab 12 "),
    "token ids": ("/v1/completions", '{"prompt": [%s0]}', "0, "),
    "stop tokens": ("/v1/completions", '{"prompt": "a", "stop_token_ids": [%s0]}', "0, "),
    "a message": (
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": "%s"}]}',
        "ab 12 ",
    ),
    "texts": ("/generate", '{"text": [%s"a"]}', '"a", '),
    "a text to tokenize": ("/tokenize", '{"prompt": "%s"}', "ab 12 "),
    "texts to tokenize": ("/tokenize", '{"prompt": [%s"a"]}', '"a", '),
}
"""What a body consists of: its endpoint, its form, and what repeats in it."""


@pytest.mark.parametrize("kind", HUGE)
def test_a_body_as_large_as_allowed_is_answered_in_time_and_holds_up_nobody(
    target: Server, kind: str
) -> None:
    path, form, part = HUGE[kind]
    body = (form % (part * (LIMIT_BYTES // len(part) - 50))).encode()
    assert LIMIT_BYTES - 1000 < len(body) < LIMIT_BYTES
    small = [("/v1/completions", json.dumps(BASES["/v1/completions"]).encode())]

    async def send() -> list[int]:
        async with asyncio.TaskGroup() as group:
            huge = [group.create_task(send_bodies(target, [(path, body)])) for _ in range(3)]
            await asyncio.sleep(0.2)
            assert await send_bodies(target, small) == [200]
        return [task.result()[0] for task in huge]

    assert set(asyncio.run(send())) <= {200, 400}
