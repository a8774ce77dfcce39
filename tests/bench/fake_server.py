"""A small server that speaks OpenAI's streaming API as the tests want it, in a thread."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

VOCAB = 40


@dataclass(eq=False)
class FakeServer:
    """Answers every prompt with `max_tokens` tokens, `tokens_per_chunk` in a chunk.

    Attributes:
        describes: whether `/get_server_info` exists, and tells the vocabulary's size.
        takes_ids: whether token ids are taken as a prompt.
        has_usage: whether the last chunk counts tokens.
        key: demanded in every request, if there is one.
        breaks: "" or how the answer to a prompt of more than one token goes wrong:
            refuse, error-event, abort, no-done, cut, empty, garbage, stall.
        seconds: between chunks.
        answers_per_connection: after so many, the server closes it.
        requests: every document that was posted.
        most_open: the most requests that were open at once.
        connections: how many were made.
    """

    describes: bool = True
    takes_ids: bool = True
    has_usage: bool = True
    tokens_per_chunk: int = 1
    ignores_eos: bool = True
    key: str | None = None
    breaks: str = ""
    seconds: float = 0.0
    answers_per_connection: int = 1 << 30
    tls: Any = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_open: int = 0
    connections: int = 0
    port: int = 0
    _seen: set[tuple[int, ...]] = field(default_factory=set)
    _open: int = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._end.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            for _ in range(self.answers_per_connection):
                if not await self._answer(reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        method, path, _ = first.split(" ")
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            writer.write(_whole(401, {"error": {"message": "wrong key"}}))
        elif method == "GET":
            writer.write(self._page(path))
        else:
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.requests.append(body)
            self._open += 1
            self.most_open = max(self.most_open, self._open)
            try:
                return await self._stream(body, path.endswith("chat/completions"), writer)
            finally:
                self._open -= 1
        return True

    def _page(self, path: str) -> bytes:
        if path == "/v1/models":
            return _whole(200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
        if path == "/get_server_info" and self.describes:
            return _whole(200, {"model": {"vocab_size": VOCAB}})
        return _whole(404, {"detail": "Not Found"})

    async def _stream(self, body: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> bool:
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        refusal = self._refusal(prompt, body)
        breaks = self.breaks if len(prompt) > 3 else ""
        if refusal or breaks == "refuse":
            writer.write(_whole(400, {"error": {"message": refusal or "too\nlong"}}))
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        if chat:
            writer.write(_chunk({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        left = 0 if breaks == "empty" else body["max_tokens"]
        while left > 0:
            await asyncio.sleep(self.seconds)
            now = min(left, self.tokens_per_chunk)
            left -= now
            finish = None if left else "abort" if breaks == "abort" else "length"
            part = {"delta": {"content": "a" * now}} if chat else {"text": "a" * now}
            writer.write(_chunk({"choices": [{**part, "index": 0, "finish_reason": finish}]}))
            if breaks == "cut":
                return False
            if breaks == "stall":
                await asyncio.sleep(60)
            if breaks == "error-event":
                writer.write(_chunk({"error": {"message": "the engine is gone"}}))
                break
            if breaks == "garbage":
                writer.write(_chunk([1]))
                break
        if self.has_usage:
            writer.write(_chunk(self._usage(prompt, body["max_tokens"])))
        if breaks != "no-done":
            writer.write(_framed(b"data: [DONE]\n\n"))
        writer.write(b"0\r\n\r\n")
        return True

    def _refusal(self, prompt: Any, body: dict[str, Any]) -> str | None:
        if not isinstance(prompt, str):
            if not self.takes_ids:
                return "prompt must be a string"
            if max(prompt) >= VOCAB:
                return f"token id {max(prompt)} is out of the vocabulary"
        if "ignore_eos" in body and not self.ignores_eos:
            return "unknown field ignore_eos"
        return None

    def _usage(self, prompt: Any, output_tokens: int) -> dict[str, Any]:
        """Counts tokens of the prompt that some earlier prompt began with, too."""
        length = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        starts = [tuple(prompt[:end]) for end in range(1, length + 1)]
        cached = max((len(start) for start in starts if start in self._seen), default=0)
        self._seen.update(starts)
        return {
            "choices": [],
            "usage": {
                "prompt_tokens": length,
                "completion_tokens": output_tokens,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }


def _whole(status: int, document: object) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _chunk(document: object) -> bytes:
    return _framed(b"data: " + json.dumps(document).encode() + b"\n\n")


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
