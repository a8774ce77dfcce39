"""Sums fused with addition and norm on several GPUs: whether they are right.

    python3 benchmarks/multigpu/fused.py [W] [--hidden H ...]

Sums must be those of the rank order to the last bit, on all ranks; normed rows may differ in the
last place. Exits 1 if a check fails, a rank ends early or nothing moves any more. What they take
`isomoe bench comm` measures.
"""

import argparse
import faulthandler
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from isomoe.comm.rendezvous import Rendezvous, join, leave, local_device
from isomoe.comm.symmetric import SymmetricSums
from isomoe.kernels.norm import rms_norm

EPS = 1e-6
MAX_BYTES = 14 << 20
"""Of a rank's addends."""
LONGEST = 120
"""Seconds that a stage may take, compiling included."""
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
    parser.add_argument("--calls", type=int, default=400, help="of the check without graphs")
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
    group = dist.group.WORLD
    assert group is not None
    sums = SymmetricSums.open(group, device, MAX_BYTES)
    if sums is None:
        say(rank, "no symmetric memory between these GPUs")
        sys.exit(1)
    checks = [
        agreed(rank, name, found, device) for name, found in run_checks(sums, rank, args, device)
    ]
    if not all(checks):
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
    most = MAX_BYTES // (hidden * wire.itemsize)
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


if __name__ == "__main__":
    main()
