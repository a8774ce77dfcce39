"""The residual stream: a contribution is written with what it owes, and settled when it is read.

This is the only place where an activation is reduced or moved between blocks. Blocks say which
placement they take and give; the plan of the step's regime says which moves lie between.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from isomoe.comm import (
    AddNorm,
    CommExchange,
    Communicator,
    ExpertExchange,
    RoutedRows,
    join,
    parts_of,
    split,
)
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


class Norm(AddNorm, Protocol):
    """What `read` applies to the settled rows."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """x: [rows, hidden] -> the same shape."""


class ResidualStream:
    """One rank's residual stream for one step.

    Args:
        plan: the plan of the step's regime.
        comm: this rank's collectives.
        rows: the step's rows.
        dtype: of the residual and of what travels to it (the wire dtype).
        exchange: takes rows to the ranks of their experts; by default `comm` does.

    Attributes:
        plan, comm: as given.
        tokens: the step's rows, as given.
        rows: those that are left: the tokens' rows, or the selected ones.
    """

    def __init__(
        self,
        plan: RegimePlan,
        comm: Communicator,
        rows: TokenRows,
        dtype: torch.dtype,
        exchange: ExpertExchange | None = None,
    ) -> None:
        self.plan = plan
        self.comm = comm
        self.rows: Rows = rows
        self.tokens = rows
        self._dtype = dtype
        self._residual: Tensor | None = None
        self._written: dict[str, Tensor] = {}
        self._reads = iter(plan.reads)
        self._inner = dict(plan.inner)
        self._exchange = exchange or CommExchange(comm)
        self._sent: dict[str, Any] = {}
        self._second: torch.cuda.Stream | None = None

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
        self._join()
        if rows is not None:
            self._select(plan, rows)
        total = self._residual
        if total is not None and plan.carry is not None:
            total = self._run(total, plan.carry.route.moves)
        *others, last = plan.settles
        for settle in others:
            addend = self._settled(settle, settle.route.moves)
            total = addend.to(self._dtype) if total is None else (total + addend).to(self._dtype)
        if total is None:
            self._residual = self._settled(last, last.route.moves).to(self._dtype)
            h = norm(self._residual)
        elif last.route.fused:
            *moves, move = last.route.moves
            self._residual, h = self._fused(move, self._settled(last, moves), total, norm)
        else:
            addend = self._settled(last, last.route.moves)
            self._residual, h = norm.after_adding(total, addend)
        self._written.clear()
        return Normed(self, plan, h)

    def _settled(self, settle: Settle, moves: Sequence[Move]) -> Tensor:
        """The sum of one settle's contributions, moved towards the residual's placement."""
        addend = self._sum([self._written[name] for name in settle.producers])
        return self._run(addend.to(self._dtype), moves) if settle.route.moves else addend

    def _fused(
        self, move: Move, addend: Tensor, total: Tensor, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """The last sum with the addition to the residual and the norm: in one operation, or, where
        that is declined, one after the other."""
        scatters = move.op is Op.REDUCE_SCATTER
        counts = self.rows.counts(self.comm.seat, move.axes) if scatters else None
        done = self.comm.sum_add_norm(addend, move.axes, counts, total, norm)
        return norm.after_adding(total, self.move(addend, move)) if done is None else done

    def fork(self, device: torch.device) -> torch.cuda.Event:
        """What a block beside others has to wait for: all that has been launched so far."""
        event: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
        return event

    @contextmanager
    def beside(self, ready: torch.cuda.Event, device: torch.device) -> Iterator[None]:
        """Launches on the second stream, which the next read waits for. No collective may be among
        it: ranks would run theirs in different orders."""
        self._second = second = second_stream(device)
        second.wait_event(ready)
        with torch.cuda.stream(second):
            yield

    def _join(self) -> None:
        if self._second is not None:
            torch.cuda.current_stream(self._second.device).wait_stream(self._second)
            self._second = None

    def inner(self, block: str) -> tuple[Move, ...]:
        """The moves inside a block, as the plan has chosen to run it."""
        return self._inner.get(block, ())

    def spread(self, block: str, rows: RoutedRows, per_rank: int) -> RoutedRows:
        """Takes rows with their choice of experts to where those experts are, in one bundle.

        Gathered, every rank gets all rows of the group; dispatched, those that chose its experts.

        Args:
            per_rank: physical experts of a rank.
        """
        move = self.inner(block)[0]
        if move.op is Op.DISPATCH:
            most = max(self.rows.counts(self.comm.seat, move.axes))
            rows, self._sent[block] = self._exchange.dispatch(rows, move.axes, per_rank, most)
            return rows
        values, ids, weights = rows
        parcel = (*values, ids, weights)
        counts = self.rows.counts(self.comm.seat, move.axes)
        bundle = self.comm.all_gather(join(parcel), move.axes, counts)
        *packed, ids, weights = split(bundle, parts_of(parcel))
        return tuple(packed), ids, weights

    def unite(self, block: str, out: Tensor) -> Tensor:
        """Brings back what experts made of dispatched rows, added up; gathered rows stay.

        out: [rows that arrived, hidden] -> [rows of what the block gives, hidden].
        """
        if self.inner(block)[-1].op is not Op.COMBINE:
            return out
        return self._exchange.combine(out.to(self._dtype), self._sent.pop(block))

    def collect(self, block: str, features: Tensor) -> Tensor:
        """Carries out a block's declared inner moves on its sharded features.

        features: [rows, features of this rank] -> [this rank's rows, all features].
        """
        if block not in self.plan.kinds:
            raise PlacementError(f"{block}: unknown to the plan")
        return self._run(features, self.inner(block))

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

    def _run(self, x: Tensor, moves: Iterable[Move]) -> Tensor:
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
            case Op.DISPATCH | Op.COMBINE:
                raise PlacementError(f"{move}: takes rows with their choice of experts")

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
        self._forks: dict[str, torch.cuda.Event] = {}

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
                rows = self._held[delivery.needs]
                if delivery.beside and rows.is_cuda and block not in self._forks:
                    self._forks[block] = self._stream.fork(rows.device)
                return rows
        raise PlacementError(f"{block}: the plan delivers nothing to it at {self._plan.name}")

    def beside(self, block: str) -> AbstractContextManager[None]:
        """Where `block` runs: on the second stream if the plan says so, beside what is launched
        after its rows were delivered."""
        if block not in self._forks:
            return nullcontext()
        return self._stream.beside(self._forks[block], self._held[self._plan.residual].device)


@cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _beside(parts: Tensor, members: int) -> Tensor:
    """Features of `members` ranks, stacked along rows, side by side: [m*n, f] -> [n, m*f]."""
    rows = parts.shape[0] // members
    features = parts.shape[1]
    return parts.view(members, rows, features).transpose(0, 1).reshape(rows, members * features)
