"""Sums fused with addition and norm on several GPUs: whether they are right, and how fast.

    python3 benchmarks/multigpu/fused.py [W] [--hidden H ...] [--rows R ...] [--json FILE]

Checks come first. Sums must be those of the rank order to the last bit, on all ranks; normed rows
may differ in the last place. Exits 1 if a check fails, a rank ends early or nothing moves any more.
"""

import argparse
import faulthandler
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from isomoe.comm import Communicator, torch_communicator
from isomoe.comm.rendezvous import Rendezvous, join, leave, local_device
from isomoe.comm.symmetric import SymmetricSums
from isomoe.kernels.gpu.norm import add_rms_norm
from isomoe.kernels.norm import rms_norm
from isomoe.layout import Mesh, Parallelism, Seat

EPS = 1e-6
AXES = (0,)
LONGEST = 120
"""Seconds that a stage may take, compiling included."""
CALLS = 20
"""Of one graph that is timed."""
REPLAYS = 50
CLOSE = {torch.bfloat16: 2.0**-6, torch.float32: 1e-5}
"""Relative distance of normed values; of bf16 two places, since it is rounded twice."""


@dataclass(frozen=True)
class Call:
    """One sum, the same on all ranks.

    Attributes:
        counts: rows of each rank; None: each gets all `rows`.
    """

    rows: int
    hidden: int
    counts: tuple[int, ...] | None
    wire: torch.dtype
    seed: int

    def kept(self, rank: int) -> slice:
        """The rows that a rank gets."""
        if self.counts is None:
            return slice(None)
        return slice(sum(self.counts[:rank]), sum(self.counts[: rank + 1]))

    def addend(self, rank: int, device: torch.device) -> Tensor:
        """Of one rank: any rank can make it."""
        seeded = torch.Generator(device).manual_seed(1000 * self.seed + rank + 1)
        x = torch.randn(self.rows, self.hidden, generator=seeded, device=device)
        return x.to(self.wire)

    def residual(self, rank: int, device: torch.device) -> Tensor:
        """The rows of it that a rank has."""
        seeded = torch.Generator(device).manual_seed(1000 * self.seed)
        x = torch.randn(self.rows, self.hidden, generator=seeded, device=device)
        return x.to(self.wire)[self.kept(rank)].contiguous()

    def run(
        self, sums: SymmetricSums, x: Tensor, residual: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.counts is None:
            return sums.sum_add_norm(x, residual, weight, EPS)
        return sums.scatter_add_norm(x, self.counts, residual, weight, EPS)

    def is_right(
        self, got: tuple[Tensor, Tensor], rank: int, world: int, weight: Tensor
    ) -> str | None:
        """What is wrong with a rank's result, if anything is."""
        device = weight.device
        total = self.addend(0, device)[self.kept(rank)].float()
        for other in range(1, world):
            total += self.addend(other, device)[self.kept(rank)].float()
        total = (total + self.residual(rank, device).float()).to(self.wire)
        if got[0].shape != total.shape or not torch.equal(got[0], total):
            wrong = (got[0] != total).any(1).nonzero().flatten().tolist()
            return f"rank {rank}: {self}: the sum of rows {wrong[:8]}, {len(wrong)} in all"
        normed = rms_norm(total, weight, EPS)
        if not torch.allclose(got[1].float(), normed.float(), rtol=CLOSE[self.wire], atol=1e-6):
            return f"rank {rank}: {self}: the norm"
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ranks", type=int, nargs="?", default=torch.cuda.device_count())
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 7168])
    rows = [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument(
        "--by-host", action="store_true", help="time launches by the host instead of a graph"
    )
    parser.add_argument("--calls", type=int, default=400, help="of the check without graphs")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--no-times", action="store_true", help="checks alone")
    args = parser.parse_args()
    if not 2 <= args.ranks <= torch.cuda.device_count():
        parser.error(f"{args.ranks} ranks on {torch.cuda.device_count()} GPUs: 2 or more needed")
    for name, off in (
        ("NCCL_NVLS_ENABLE", "0"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
        ("NVSHMEM_DISABLE_NVLS", "1"),
    ):
        os.environ[name] = off
    context = multiprocessing.get_context("spawn")
    rendezvous = Rendezvous()
    ranks = [
        context.Process(target=run_rank, args=(rank, rendezvous.port, args), daemon=True)
        for rank in range(args.ranks)
    ]
    for process in ranks:
        process.start()
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks):
            time.sleep(2)  # the others may have something to say
            break
        time.sleep(0.2)
    failed = [process.exitcode for process in ranks if process.exitcode != 0]
    for process in ranks:
        process.kill()
        process.join()
    sys.exit(1 if failed else 0)


@torch.inference_mode()
def run_rank(rank: int, port: int, args: argparse.Namespace) -> None:
    """One rank; exits 1 if a check fails, on all ranks alike."""
    watch()
    torch.set_num_threads(1)
    device = local_device("cuda", rank)
    join(port, rank, args.ranks, device)
    mesh = Mesh(axes=(args.ranks,), parallelism=Parallelism(tp_size=args.ranks))
    comm = torch_communicator(Seat(mesh, rank), [AXES], device)
    group = dist.group.WORLD
    assert group is not None
    sums = SymmetricSums.open(group, device, max(args.rows) * max(args.hidden) * 2)
    if sums is None:
        say(rank, "no symmetric memory between these GPUs")
        sys.exit(1)
    checks = {
        name: agreed(rank, name, found, device)
        for name, found in run_checks(sums, rank, args, device)
    }
    times = []
    if all(checks.values()) and not args.no_times:
        for row in run_times(sums, comm, rank, args, device):
            times.append(row)
    if rank == 0 and args.json:
        about = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
        found = {**about, "ranks": args.ranks, "by_host": args.by_host}
        found |= {"checks": checks, "times": times}
        args.json.write_text(json.dumps(found, indent=1))
    if not all(checks.values()):
        sys.exit(1)
    faulthandler.cancel_dump_traceback_later()
    leave()


def watch() -> None:
    """Ends this process if the stage that begins takes too long."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)


def say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)


def agreed(rank: int, name: str, found: list[str], device: torch.device) -> bool:
    """Whether no rank found anything wrong; tells."""
    for line in found[:3]:
        print(line, flush=True)
    passed = torch.tensor([not found], dtype=torch.int32, device=device)
    dist.all_reduce(passed, op=dist.ReduceOp.MIN)
    right = bool(passed.item())
    say(rank, f"{'ok    ' if right else 'FAILED'} {name}")
    return right


def run_checks(
    sums: SymmetricSums, rank: int, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, list[str]]]:
    for hidden in args.hidden:
        for form in ("all", "equal", "ragged", "holes"):
            watch()
            yield f"{form}, hidden {hidden}", check_calls(sums, rank, args, device, hidden, form)
    watch()
    mixed = check_calls(sums, rank, args, device, None, None)
    yield "mixed forms, sizes and dtypes", mixed
    for hidden in args.hidden:
        for form in ("all", "equal", "ragged"):
            watch()
            found = check_graphs(sums, rank, args, device, hidden, form)
            yield f"graphs of 1 and of 3 calls, {form}, hidden {hidden}", found


def make_call(
    args: argparse.Namespace, chance: random.Random, hidden: int | None, form: str | None, seed: int
) -> Call:
    """Any; `chance` is the same on all ranks."""
    wire = torch.bfloat16 if form else chance.choice([torch.bfloat16, torch.float32])
    form = form or chance.choice(["all", "equal", "ragged", "holes"])
    hidden = hidden or chance.choice(args.hidden)
    most = max(args.rows) * max(args.hidden) * 2 // (hidden * wire.itemsize)
    rows = min(most, chance.choice([1, 2, 3, chance.randint(1, 40), chance.randint(1, 600)]))
    world = args.ranks
    counts = None
    if form == "equal":
        counts = [max(1, rows // world)] * world
    elif form in ("ragged", "holes"):
        cuts = sorted(chance.randint(0, rows) for _ in range(world - 1))
        counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, rows], strict=True)]
        if form == "holes":
            counts[chance.randrange(world)] = 0
    if counts is not None:
        rows = sum(counts)
    return Call(rows, hidden, tuple(counts) if counts else None, wire, seed)


def check_calls(
    sums: SymmetricSums,
    rank: int,
    args: argparse.Namespace,
    device: torch.device,
    hidden: int | None,
    form: str | None,
) -> list[str]:
    """Calls one after another without the host waiting, ranks late by chance; then all results."""
    chance, delays = random.Random(f"{hidden} {form}"), random.Random(rank)
    wrong: list[str] = []
    batch = 20
    for first in range(0, args.calls, batch):
        calls = [make_call(args, chance, hidden, form, first + i) for i in range(batch)]
        given = [(call.addend(rank, device), call.residual(rank, device)) for call in calls]
        got = []
        for call, (x, residual) in zip(calls, given, strict=True):
            delay(delays)
            got.append(call.run(sums, x, residual, weight_of(call.hidden, device, call.wire)))
        for call, result in zip(calls, got, strict=True):
            weight = weight_of(call.hidden, device, call.wire)
            wrong += filter(None, [call.is_right(result, rank, args.ranks, weight)])
    return wrong


def check_graphs(
    sums: SymmetricSums,
    rank: int,
    args: argparse.Namespace,
    device: torch.device,
    hidden: int,
    form: str,
) -> list[str]:
    """Replays of two graphs by turns and calls between them, with inputs that change."""
    chance, delays = random.Random(form), random.Random(rank)
    weight = weight_of(hidden, device, torch.bfloat16)
    wrong: list[str] = []
    graphs = []
    for size in (1, 3):
        calls = [make_call(args, chance, hidden, form, 0) for _ in range(size)]
        held = [(call.addend(rank, device), call.residual(rank, device)) for call in calls]
        outs: list[tuple[Tensor, Tensor]] = []

        def run(
            calls: Sequence[Call] = calls,
            held: Sequence[tuple[Tensor, Tensor]] = held,
            outs: list[tuple[Tensor, Tensor]] = outs,
        ) -> None:
            outs[:] = [
                call.run(sums, *given, weight) for call, given in zip(calls, held, strict=True)
            ]

        run()  # compiles what is to be captured
        graphs.append((calls, held, outs, captured(run)))
    for turn in range(2 * REPLAYS):
        calls, held, outs, replay = graphs[chance.randrange(2)]
        fresh = [
            Call(call.rows, hidden, call.counts, call.wire, 10 * turn + i)
            for i, call in enumerate(calls)
        ]
        for call, (x, residual) in zip(fresh, held, strict=True):
            x.copy_(call.addend(rank, device))
            residual.copy_(call.residual(rank, device))
        delay(delays)
        replay()
        got = [(total.clone(), normed.clone()) for total, normed in outs]
        if chance.random() < 0.3:
            lone = make_call(args, chance, hidden, form, 7)
            x, residual = lone.addend(rank, device), lone.residual(rank, device)
            delay(delays)
            fresh.append(lone)
            got.append(lone.run(sums, x, residual, weight))
        for call, result in zip(fresh, got, strict=True):
            wrong += filter(None, [call.is_right(result, rank, args.ranks, weight)])
    return wrong


def weight_of(hidden: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    seeded = torch.Generator(device).manual_seed(hidden)
    return torch.randn(hidden, generator=seeded, device=device).to(dtype)


def delay(chance: random.Random) -> None:
    """Now and then the GPU or the host of this rank is late."""
    if chance.random() < 0.3:
        torch.cuda._sleep(chance.randrange(400_000))
    if chance.random() < 0.05:
        time.sleep(chance.random() / 500)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """What replays `run`."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def run_times(
    sums: SymmetricSums,
    comm: Communicator,
    rank: int,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Microseconds of one call in a graph, or launched by the host."""
    how = "launched by the host" if args.by_host else "in a graph"
    name = torch.cuda.get_device_name(device)
    say(rank, f"\n{name}, {args.ranks} ranks, us of a call {how}")
    timed = partial(microseconds, device=device, by_host=args.by_host)
    head = f"{'hidden':>6} {'rows':>5} | {'all fused':>9} {'NCCL+norm':>9}"
    say(rank, head + f" | {'part fused':>10} {'NCCL+norm':>9} | {'norm':>6} {'norm part':>9}")
    for hidden in args.hidden:
        for rows in args.rows:
            watch()
            found = time_size(sums, comm, timed, args.ranks, rows, hidden, device)
            us = {name: f"{value:.1f}" for name, value in found.items()}
            say(
                rank,
                f"{hidden:>6} {rows:>5} | {us['all_fused']:>9} {us['all_plain']:>9}"
                f" | {us.get('part_fused', '-'):>10} {us.get('part_plain', '-'):>9}"
                f" | {us['norm']:>6} {us.get('norm_part', '-'):>9}",
            )
            yield {"hidden": hidden, "rows": rows, **found}


def time_size(
    sums: SymmetricSums,
    comm: Communicator,
    timed: Callable[[Callable[[], object]], float],
    ranks: int,
    rows: int,
    hidden: int,
    device: torch.device,
) -> dict[str, float]:
    """Both forms, fused and as the engine runs them without that; the norm alone."""
    weight = weight_of(hidden, device, torch.bfloat16)
    x, residual = (torch.randn(rows, hidden, device=device).to(torch.bfloat16) for _ in range(2))

    def all_plain() -> None:
        add_rms_norm(residual, comm.all_reduce(x, AXES), weight, EPS)

    found = {
        "all_fused": timed(lambda: sums.sum_add_norm(x, residual, weight, EPS)),
        "all_plain": timed(all_plain),
        "norm": timed(lambda: add_rms_norm(residual, x, weight, EPS)),
    }
    if rows % ranks:
        return found
    counts = [rows // ranks] * ranks
    part, addend = (one[: counts[0]].clone() for one in (residual, x))

    def part_plain() -> None:
        add_rms_norm(part, comm.reduce_scatter(x, AXES, counts), weight, EPS)

    fused = timed(lambda: sums.scatter_add_norm(x, counts, part, weight, EPS))
    return found | {
        "part_fused": fused,
        "part_plain": timed(part_plain),
        "norm_part": timed(lambda: add_rms_norm(part, addend, weight, EPS)),
    }


def microseconds(call: Callable[[], object], device: torch.device, by_host: bool) -> float:
    """Of the slowest rank, the median of some batches."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    several()
    replay = several if by_host else captured(several)
    replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        dist.barrier()
        replay()  # ranks that were let go apart are together afterwards
        begin.record()
        for _ in range(3):
            replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / (3 * CALLS))
    slowest = torch.tensor([median(found)], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


if __name__ == "__main__":
    main()
