"""Times collectives: processes, one a rank, that run them against one another."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from isomoe.comm.base import Communicator
from isomoe.comm.rendezvous import Rendezvous, has_own_gpu, join, leave, local_device
from isomoe.comm.torch_comm import torch_communicator
from isomoe.errors import IsomoeError
from isomoe.layout import Axes, Mesh, Op, Parallelism, Seat, ring_share
from isomoe.layout.parallelism import divisors

OPS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.EXCHANGE)
_CALLS = 20
"""Of one batch."""
_BATCHES = 5
_SILENT = "a rank of the measurement ended without a word"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One collective at one size, on groups of neighbouring ranks that all run at once.

    Attributes:
        equal: whether all members have as many rows; else the first has most and the last none.
        replayed: from a CUDA graph; else launched by the host, one after another.
        rows: of the whole group.
        sent_bytes: by one rank, as in a ring.
        us: of one call on the slowest rank, the median.
    """

    op: Op
    members: int
    equal: bool
    replayed: bool
    rows: int
    sent_bytes: float
    us: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Reading":
        """From `to_json`."""
        return cls(**{**found, "op": Op(found["op"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class CommSettings:
    """What is measured.

    Attributes:
        ranks: W; groups of every size that W can be cut into are measured.
        device: "cuda" or "cpu".
        row_values: of a row (the hidden size).
        rows: of a group's step.
    """

    ranks: int
    device: str
    row_values: int
    rows: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of what travels: as in the engine, half as wide on a GPU."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def measure(settings: CommSettings) -> Iterator[Reading]:
    """Starts the ranks, and gives each reading when it is there.

    Raises:
        IsomoeError: if a rank fails.
    """
    context = multiprocessing.get_context("spawn")
    rendezvous = Rendezvous()
    ours, theirs = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_main, args=(rank, rendezvous.port, settings, theirs), daemon=True)
        for rank in range(settings.ranks)
    ]
    try:
        for process in ranks:
            process.start()
        theirs.close()
        while True:
            while not ours.poll(1.0):
                if any(process.exitcode for process in ranks):
                    raise IsomoeError(_SILENT)
            try:
                found = ours.recv()
            except EOFError:
                raise IsomoeError(_SILENT) from None
            if found is None:
                return
            if isinstance(found, str):
                raise IsomoeError(f"a rank of the measurement failed: {found}")
            yield found
    finally:
        ours.close()
        for process in ranks:
            if process.pid is not None:
                process.kill()  # a rank may wait for one that is gone
                process.join()


def _main(rank: int, port: int, settings: CommSettings, pipe: Any) -> None:
    """One rank. The first tells the readings; any tells why it fails."""
    try:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        device = local_device(settings.device, rank)
        join(port, rank, settings.ranks, device)
        for reading in _readings(rank, settings, device):
            if rank == 0:
                pipe.send(reading)
        if rank == 0:
            pipe.send(None)
        leave()
    except Exception as error:
        with suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")


@torch.inference_mode()
def _readings(rank: int, settings: CommSettings, device: torch.device) -> Iterator[Reading]:
    own = has_own_gpu(device, settings.ranks)
    for members in divisors(settings.ranks)[1:]:
        apart = settings.ranks // members
        axes = (apart, members) if apart > 1 else (members,)
        mesh = Mesh(axes=axes, parallelism=Parallelism(tp_size=settings.ranks))
        run = (len(axes) - 1,)
        comm = torch_communicator(Seat(mesh, rank), [run], device)
        for op in OPS:
            for rows in settings.rows:
                for counts, equal in _splits(op, rows, members):
                    call = _prepare(comm, op, run, counts, settings, device)
                    for replayed in (False, True) if own and equal else (False,):
                        us = _slowest(_time(call, device, replayed), device)
                        yield Reading(
                            op=op,
                            members=members,
                            equal=equal,
                            replayed=replayed,
                            rows=rows,
                            sent_bytes=_sent(op, rows, members, settings),
                            us=us,
                        )


def _splits(op: Op, rows: int, members: int) -> Iterator[tuple[list[int], bool]]:
    """Rows of each member, and whether they are equal."""
    if op is Op.ALL_REDUCE or rows % members == 0:
        yield [rows // members] * members if op is not Op.ALL_REDUCE else [rows], True
    if op is not Op.ALL_REDUCE:
        shares = range(members - 1, -1, -1)  # of 4 members: 3, 2, 1 and 0 of 6
        counts = [rows * share // sum(shares) for share in shares]
        counts[0] += rows - sum(counts)
        yield counts, False


def _prepare(
    comm: Communicator,
    op: Op,
    run: Axes,
    counts: Sequence[int],
    settings: CommSettings,
    device: torch.device,
) -> Callable[[], Tensor]:
    """One call of a collective on this rank's rows."""
    mine = comm.seat.index(run)
    rows = counts[mine] if op in (Op.ALL_GATHER, Op.EXCHANGE) else sum(counts)
    x = torch.randn(rows, settings.row_values, device=device).to(settings.dtype)
    match op:
        case Op.ALL_REDUCE:
            return lambda: comm.all_reduce(x, run)
        case Op.REDUCE_SCATTER:
            return lambda: comm.reduce_scatter(x, run, counts)
        case Op.ALL_GATHER:
            return lambda: comm.all_gather(x, run, counts)
        case _:
            sends = [_even(count, len(counts)) for count in counts]
            receive = [send[mine] for send in sends]
            return lambda: comm.all_to_all(x, run, sends[mine], receive)


def _even(rows: int, members: int) -> list[int]:
    return [(rows + members - 1 - member) // members for member in range(members)]


def _sent(op: Op, rows: int, members: int, settings: CommSettings) -> float:
    held = rows * settings.row_values * settings.dtype.itemsize
    return held * ring_share(op, members) / (members if op is Op.EXCHANGE else 1)


def _time(call: Callable[[], Tensor], device: torch.device, replayed: bool) -> float:
    """Microseconds of one call among many, the median of some batches."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return 1e6 * median(_clocked(call) for _ in range(_BATCHES))
    run: Callable[[], object] = lambda: [call() for _ in range(_CALLS)]  # noqa: E731
    if replayed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
        run()
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    found: list[float] = []
    for _ in range(_BATCHES):
        torch.cuda.synchronize()
        dist.barrier()
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / _CALLS)
    return median(found)


def _clocked(call: Callable[[], Tensor]) -> float:
    dist.barrier()
    began = perf_counter()
    for _ in range(_CALLS):
        call()
    return (perf_counter() - began) / _CALLS


def _slowest(us: float, device: torch.device) -> float:
    """The largest of all ranks' readings."""
    found = torch.tensor([us], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
