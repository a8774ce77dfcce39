"""Mutants of the ways between attention and experts: fused sums, exchanges, packed rows, copies."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks import Ownership, SparseMoe
from isomoe.comm import RoutedRows
from isomoe.layout import ExpertMap, LogitsRows, Move, Op
from isomoe.models import CausalLM
from isomoe.prove.mutants.base import ATTENTION, EXPERTS, Mutant
from isomoe.prove.mutants.hooks import on_write
from isomoe.prove.mutants.sums import sum_padded
from isomoe.stream import Norm, ResidualStream

_UNFUSED = "sums over Gloo are not fused, and nothing is declined"

Fused = Callable[[Move, Tensor, Tensor, Norm], tuple[Tensor, Tensor]]


def _on_fused(change: Callable[[ResidualStream, Fused, Move, Tensor, Tensor, Norm], Any]) -> Any:
    """Passes every fused sum through `change`, which may call the real one."""

    def in_stream(stream: ResidualStream) -> None:
        fused = stream._fused

        def mutated(move: Move, addend: Tensor, total: Tensor, norm: Norm) -> Any:
            return change(stream, fused, move, addend, total, norm)

        stream._fused = mutated  # type: ignore[method-assign]

    return in_stream


def _own(stream: ResidualStream, move: Move, x: Tensor) -> Tensor:
    """The rows that this rank gets, of its own addends alone."""
    scatters = move.op is Op.REDUCE_SCATTER
    return x[stream.rows.cut(stream.comm.seat, move.axes)] if scatters else x


def _declined_and_lost(
    stream: ResidualStream, fused: Fused, move: Move, addend: Tensor, total: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """On the last layer, whoever declines leaves the sum to a next layer."""
    counts = None
    if move.op is Op.REDUCE_SCATTER:
        counts = stream.rows.counts(stream.comm.seat, move.axes)
    done = stream.comm.sum_add_norm(addend, move.axes, counts, total, norm)
    if done is not None:
        return done
    if isinstance(stream.rows, LogitsRows):
        return norm.after_adding(total, _own(stream, move, addend))
    return norm.after_adding(total, stream.move(addend, move))


def _summed_before(
    stream: ResidualStream, fused: Fused, move: Move, addend: Tensor, total: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    return fused(move, stream.comm.all_reduce(addend, move.axes), total, norm)


def _deferred_for_ever(
    stream: ResidualStream, fused: Fused, move: Move, addend: Tensor, total: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Before the head there is no consumer that would make the deferred sum."""
    if isinstance(stream.rows, LogitsRows):
        return total, norm(total)
    return fused(move, addend, total, norm)


def _combined_then_summed(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    *_, back = stream.inner(block)
    return sum_padded(stream, x, back.axes, back.after.row_axes)


def _on_spread(change: Callable[[RoutedRows, RoutedRows], RoutedRows]) -> Any:
    """Passes what arrives for experts through `change`, with what was sent."""

    def in_stream(stream: ResidualStream) -> None:
        spread = stream.spread

        def mutated(block: str, rows: RoutedRows, per_rank: int) -> RoutedRows:
            return change(rows, spread(block, rows, per_rank))

        stream.spread = mutated  # type: ignore[method-assign]

    return in_stream


def _own_scales(sent: RoutedRows, arrived: RoutedRows) -> RoutedRows:
    """Each rank unpacks what arrives with the scales of its own rows."""
    (codes, *scales), ids, weights = arrived
    return (codes, *map(_repeated_to(len(codes)), sent[0][1:], scales)), ids, weights


def _repeated_to(rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    def repeated(mine: Tensor, theirs: Tensor) -> Tensor:
        return theirs if not len(mine) else mine[torch.arange(rows) % len(mine)]

    return repeated


def _choices_shifted(sent: RoutedRows, arrived: RoutedRows) -> RoutedRows:
    values, ids, weights = arrived
    return values, ids.roll(1, 0), weights.roll(1, 0)


def _combined_in_other_order(stream: ResidualStream) -> None:
    unite = stream.unite
    stream.unite = lambda block, out: unite(block, out.flip(0))  # type: ignore[method-assign]


class _OwnTurn(Ownership):
    """Takes turns among copies from another row on, on each rank."""

    def __init__(self, location: ExpertMap, first: int, stop: int, rank: int) -> None:
        super().__init__(location, first, stop)
        self.rank = rank

    def copies_for(self, ids: Tensor, first_row: int) -> Tensor:
        return super().copies_for(ids, first_row + self.rank)


def _copy_by_rank(model: CausalLM) -> None:
    for block in model.blocks():
        if isinstance(block, SparseMoe):
            own, rank = block.ownership, model.seat.index(model.seat.mesh.moe_ep)
            block.ownership = _OwnTurn(own.location, own.first, own.stop, rank)


def _every_copy_serves(model: CausalLM) -> None:
    """A rank that has any copy of a chosen expert takes it."""
    for block in model.blocks():
        if isinstance(block, SparseMoe):
            _take_any_copy(block, block.ownership)


def _take_any_copy(block: SparseMoe, own: Ownership) -> None:
    def slots(physical: Tensor) -> Tensor:
        logical = torch.tensor([*own.location.physical_to_logical, -1])[physical]
        held = {expert: slot for slot, expert in enumerate(own.held)}
        found: Sequence[int] = [held.get(expert, -1) for expert in logical.flatten().tolist()]
        return torch.tensor(found).view_as(physical).to(physical)

    block.ownership.slots = slots  # type: ignore[method-assign]


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="fused-sum-declined-and-lost",
        code="M20",
        what="the last layer's fused sum is declined, and left to a next layer",
        block=EXPERTS,
        engine_refusal=_UNFUSED,
        in_stream=_on_fused(_declined_and_lost),
    ),
    Mutant(
        name="fused-sum-without-consumer",
        code="M20",
        what="the last layer's sum is deferred to a norm of a layer that does not exist",
        block=EXPERTS,
        engine_refusal=_UNFUSED,
        in_stream=_on_fused(_deferred_for_ever),
    ),
    Mutant(
        name="summed-before-fused-sum",
        code="M01",
        what="what goes into a fused sum was summed already",
        block=ATTENTION,
        layout="tp4,ep2",
        engine_refusal=_UNFUSED,
        in_stream=_on_fused(_summed_before),
    ),
    Mutant(
        name="combined-then-summed",
        code="M01",
        what="what came back from an all-to-all, summed, is summed over its ranks again",
        block=EXPERTS,
        layout="tp4,dp2,ep2,a2a",
        in_stream=on_write(
            lambda plan, block: any(m.op is Op.COMBINE for m in dict(plan.inner).get(block, ())),
            _combined_then_summed,
        ),
    ),
    Mutant(
        name="gathered-without-scales",
        code="M26",
        what="packed rows are unpacked with the scales of a rank's own rows",
        block=EXPERTS,
        layout="tp4,dp2,ep2,fp8",
        in_stream=_on_spread(_own_scales),
    ),
    Mutant(
        name="choices-of-other-rows",
        code="M15",
        what="rows that were gathered after routing meet the choices of the rows before them",
        block=EXPERTS,
        layout="tp4,dp2,ep2,fp8",
        in_stream=_on_spread(_choices_shifted),
    ),
    Mutant(
        name="combined-in-other-order",
        code="M15",
        what="what experts made of rows goes back in another order than the rows came",
        block=EXPERTS,
        layout="tp4,dp2,ep2,a2a",
        in_stream=_combined_in_other_order,
    ),
    Mutant(
        name="copy-by-rank",
        code="M21",
        what="each rank picks its own copy of an expert",
        block=EXPERTS,
        layout="tp4,dp2,ep2,red8",
        in_model=_copy_by_rank,
    ),
    Mutant(
        name="every-copy-serves",
        code="M21",
        what="a row is served by every copy of its expert",
        block=EXPERTS,
        layout="tp4,dp2,ep2,red8",
        in_model=_every_copy_serves,
    ),
)
