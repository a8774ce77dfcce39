"""A worker in a process of its own: the end of the pipe that is not the engine core's."""

import os
import pickle
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from isomoe.child import die_with_parent
from isomoe.comm.rendezvous import leave
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
from isomoe.engine.sampler import Answer
from isomoe.engine.step import StepShape
from isomoe.engine.worker import Worker
from isomoe.errors import IsomoeError

_ANSWER_POLL_SECONDS = 50e-6
"""How often a worker looks whether its device has an answer, while no step comes in."""
_PROGRESS_SECONDS = 0.05
_SENDING = threading.Lock()
"""The shortest time between two reports on loading."""


def main(pipe_fd: int, lifeline_fd: int) -> None:
    """Serves steps until told to stop.

    Args:
        pipe_fd: the pipe to the engine core.
        lifeline_fd: a pipe that nobody writes to; its end is the end of the parent.
    """
    die_with_parent(lifeline_fd)
    pipe = Connection(pipe_fd)
    try:
        _serve(pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)
    except Exception as error:
        _report(pipe, error)
        os._exit(1)
    leave()
    # Nothing is left to save, and the interpreter's own end takes a while with torch.
    os._exit(0)


def _serve(pipe: Connection) -> None:
    launch = pickle.loads(pipe.recv_bytes())
    assert isinstance(launch, Launch)
    torch.set_num_threads(threads_per_rank(launch.config.parallelism.tp_size))
    progress = _progress(pipe) if launch.rank == 0 else None
    worker = Worker(launch.config, launch.info, launch.rank, launch.port, progress)
    _send(pipe, Loaded(available_bytes=worker.available_bytes()))
    last: StepShape | None = None
    answers: deque[Answer] = deque()
    outbox = _outbox(pipe)
    while True:
        # Answers go out as soon as they are there, and the next step is taken while they are not.
        while answers and (answers[0].ready or not pipe.poll(_ANSWER_POLL_SECONDS)):
            if answers[0].ready:
                outbox.put(answers.popleft().wait())
        match pickle.loads(pipe.recv_bytes()):
            case WorkerStep(shape=shape, group=group):
                last = shape or last
                assert last is not None
                answer = worker.launch(last, group)
                if answer is not None:
                    answers.append(answer)
            case AllocateCache(num_pages=num_pages, graph_rows=graph_rows):
                worker.allocate_cache(num_pages, graph_rows)
                _send(pipe, CacheReady())
            case CountExperts():
                outbox.put(ExpertsCounted(load=worker.expert_load()))
            case Stop():
                return


def _outbox(pipe: Connection) -> SimpleQueue[Any]:
    """What is put into it is sent by a thread of its own.

    A large answer waits until the engine core reads it, and the core may be waiting for this rank
    to read a large step.
    """
    outbox: SimpleQueue[Any] = SimpleQueue()

    def send() -> None:
        with suppress(OSError):  # the core has gone; the main thread sees that, too
            while True:
                _send(pipe, outbox.get())

    threading.Thread(target=send, name="answers", daemon=True).start()
    return outbox


def threads_per_rank(ranks: int) -> int:
    """torch threads of each of `ranks` workers on this host."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // ranks)


def _progress(pipe: Connection) -> Callable[[int, int], None]:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > _PROGRESS_SECONDS:
            last = now
            _send(pipe, LoadProgress(done=done, total=total))

    return progress


def _report(pipe: Connection, error: Exception) -> None:
    failure = Failure(
        error=error if isinstance(error, IsomoeError) else None,
        summary=f"{type(error).__name__}: {error}",
        trace=traceback.format_exc(),
        at_seconds=time.monotonic(),
    )
    with suppress(OSError):  # the parent is gone
        _send(pipe, failure)


def _send(pipe: Connection, message: Any) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    with _SENDING:
        pipe.send_bytes(data)
