"""The residual stream: a contribution is written with what it owes, and settled when it is read.

This is the only place where an activation is reduced or moved between blocks. Blocks say which
placement they take and give; the plan of the step's regime says which moves lie between.
"""

from typing import Protocol

import torch
from torch import Tensor

from isomoe.comm import Communicator
from isomoe.errors import PlacementError
from isomoe.layout import (
    LogitsRows,
    Move,
    Op,
    Placement,
    ReadPlan,
    RegimePlan,
    Rows,
    Settle,
    TokenRows,
)


class Norm(Protocol):
    """What `read` applies to the settled rows."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """x: [rows, hidden] -> the same shape."""

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """residual + addend in residual's dtype, and the norm of that; may reuse the residual."""


class ResidualStream:
    """One rank's residual stream for one step.

    Args:
        plan: the plan of the step's regime.
        comm: this rank's collectives.
        rows: the step's rows.
        dtype: of the residual and of what travels to it (the wire dtype).

    Attributes:
        plan, comm: as given.
        tokens: the step's rows, as given.
        rows: those that are left: the tokens' rows, or the selected ones.
    """

    def __init__(
        self, plan: RegimePlan, comm: Communicator, rows: TokenRows, dtype: torch.dtype
    ) -> None:
        self.plan = plan
        self.comm = comm
        self.rows: Rows = rows
        self.tokens = rows
        self._dtype = dtype
        self._residual: Tensor | None = None
        self._written: dict[str, Tensor] = {}
        self._reads = iter(plan.reads)

    def write(self, block: str, x: Tensor) -> None:
        """Records what `block` gives, in the placement that the plan has for it. Moves nothing.

        x: [rows of that placement on this rank, hidden].

        Raises:
            PlacementError: if the plan knows no such block, it wrote already, or x has other rows.
        """
        gives = self.plan.gives.get(block)
        if gives is None or block in self._written:
            raise PlacementError(
                f"{block}: {'unknown to the plan' if gives is None else 'wrote twice'}"
            )
        self._check_rows(block, x, gives)
        self._written[block] = x

    def read(self, norm: Norm, name: str, rows: LogitsRows | None = None) -> "Normed":
        """Settles everything written so far and norms the sum.

        Contributions in the same placement are added first; each sum then takes one chain of moves
        to the residual's placement.

        Args:
            norm: [rows, hidden] -> [rows, hidden], on the residual's placement.
            name: the norm's name in the plan.
            rows: the rows that are still needed; the others are dropped before anything moves.

        Raises:
            PlacementError: if the plan expects another read, or other contributions.
        """
        plan = next(self._reads, None)
        if plan is None or plan.name != name:
            raise PlacementError(f"{name}: the plan has {plan.name if plan else 'nothing'} here")
        due = {producer for settle in plan.settles for producer in settle.producers}
        if due != set(self._written):
            raise PlacementError(
                f"{name}: written {sorted(self._written)}, but the plan settles {sorted(due)}"
            )
        if plan.selects_rows != (rows is not None):
            raise PlacementError(f"{name}: rows are selected where the plan says so, only there")
        if rows is not None:
            self._select(plan, rows)
        total = self._residual
        if total is not None and plan.carry is not None:
            total = self._run(total, plan.carry.route.moves)
        *others, last = [self._settled(settle) for settle in plan.settles]
        for addend in others:
            total = addend.to(self._dtype) if total is None else (total + addend).to(self._dtype)
        if total is None:
            self._residual = last.to(self._dtype)
            h = norm(self._residual)
        else:
            self._residual, h = norm.after_adding(total, last)
        self._written.clear()
        return Normed(self, plan, h)

    def _settled(self, settle: Settle) -> Tensor:
        """The sum of one settle's contributions, moved to the residual's placement."""
        addend = self._sum([self._written[name] for name in settle.producers])
        return (
            self._run(addend.to(self._dtype), settle.route.moves) if settle.route.moves else addend
        )

    def collect(self, block: str, features: Tensor) -> Tensor:
        """Carries out a block's declared inner moves on its sharded features.

        features: [rows, features of this rank] -> [this rank's rows, all features].
        """
        for name, moves in self.plan.inner:
            if name == block:
                return self._run(features, moves)
        if block not in self.plan.kinds:
            raise PlacementError(f"{block}: unknown to the plan")
        return features

    def _select(self, plan: ReadPlan, rows: LogitsRows) -> None:
        """Drops all but `rows` from the residual and the contributions."""
        seat = self.comm.seat

        def kept(x: Tensor, placement: Placement) -> Tensor:
            index = rows.local(self.tokens, seat.rank, placement.row_axes)
            if len(index) == x.shape[0]:
                return x  # all of them, in order
            # From pinned memory, so that nobody waits for the GPU.
            chosen = torch.tensor(index, dtype=torch.int64, pin_memory=x.is_cuda)
            return x[chosen.to(x.device, non_blocking=True)]

        if self._residual is not None and plan.carry is not None:
            self._residual = kept(self._residual, plan.carry.gives)
        self._written = {
            block: kept(x, self.plan.gives[block]) for block, x in self._written.items()
        }
        self.rows = rows

    def _sum(self, addends: list[Tensor]) -> Tensor:
        """The sum in the stream's dtype; a lone addend is cast where it travels or is added."""
        first, *others = addends
        for addend in others:
            first = first.to(self._dtype) + addend.to(self._dtype)
        return first

    def _run(self, x: Tensor, moves: tuple[Move, ...]) -> Tensor:
        for move in moves:
            x = self.move(x, move)
        return x

    def move(self, x: Tensor, move: Move) -> Tensor:
        """Carries out one move on the stream's current rows. x: [rows, features]."""
        comm, rows, axes = self.comm, self.rows, move.axes
        match move.op:
            case Op.ALL_REDUCE:
                return comm.all_reduce(x, axes)
            case Op.REDUCE_SCATTER:
                return comm.reduce_scatter(x, axes, rows.counts(comm.seat, axes))
            case Op.ALL_GATHER if move.before[axes[0]] == "S":
                return comm.all_gather(x, axes, rows.counts(comm.seat, axes))
            case Op.ALL_GATHER:
                members = comm.seat.mesh.size_of(axes)
                parts = comm.all_gather(x, axes, [x.shape[0]] * members)
                return _beside(parts, members)
            case Op.SLICE:
                return x[rows.cut(comm.seat, axes)]
            case Op.EXCHANGE:
                counts = rows.counts(comm.seat, axes)
                mine = counts[comm.seat.index(axes)]
                parts = comm.all_to_all(x, axes, counts, [mine] * len(counts))
                return _beside(parts, len(counts))

    def _check_rows(self, block: str, x: Tensor, placement: Placement) -> None:
        start, stop = self.rows.span(self.comm.seat.rank, placement.row_axes)
        if x.shape[0] != stop - start:
            raise PlacementError(
                f"{block}: gives {placement}, {stop - start} rows on rank {self.comm.seat.rank}, "
                f"but wrote {x.shape[0]}"
            )

    def deliver(self, x: Tensor, moves: tuple[Move, ...]) -> Tensor:
        """Moves normed rows to where a block needs them."""
        return self._run(x, moves)


class Normed:
    """The normed rows of one read, to be delivered to its consumers."""

    def __init__(self, stream: ResidualStream, plan: ReadPlan, h: Tensor) -> None:
        self._stream = stream
        self._plan = plan
        self._held: dict[Placement, Tensor] = {plan.residual: h}

    def to(self, block: str) -> Tensor:
        """The rows in the placement that `block` needs; each distinct delivery is moved once.

        Raises:
            PlacementError: if the plan delivers nothing to `block` at this read.
        """
        for delivery in self._plan.deliveries:
            if delivery.consumer == block:
                if delivery.needs not in self._held:
                    source = self._held[self._plan.residual]
                    self._held[delivery.needs] = self._stream.deliver(source, delivery.route.moves)
                return self._held[delivery.needs]
        raise PlacementError(f"{block}: the plan delivers nothing to it at {self._plan.name}")


def _beside(parts: Tensor, members: int) -> Tensor:
    """Features of `members` ranks, stacked along rows, side by side: [m*n, f] -> [n, m*f]."""
    rows = parts.shape[0] // members
    features = parts.shape[1]
    return parts.view(members, rows, features).transpose(0, 1).reshape(rows, members * features)
