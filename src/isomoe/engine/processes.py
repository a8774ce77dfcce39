"""The workers of several ranks, each in a process of its own on this host."""

import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from isomoe.child import start_child
from isomoe.comm.rendezvous import Rendezvous, has_own_gpu
from isomoe.config import EngineConfig
from isomoe.engine.executor import Executor, Progress
from isomoe.engine.messages import (
    AllocateCache,
    CacheReady,
    CountExperts,
    ExpertsCounted,
    Failure,
    Launch,
    Loaded,
    LoadProgress,
    Stop,
    WorkerStep,
)
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.step import GroupOutput, Step, StepShape
from isomoe.engine.worker import ExpertLoad
from isomoe.engine.worker_process import threads_per_rank
from isomoe.errors import EngineDeadError

_GRACE_SECONDS = 0.5
"""How long the ranks may take to say what happened, once one has failed."""
_STOP_SECONDS = 3.0
"""How long a worker may take to stop when asked to."""


@dataclass(slots=True, eq=False)
class _Rank:
    """The parent's end of one worker.

    Attributes:
        said: messages that nobody has taken yet, by their kind: a rank may be a step ahead of
            another, and be asked for something else before its answer to a step is taken.
    """

    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    said: defaultdict[type, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    failure: Failure | None = None


class ProcessExecutor(Executor):
    """Worker processes, which talk to this one over pipes that they inherit.

    They start from a fresh interpreter that runs no part of the user's program, so a script needs
    no `__main__` guard. They end with this process, however it ends.
    """

    def __init__(
        self, config: EngineConfig, info: ModelInfo, progress: Progress | None = None
    ) -> None:
        parallelism = config.parallelism
        self._attn_tp = parallelism.attn_tp
        self._can_capture = has_own_gpu(torch.device(info.device), parallelism.tp_size)
        self._watchdog_seconds = config.watchdog_timeout_seconds
        self._ranks: list[_Rank] = []
        self._last_shape: StepShape | None = None
        self._selector = selectors.DefaultSelector()
        lifeline, self._lifeline = os.pipe()
        self._end = weakref.finalize(
            self, _end, self._ranks, self._selector, self._lifeline, os.getpid()
        )
        self._over = "the engine was shut down"
        self._rendezvous: Rendezvous | None = None
        try:
            self._rendezvous = Rendezvous()
            for index in range(parallelism.tp_size):
                self._ranks.append(_start(index, parallelism.tp_size, lifeline))
                self._selector.register(self._ranks[-1].pipe, selectors.EVENT_READ, self._ranks[-1])
            for rank in self._ranks:
                port = self._rendezvous.port
                self._send([rank], Launch(config=config, info=info, rank=rank.rank, port=port))
            found = self._collect(self._ranks, Loaded, progress)
        except BaseException:
            self.shutdown()
            raise
        finally:
            os.close(lifeline)
        self._available_bytes: int = min(loaded.available_bytes for loaded in found)

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    @property
    def available_bytes(self) -> int:
        """Memory that the KV cache may take on the rank with the least."""
        return self._available_bytes

    @property
    def can_capture(self) -> bool:
        """Whether every rank has a GPU of its own, so that its collectives stay on GPUs."""
        return self._can_capture

    def allocate_cache(self, num_pages: int, graph_rows: tuple[int, ...] = ()) -> None:
        """Makes every rank's KV cache."""
        self._send(self._ranks, AllocateCache(num_pages=num_pages, graph_rows=graph_rows))
        self._collect(self._ranks, CacheReady)

    def launch(self, step: Step) -> None:
        """Starts a step. Each group is sent its own part alone."""
        if not self._end.alive:
            raise EngineDeadError(self._over)
        width = self._attn_tp
        shape = None if step.shape is self._last_shape else step.shape
        self._last_shape = step.shape
        for index, group in enumerate(step.groups):
            ranks = self._ranks[index * width : (index + 1) * width]
            self._send(ranks, WorkerStep(shape=shape, group=group))

    def collect(self) -> list[GroupOutput]:
        """The answers to the oldest step."""
        if not self._end.alive:
            raise EngineDeadError(self._over)
        return self._collect(self._ranks[:: self._attn_tp], GroupOutput)

    def expert_load(self) -> list[ExpertLoad]:
        """What each rank has counted."""
        if not self._end.alive:
            raise EngineDeadError(self._over)
        self._send(self._ranks, CountExperts())
        return [found.load for found in self._collect(self._ranks, ExpertsCounted)]

    def check_alive(self) -> None:
        # Without a step under way a worker says nothing, so that whatever can be read is its end.
        if self._selector.select(0) and any(map(_ended, self._ranks)):
            self._fail(loading=False)

    def shutdown(self) -> None:
        """Ends every worker. May be called twice."""
        self._end()
        self._rendezvous = None

    def _send(self, ranks: list[_Rank], message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for rank in ranks:
            try:
                rank.pipe.send_bytes(data)
            except OSError:
                self._fail(loading=isinstance(message, Launch))

    def _collect(
        self, ranks: list[_Rank], kind: type[Any], progress: Progress | None = None
    ) -> list[Any]:
        """One message of `kind` from each of `ranks`, in their order."""
        loading = kind is Loaded
        while silent := [rank for rank in ranks if not rank.said[kind]]:
            # Loading and capturing take as long as they take.
            watched = None if kind in (Loaded, CacheReady) else self._watchdog_seconds
            ready = self._selector.select(watched)
            if not ready:
                self._give_up(silent)
            for key, _ in ready:
                rank: _Rank = key.data
                match _receive(rank):
                    case None | Failure():
                        self._fail(loading)
                    case LoadProgress(done=done, total=total):
                        if progress is not None:
                            progress(done, total)
                    case message:
                        expected = isinstance(message, (kind, GroupOutput))
                        assert expected, f"rank {rank.rank} sent {message}"
                        rank.said[type(message)].append(message)
        return [rank.said[kind].popleft() for rank in ranks]

    def _give_up(self, silent: list[_Rank]) -> NoReturn:
        """Ends everything because ranks do not answer."""
        names = ", ".join(f"rank {rank.rank} (process {rank.process.pid})" for rank in silent)
        self._over = f"no answer to a step within {self._watchdog_seconds:g} s from {names}"
        for rank in silent:
            rank.process.kill()
        self.shutdown()
        raise EngineDeadError(self._over)

    def _fail(self, loading: bool) -> NoReturn:
        """Ends everything once a rank has failed, and raises the first cause."""
        deadline = time.monotonic() + _GRACE_SECONDS
        open_ranks = [rank for rank in self._ranks if rank.failure is None]
        while open_ranks and time.monotonic() < deadline:
            open_ranks = [rank for rank in open_ranks if not _ended(rank)]
            if any(rank.failure is None and rank.process.poll() for rank in self._ranks):
                break
            time.sleep(0.01)
        culprit, cause = _first_cause(self._ranks)
        self.shutdown()
        if loading and cause is not None and cause.error is not None:
            raise cause.error
        error = _dead(culprit, cause)
        self._over = str(error)
        raise error


def _start(rank: int, ranks: int, lifeline: int) -> _Rank:
    ours, theirs = Pipe()
    environment = {"OMP_NUM_THREADS": str(threads_per_rank(ranks))}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    call = f"isomoe.engine.worker_process.main({theirs.fileno()}, {lifeline})"
    try:
        process = start_child(call, (theirs.fileno(), lifeline), environment)
    finally:
        theirs.close()
    return _Rank(rank, process, ours)


def _receive(rank: _Rank) -> Any:
    """The next message; None if the worker is gone. A failure is kept."""
    try:
        message = pickle.loads(rank.pipe.recv_bytes())
    except (EOFError, OSError):
        return None
    if isinstance(message, Failure):
        rank.failure = message
    return message


def _ended(rank: _Rank) -> bool:
    """Whether the worker has said why it fails, or is gone. Other messages are dropped."""
    while rank.failure is None:
        try:
            waiting = rank.pipe.poll()
        except OSError:
            return True
        if not waiting:
            return False
        if _receive(rank) is None:
            return True
    return True


def _first_cause(ranks: list[_Rank]) -> tuple[_Rank, Failure | None]:
    """A worker that ended without a word, else the one that failed first.

    The others fail as well, in collectives that their neighbour has left.
    """
    for rank in ranks:
        if rank.failure is None and rank.process.poll() is not None:
            return rank, None
    failed = [(rank.failure.at_seconds, rank.rank) for rank in ranks if rank.failure is not None]
    if not failed:
        return ranks[0], None
    culprit = ranks[min(failed)[1]]
    return culprit, culprit.failure


def _dead(rank: _Rank, cause: Failure | None) -> EngineDeadError:
    who = f"rank {rank.rank} (process {rank.process.pid})"
    if cause is not None:
        error = EngineDeadError(f"{who} raised {cause.summary}")
        error.add_note(cause.trace)
        return error
    code = rank.process.poll()
    if code is None:
        return EngineDeadError(f"{who} no longer answers")
    if code < 0:
        return EngineDeadError(f"{who} was killed by {signal.Signals(-code).name}")
    return EngineDeadError(f"{who} ended with exit code {code}")


def _end(ranks: list[_Rank], selector: selectors.BaseSelector, lifeline: int, owner: int) -> None:
    """Stops the workers, kills those that do not, and waits for all."""
    if os.getpid() != owner:  # a fork of the parent has no say
        return
    stop = pickle.dumps(Stop(), pickle.HIGHEST_PROTOCOL)
    idle = all(rank.failure is None and rank.process.poll() is None for rank in ranks)
    for rank in ranks:
        try:
            if idle:
                rank.pipe.send_bytes(stop)
            else:
                rank.process.kill()
        except OSError:
            rank.process.kill()
    deadline = time.monotonic() + _STOP_SECONDS
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        rank.pipe.close()
    selector.close()
    os.close(lifeline)
