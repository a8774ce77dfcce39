"""Processes that compile candidates, so that a device waits for no compiler.

Each holds the case's inputs on the same device and runs what it is given once. The compiled
kernels lie in Triton's cache on disk, where the process that times them finds them.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from time import perf_counter

from isomoe.bench.kernel_cases import CASES
from isomoe.bench.kernel_setting import Setting
from isomoe.kernels.gpu.configs import Config

_MOST = 12
_DIED = "crashed"
_STUCK = "timed out"
_PATIENCE_SECONDS = 120.0


class _Compiler:
    """One process, started when it is first needed and again when it has died."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, task: tuple[str, Setting, str, Config]) -> str | None:
        """Why the task failed; None if it did not."""
        if self._process is None or self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send(task)
            if not self._pipe.poll(_PATIENCE_SECONDS):
                self.close()
                return _STUCK
            cause: str | None = self._pipe.recv()
            return cause
        except (EOFError, OSError):
            self.close()
            return _DIED

    def close(self) -> None:
        """Ends the process. May be called twice."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


class CompilePool:
    """Several of them."""

    def __init__(self, size: int) -> None:
        self._is_over = False
        self._compilers = [_Compiler() for _ in range(size)]
        self._threads = ThreadPoolExecutor(size)

    def compile(
        self, case: str, at: Setting, seconds: float, kernel: str, tried: Sequence[Config]
    ) -> Mapping[int, str | None]:
        """Compiles and runs candidates of one kernel of a case, as far as time allows.

        Returns, by index, None or why it failed for each that was run.
        """
        tasks: SimpleQueue[int] = SimpleQueue()
        for index in range(len(tried)):
            tasks.put(index)
        outcomes: dict[int, str | None] = {}
        stop = perf_counter() + seconds

        def work(compiler: _Compiler) -> None:
            with suppress(Empty):
                while perf_counter() < stop and not self._is_over:
                    index = tasks.get_nowait()
                    outcomes[index] = compiler.run((case, at, kernel, tried[index]))

        list(self._threads.map(work, self._compilers))
        return outcomes

    def close(self) -> None:
        """Ends the processes."""
        self._is_over = True
        for compiler in self._compilers:
            compiler.close()
        self._threads.shutdown(cancel_futures=True)


@contextmanager
def compile_pool(size: int | None = None) -> Iterator[CompilePool]:
    """A pool of at most as many processes as there are cores to use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    pool = CompilePool(size or max(1, min(_MOST, cores - 1)))
    try:
        yield pool
    finally:
        pool.close()


def _serve(pipe: Connection) -> None:
    """Runs tasks until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    import torch

    from isomoe.bench.tuner import run_candidate

    cases = {case.name: case for case in CASES}
    last: tuple[str, Setting] | None = None
    prepared = None
    with suppress(EOFError, OSError), torch.inference_mode():
        while True:
            name, at, kernel, config = pipe.recv()
            if (name, at) != last or prepared is None:
                prepared = None
                prepared = cases[name].prepare(replace(at, copies=1))
                last = (name, at)
            try:
                pipe.send(run_candidate(prepared, kernel, config))
            except RuntimeError:  # the device is of no more use to this process
                os._exit(1)
