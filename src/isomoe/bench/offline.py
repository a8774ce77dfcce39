"""The offline engine in a process of its own, to be measured against the server."""

import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from isomoe.bench.workload import BenchRequest
from isomoe.child import start_child
from isomoe.config import EngineConfig
from isomoe.errors import EngineDeadError, IsomoeError

_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRun:
    """One batch through `LLM.generate`.

    Attributes:
        output_tokens: of all answers.
        seconds: from the call to its return.
    """

    output_tokens: int
    seconds: float


class OfflineEngine:
    """`LLM` in a child, so that its memory, threads and idle time are those of a server's engine.

    Raises:
        IsomoeError: from the constructor, if the engine refuses its configuration.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._pipe, theirs = Pipe()
        try:
            call = f"isomoe.bench.offline.main({theirs.fileno()})"
            self._process = start_child(call, (theirs.fileno(),))
        finally:
            theirs.close()
        try:
            self._ask(config)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def run(self, requests: Sequence[BenchRequest], ignore_eos: bool) -> OfflineRun:
        """Generates for all requests at once, greedily.

        Raises:
            IsomoeError: if a request cannot be served, or the engine is gone.
        """
        found = self._ask((requests, ignore_eos))
        assert isinstance(found, OfflineRun)
        return found

    def close(self) -> None:
        """Ends the child. May be called twice."""
        self._pipe.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: Any) -> Any:
        try:
            self._pipe.send(message)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise EngineDeadError(f"the offline engine's process ended {how}") from None
        if isinstance(answer, IsomoeError):
            raise answer
        return answer


def main(pipe_fd: int) -> None:
    """Serves batches until the parent closes the pipe."""
    pipe = Connection(pipe_fd)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            _serve(pipe)
        except IsomoeError as error:
            pipe.send(error)


def _serve(pipe: Connection) -> None:
    from isomoe.engine import LLM, SamplingParams

    with LLM.from_config(pipe.recv()) as llm:
        pipe.send("ready")
        while True:
            requests, ignore_eos = pipe.recv()
            params = [
                SamplingParams(
                    max_tokens=request.max_tokens, temperature=0.0, ignore_eos=ignore_eos
                )
                for request in requests
            ]
            prompts = [request.prompt for request in requests]
            began = time.perf_counter()
            outputs = llm.generate(prompts, params)
            seconds = time.perf_counter() - began
            tokens = sum(len(output.token_ids) for output in outputs)
            pipe.send(OfflineRun(output_tokens=tokens, seconds=seconds))
