"""A server that answers as a function says, however wrongly, in threads of this process."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What goes over the wire.

    Attributes:
        document: JSON, or the body as it is.
        delay: seconds before anything comes.
        cut: the connection ends before so many bytes of the body.
        endless: the body is repeated for ever.
    """

    document: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int = 0
    endless: bool = False

    @property
    def body(self) -> bytes:
        found = self.document
        return found if isinstance(found, bytes) else json.dumps(found).encode()


@dataclass(frozen=True)
class Question:
    """What was asked: the body is None for a page."""

    path: str
    body: Any
    headers: Mapping[str, str]


NOT_FOUND = Answer(document={"detail": "Not Found"}, status=404)
Answers = Callable[[Question], Answer]


@dataclass(eq=False)
class ReplyServer:
    """Answers on a free port of 127.0.0.1 while it is entered.

    Attributes:
        questions: all that came, in their order.
        most_open: the most that were open at once.
    """

    answers: Answers
    questions: list[Question] = field(default_factory=list)
    most_open: int = 0
    _open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each reply waits 40 ms for the client's ack

            def do_GET(self) -> None:
                outer._serve(self, None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer._serve(self, json.loads(self.rfile.read(length)))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        question = Question(handler.path, body, dict(handler.headers.items()))
        with self._lock:
            self.questions.append(question)
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        try:
            self._send(handler, self.answers(question))
        except OSError:  # the client has left
            handler.close_connection = True
        finally:
            with self._lock:
                self._open -= 1

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        self._ended.wait(answer.delay)
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.endless:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            while not self._ended.is_set():
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(answer.body), answer.body))
                time.sleep(0.001)
            return
        handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        handler.wfile.write(answer.body[: len(answer.body) - answer.cut])
        handler.close_connection = handler.close_connection or bool(answer.cut)
