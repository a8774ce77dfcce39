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
from torch import multiprocessing

from isomoe.comm.base import AddNorm, Communicator
from isomoe.comm.rendezvous import Rendezvous, has_own_gpu, join, leave, local_device
from isomoe.comm.symmetric import MAX_HIDDEN, takes_rows
from isomoe.comm.torch_comm import torch_communicator
from isomoe.errors import IsomoeError
from isomoe.layout import Axes, Mesh, Op, Parallelism, Seat, read_share, ring_share
from isomoe.layout.parallelism import divisors

SUMS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER)
OPS = (*SUMS, Op.ALL_GATHER, Op.EXCHANGE)
FUSED_BYTES = 8 << 20
"""Of a rank's addends in a fused sum, at most. A choice: every group of ranks takes twice as much
memory, and of larger sums fusing saves a small part."""
_CALLS = 20
"""Of one run, or of one graph."""
_RUNS = 3
"""Of one batch, on a GPU."""
_BATCHES = 5
_SILENT = "a rank of the measurement ended without a word"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One collective at one size, on groups of neighbouring ranks that all run at once.

    Attributes:
        equal: whether all members have as many rows; else the first has most and the last none.
        replayed: from a CUDA graph; else launched by the host, one after another.
        rows: of the whole group.
        sent_bytes: by one rank, as in a ring; of a fused sum those that it reads.
        us: of one call on the slowest rank, the median.
        fused: whether it is a sum in one operation with addition and norm.
        norm_us: of these by themselves, which `us` holds if they are fused; else 0.
    """

    op: Op
    members: int
    equal: bool
    replayed: bool
    rows: int
    sent_bytes: float
    us: float
    fused: bool = False
    norm_us: float = 0.0

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


NormMaker = Callable[[int, torch.dtype, torch.device], AddNorm]
"""Makes the norm behind fused sums in each rank, from the values of a row."""


def measure(settings: CommSettings, make_norm: NormMaker) -> Iterator[Reading]:
    """Starts the ranks, and gives each reading when it is there.

    Args:
        make_norm: a function of a module, since it goes to other processes.

    Raises:
        IsomoeError: if a rank fails.
    """
    context = multiprocessing.get_context("spawn")
    rendezvous = Rendezvous()
    ours, theirs = context.Pipe(duplex=False)
    ranks = [
        context.Process(
            target=_main, args=(rank, rendezvous.port, settings, make_norm, theirs), daemon=True
        )
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


def unfused(settings: CommSettings, readings: Sequence[Reading]) -> str | None:
    """Why no fused sums can be fitted; None if they can: groups of every size have two sizes."""
    ranks = settings.ranks
    fused = [one for one in readings if one.fused]
    fitting = {one.rows for one in fused if one.members == ranks and one.rows % ranks == 0}
    if len(fitting) > 1 and {one.members for one in fused} == {one.members for one in readings}:
        return None
    if settings.device != "cuda":
        return "they are made between GPUs"
    if not any(one.replayed for one in readings):
        return "ranks that share a GPU sum through the host"
    if not takes_rows(settings.row_values, settings.dtype):
        return (
            f"rows of {settings.row_values} values are not taken; multiples of 8 up to "
            f"{MAX_HIDDEN} are"
        )
    most = FUSED_BYTES // (settings.row_values * settings.dtype.itemsize)
    if sum(rows % ranks == 0 and rows <= most for rows in settings.rows) < 2:
        return f"fewer than two of --rows are multiples of {ranks} and at most {most}"
    return "not all GPUs have symmetric memory between them, which takes NVLink and Triton"


def _main(rank: int, port: int, settings: CommSettings, make_norm: NormMaker, pipe: Any) -> None:
    """One rank. The first tells the readings; any tells why it fails."""
    try:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        device = local_device(settings.device, rank)
        join(port, rank, settings.ranks, device)
        norm = make_norm(settings.row_values, settings.dtype, device)
        for reading in _readings(rank, settings, norm, device):
            if rank == 0:
                pipe.send(reading)
        if rank == 0:
            pipe.send(None)
        leave()
    except Exception as error:
        with suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")


@torch.inference_mode()
def _readings(
    rank: int, settings: CommSettings, norm: AddNorm, device: torch.device
) -> Iterator[Reading]:
    own = has_own_gpu(device, settings.ranks)
    opened = []  # all of them stay open: others may still have this rank's memory mapped
    for members in divisors(settings.ranks)[1:]:
        apart = settings.ranks // members
        axes = (apart, members) if apart > 1 else (members,)
        mesh = Mesh(axes=axes, parallelism=Parallelism(tp_size=settings.ranks))
        run = (len(axes) - 1,)
        comm = torch_communicator(Seat(mesh, rank), [run], device, [run], FUSED_BYTES)
        opened.append(comm)
        for op, fused in (*((op, False) for op in OPS), *((op, True) for op in SUMS)):
            for rows in settings.rows:
                for counts, equal in _splits(op, rows, members):
                    alone = None
                    if fused:
                        call, alone = _prepare_fused(comm, op, run, counts, settings, norm, device)
                        if call() is None:  # on all ranks alike
                            continue
                    else:
                        call = _prepare(comm, op, run, counts, settings, device)
                    for replayed in (False, True) if own and equal else (False,):
                        yield Reading(
                            op=op,
                            members=members,
                            equal=equal,
                            replayed=replayed,
                            rows=rows,
                            sent_bytes=_sent(op, rows, members, settings, fused),
                            us=_slowest(call, device, replayed),
                            fused=fused,
                            norm_us=_slowest(alone, device, replayed) if alone else 0.0,
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
) -> Callable[[], object]:
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


def _prepare_fused(
    comm: Communicator,
    op: Op,
    run: Axes,
    counts: Sequence[int],
    settings: CommSettings,
    norm: AddNorm,
    device: torch.device,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """One call of a fused sum, which gives None if it is declined; and of addition and norm alone,
    of the rows that this rank gets."""
    scattered = list(counts) if op is Op.REDUCE_SCATTER else None
    gets = scattered[comm.seat.index(run)] if scattered else sum(counts)
    x, residual, addend = (
        torch.randn(rows, settings.row_values, device=device).to(settings.dtype)
        for rows in (sum(counts), gets, gets)
    )
    return (
        lambda: comm.sum_add_norm(x, run, scattered, residual, norm),
        lambda: norm.after_adding(residual, addend),
    )


def _even(rows: int, members: int) -> list[int]:
    return [(rows + members - 1 - member) // members for member in range(members)]


def _sent(op: Op, rows: int, members: int, settings: CommSettings, fused: bool) -> float:
    held = rows * settings.row_values * settings.dtype.itemsize
    if fused:
        return held * read_share(op, members)
    return held * ring_share(op, members) / (members if op is Op.EXCHANGE else 1)


def _time(call: Callable[[], object], device: torch.device, replayed: bool) -> float:
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
        run()  # ranks that were let go apart are together afterwards
        begin.record()
        for _ in range(_RUNS):
            run()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / (_RUNS * _CALLS))
    return median(found)


def _clocked(call: Callable[[], object]) -> float:
    dist.barrier()
    began = perf_counter()
    for _ in range(_CALLS):
        call()
    return (perf_counter() - began) / _CALLS


def _slowest(call: Callable[[], object], device: torch.device, replayed: bool) -> float:
    """As `_time`, on the slowest rank."""
    found = torch.tensor([_time(call, device, replayed)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
