"""The engine core in a process of its own, between two sockets."""

import gc
import os
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq

from isomoe.child import die_with_parent
from isomoe.engine import EngineCore
from isomoe.engine.step import Step
from isomoe.errors import IsomoeError
from isomoe.layout import Move, Op, Plan, RegimePlan
from isomoe.server.expert_record import ExpertRecord
from isomoe.server.messages import (
    CacheFlushed,
    Cancel,
    EngineState,
    ExpertLoad,
    Failed,
    FlushCache,
    FromEngine,
    GetExpertLoad,
    GetState,
    Launch,
    LoadProgress,
    Ready,
    StartExpertRecord,
    StepResult,
    StepStats,
    StopExpertRecord,
    Submit,
    ToEngine,
)

_IDLE_MS = 250
"""How often an engine without work looks whether its workers live."""
_LAST_WORDS_MS = 1000
_PROGRESS_SECONDS = 0.05


def main(folder: str, lifeline_fd: int) -> None:
    """Runs the engine until the parent ends, or it fails.

    Args:
        folder: private to the two processes; the sockets are made in it.
        lifeline_fd: as in `die_with_parent`.
    """
    die_with_parent(lifeline_fd)
    channel = _Channel(folder)
    code = 1
    try:
        _run(channel)
    except IsomoeError as error:
        channel.send(Failed(kind=type(error).__name__, message=str(error)))
    except Exception as error:
        channel.send(Failed(kind="", message=f"{type(error).__name__}: {error}"))
        raise
    finally:
        channel.close()
    # Nothing is left to save, and the interpreter's own end takes a while with torch.
    os._exit(code)


class _Channel:
    """The engine's ends of the two sockets."""

    def __init__(self, folder: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._in = self._context.socket(zmq.PULL)
        self._out = self._context.socket(zmq.PUSH)
        for socket, name in ((self._in, "requests"), (self._out, "answers")):
            socket.set_hwm(0)
            socket.bind(f"ipc://{folder}/{name}")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Launch | ToEngine)

    def receive(self, wait_ms: int | None = None) -> list[Any]:
        """All messages that are there; waits for the first one. None waits without limit."""
        messages: list[Any] = []
        while self._in.poll(wait_ms if not messages else 0):
            messages.append(self._decoder.decode(self._in.recv()))
        return messages

    def send(self, message: FromEngine) -> None:
        """Queues a message; never waits."""
        self._out.send(self._encoder.encode(message))

    def close(self) -> None:
        """Lets what was sent arrive."""
        self._context.destroy(linger=_LAST_WORDS_MS)


def _run(channel: _Channel) -> None:
    launch, *early = channel.receive()
    assert isinstance(launch, Launch)
    core = EngineCore(launch.config, _progress(channel))
    try:
        channel.send(
            Ready(
                limits=core.scheduler.limits,
                plan=core.plan.to_json(),
                worker_pids=core.executor.pids,
            )
        )
        collectives = _CollectiveRows(core.plan)
        record = ExpertRecord(core.expert_load)
        gc.freeze()  # what is loaded stays, and need not be looked through again
        messages = early
        while True:
            for message in messages:
                _obey(message, core, record, channel)
            if core.has_work:
                began = time.monotonic()
                updates = core.step()
                if core.last_step is not None:
                    stats = _stats(core, core.last_step, time.monotonic() - began, collectives)
                    channel.send(StepResult(updates=updates, stats=stats))
                messages = channel.receive(wait_ms=0)
            else:
                messages = channel.receive(_IDLE_MS)
                if not messages:
                    core.check_alive()
    finally:
        core.shutdown()


def _obey(message: Any, core: EngineCore, record: ExpertRecord, channel: _Channel) -> None:
    match message:
        case Submit(request=request):
            core.add(request)
        case Cancel(request_ids=request_ids):
            for request_id in request_ids:
                core.remove(request_id)
        case GetState():
            channel.send(
                EngineState(
                    groups=core.scheduler.state(),
                    waiting=core.scheduler.num_waiting,
                    retracted=core.scheduler.num_retracted,
                )
            )
        case FlushCache():
            channel.send(CacheFlushed(done=core.scheduler.flush_cache()))
        case StartExpertRecord():
            record.start()
            channel.send(ExpertLoad(record.load()))
        case StopExpertRecord():
            record.stop()
            channel.send(ExpertLoad(record.load()))
        case GetExpertLoad():
            channel.send(ExpertLoad(record.load()))
        case _:
            raise AssertionError(f"the front end sent {message}")


def _stats(
    core: EngineCore, step: Step, seconds: float, collectives: "_CollectiveRows"
) -> StepStats:
    groups = core.scheduler.state()
    return StepStats(
        step_seconds=seconds,
        rows=list(step.shape.rows),
        running=[group.running for group in groups],
        waiting=core.scheduler.num_waiting,
        retracted=core.scheduler.num_retracted,
        used_pages=[group.used_pages for group in groups],
        cached_pages=[group.cached_pages for group in groups],
        total_pages=[group.total_pages for group in groups],
        collective_rows=collectives.of(step),
    )


class _CollectiveRows:
    """Counts the rows that go through each kind of collective of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._counts = [_count(regime) for regime in plan.regimes]

    def of(self, step: Step) -> dict[str, int]:
        """Rows by operation and axes, such as {"all_reduce 0,1": 96}."""
        body, tail = self._counts[step.shape.regime]
        shape = step.shape
        rows, logits = sum(shape.padded or shape.rows), sum(map(len, shape.logits_rows))
        return {key: body[key] * rows + tail[key] * logits for key in body | tail}


def _count(plan: RegimePlan) -> tuple[Counter[str], Counter[str]]:
    """Collectives on all rows, and on those that get logits."""
    body: Counter[str] = Counter()
    tail: Counter[str] = Counter()
    for read in plan.reads:
        settles = (*((read.carry,) if read.carry else ()), *read.settles)
        moves = [move for part in (*settles, *read.deliveries) for move in part.route.moves]
        _add(tail if read.selects_rows else body, moves)
    for _, inner in plan.inner:
        _add(tail, inner)
    return body, tail


def _add(counts: Counter[str], moves: Iterable[Move]) -> None:
    for move in moves:
        if move.op is not Op.SLICE:
            counts[f"{move.op} {','.join(map(str, move.axes))}"] += 1


def _progress(channel: _Channel) -> Any:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > _PROGRESS_SECONDS:
            last = now
            channel.send(LoadProgress(done=done, total=total))

    return progress
