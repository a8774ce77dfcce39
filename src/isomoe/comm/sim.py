"""SimWorld: W simulated ranks in one process.

Each rank runs as a greenlet up to its next collective and waits there for its group. What the
members call is compared before anything is computed: another order, group or size on one rank is
an error at the call, and a rank that never comes is named instead of waited for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from isomoe.comm.base import AddNorm, Communicator, split_rows
from isomoe.errors import CollectiveError
from isomoe.layout.mesh import Axes, Mesh, Seat

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Call:
    """What must be the same for all members of a group, and what each brings."""

    op: str
    axes: Axes
    agreed: tuple[Any, ...]
    x: Tensor
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} over axes {self.axes} of {list(self.x.shape)} {self.agreed}"


class SimWorld:
    """The ranks of a mesh, simulated in lockstep of their collectives.

    Args:
        fuses: whether a sum can be made in one operation with addition and norm; else it is
            declined.

    Attributes:
        calls: collectives run so far, one for each group.
    """

    def __init__(self, mesh: Mesh, fuses: bool = True) -> None:
        self.mesh = mesh
        self.fuses = fuses
        self.calls = 0
        self._waiting: dict[tuple[int, ...], dict[int, _Call]] = {}
        self._ready: list[tuple[int, Tensor | None]] = []

    def run(self, rank_main: "Callable[[SimComm], T]") -> list[T]:
        """Runs `rank_main` once for each rank and returns their results in rank order.

        Raises:
            CollectiveError: if ranks of a group call different collectives, or one never calls.
            Exception: whatever a rank raises, first rank first.
        """
        hub = getcurrent()
        results: dict[int, T] = {}

        def body(rank: int) -> None:
            results[rank] = rank_main(SimComm(self, Seat(self.mesh, rank), hub))

        ranks = [greenlet(lambda _, rank=rank: body(rank), hub) for rank in range(self.mesh.size)]
        self._waiting.clear()
        self._ready = [(rank, None) for rank in reversed(range(self.mesh.size))]
        try:
            while self._ready:
                rank, value = self._ready.pop()
                ranks[rank].switch(value)
            if len(results) < self.mesh.size:
                raise CollectiveError(self._stuck(results))
        finally:
            for one in ranks:
                if not one.dead:
                    one.throw(GreenletExit)
        return [results[rank] for rank in range(self.mesh.size)]

    def post(self, rank: int, call: _Call) -> None:
        """Records a rank's call; the last of a group to come computes for all."""
        group = self.mesh.group(rank, call.axes)
        calls = self._waiting.setdefault(group, {})
        for other, theirs in islice(calls.items(), 1):  # those that came later agree with it
            if (theirs.op, theirs.agreed) != (call.op, call.agreed):
                raise CollectiveError(
                    f"ranks {other} and {rank} of group {group} differ: {theirs}, but {call}"
                )
        calls[rank] = call
        if len(calls) == len(group):
            del self._waiting[group]
            self.calls += 1
            outputs = _compute([calls[member] for member in group])
            self._ready.extend(zip(reversed(group), reversed(outputs), strict=True))

    def _stuck(self, results: dict[int, T]) -> str:
        waits = [
            f"rank {rank} waits in {call}"
            for calls in self._waiting.values()
            for rank, call in calls.items()
        ]
        ended = [str(rank) for rank in sorted(results)]
        return f"{'; '.join(waits[:4])}; ended: ranks {', '.join(ended) or 'none'}"


class SimComm(Communicator):
    """A simulated rank's end of the collectives.

    Attributes:
        fuses: as in its world, until it is set; alike on all ranks.
    """

    def __init__(self, world: SimWorld, seat: Seat, hub: greenlet) -> None:
        super().__init__(seat)
        self.fuses = world.fuses
        self._world = world
        self._hub = hub

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        return self._call(_Call("all_reduce", axes, (tuple(x.shape), x.dtype), x))

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        self._expect(x, counts[self.seat.index(axes)], "all_gather", axes)
        return self._call(_Call("all_gather", axes, (tuple(counts), *_kind(x)), x))

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        self._expect(x, sum(counts), "reduce_scatter", axes)
        return self._call(_Call("reduce_scatter", axes, (tuple(counts), *_kind(x)), x))

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        self._expect(x, sum(send), "all_to_all", axes)
        return self._call(_Call("all_to_all", axes, _kind(x), x, tuple(send), tuple(receive)))

    def sum_add_norm(
        self,
        x: Tensor,
        axes: Axes,
        counts: Sequence[int] | None,
        residual: Tensor,
        norm: AddNorm,
    ) -> tuple[Tensor, Tensor] | None:
        if not self.fuses:
            return None
        total = self.all_reduce(x, axes) if counts is None else self.reduce_scatter(x, axes, counts)
        return norm.after_adding(residual, total)

    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        return self._call(_Call("broadcast", axes, (tuple(x.shape), x.dtype), x))

    def _call(self, call: _Call) -> Tensor:
        self._world.post(self.seat.rank, call)
        result: Tensor = self._hub.switch()
        return result

    def _expect(self, x: Tensor, rows: int, op: str, axes: Axes) -> None:
        if x.shape[0] != rows:
            raise CollectiveError(
                f"rank {self.seat.rank}: {op} over axes {axes} of {x.shape[0]} rows, "
                f"but the row map says {rows}"
            )


def _kind(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape[1:]), x.dtype)


def _compute(calls: list[_Call]) -> list[Tensor]:
    """The members' results. Those that hold the same values share one tensor."""
    first = calls[0]
    members = len(calls)
    match first.op:
        case "all_reduce":
            return [_total(calls)] * members
        case "all_gather":
            return [torch.cat([call.x for call in calls])] * members
        case "reduce_scatter":
            return split_rows(_total(calls), first.agreed[0])
        case "all_to_all":
            for i, call in enumerate(calls):
                for j, other in enumerate(calls):
                    if call.send[j] != other.receive[i]:
                        raise CollectiveError(
                            f"all_to_all over axes {first.axes}: member {i} sends {call.send[j]} "
                            f"rows to member {j}, which expects {other.receive[i]}"
                        )
            parts = [split_rows(call.x, call.send) for call in calls]
            return [torch.cat([part[j] for part in parts]) for j in range(members)]
        case "broadcast":
            return [first.x.clone()] * members
    raise AssertionError(first.op)


def _total(calls: list[_Call]) -> Tensor:
    total = calls[0].x
    for call in calls[1:]:
        total = total + call.x
    return total
