"""Mutants of the stream's sums: made twice, never, in part, over the wrong ranks, or scaled."""

import torch
from torch import Tensor

from isomoe.layout import Axes, Letter, LogitsRows, Move, Op
from isomoe.prove.mutants.base import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    EXPERTS,
    SHARED,
    Mutant,
    Needs,
    When,
)
from isomoe.prove.mutants.hooks import (
    REDUCING,
    OnWrite,
    Run,
    both,
    equal,
    large,
    last_layer,
    of,
    on_move,
    on_settle,
    on_write,
    ragged,
    small,
    summed_axes,
)
from isomoe.stream import ResidualStream


def _sum_too_early(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    """Sums over every axis over which the stream will sum again."""
    for axes in summed_axes(stream.plan, block):
        x = stream.comm.all_reduce(x, axes)
    return x


def _sum_too_early_over(which: str) -> OnWrite:
    """Sums over the axes of one kind of group alone, such as moe_ep."""

    def change(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
        axes = getattr(stream.plan.mesh, which)
        return stream.comm.all_reduce(x, axes) if axes else x

    return change


def sum_padded(stream: ResidualStream, x: Tensor, axes: Axes, row_axes: int) -> Tensor:
    """Sums over `axes` even where ranks hold other numbers of rows: shorter ones get zeros."""
    spans = [stream.rows.span(rank, row_axes) for rank in range(stream.plan.mesh.size)]
    most = max(stop - start for start, stop in spans)
    padded = torch.cat([x, x.new_zeros((most - len(x), *x.shape[1:]))])
    return stream.comm.all_reduce(padded, axes)[: len(x)]


def _sum_over_rows(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    """Sums over ranks that hold other rows."""
    gives = stream.plan.gives[block]
    axes = gives.where(Letter.S)
    return sum_padded(stream, x, axes, gives.row_axes) if axes else x


def _skip_sum(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    match move.op:
        case Op.ALL_REDUCE:
            return x
        case Op.REDUCE_SCATTER:
            return x[stream.rows.cut(stream.comm.seat, move.axes)]
    return run(x, move)


def _skip_last_sum(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    if isinstance(stream.rows, LogitsRows):
        return _skip_sum(stream, run, x, move)
    return run(x, move)


def _sum_one_axis(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    if move.op in REDUCING and len(move.axes) > 1:
        x = stream.comm.all_reduce(x, move.axes[-1:])
        return _skip_sum(stream, run, x, move)
    return run(x, move)


def _sum_other_group(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    others = [a for a in stream.plan.mesh.all if a not in move.axes]
    if move.op is not Op.ALL_REDUCE or not others:
        return run(x, move)
    return sum_padded(stream, x, (others[-1],), move.before.row_axes)


def _residual_in_every_addend(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    """Beside the residual that the read adds, as often as there are ranks in the group."""
    residual = stream._residual
    if move.op in REDUCING and residual is not None and residual.shape == x.shape:
        x = x + residual
    return run(x, move)


def _divided(x: Tensor, by: int) -> Tensor:
    """x / by. Provenance is integers, which cannot be divided: there it counts not at all."""
    return x / by if x.is_floating_point() else x * 0


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="double-reduce",
        code="M01",
        what="the experts sum their own output, and the stream sums (reduce-scatters) it again",
        block=EXPERTS,
        layout="tp2,dp2,ep2",
        in_stream=on_write(of(EXPERTS), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-ep",
        code="M01",
        what="the experts sum over moe_ep alone, and the stream sums over it again",
        block=EXPERTS,
        in_stream=on_write(of(EXPERTS), _sum_too_early_over("moe_ep")),
    ),
    Mutant(
        name="double-reduce-tp",
        code="M01",
        what="the experts sum over moe_tp alone, and the stream sums over it again",
        block=EXPERTS,
        in_stream=on_write(of(EXPERTS), _sum_too_early_over("moe_tp")),
    ),
    Mutant(
        name="double-reduce-ragged",
        code="M01",
        what="the experts sum their own output too, in steps of unequal groups alone",
        block=EXPERTS,
        when=When.UNEQUAL,
        in_stream=on_write(both(of(EXPERTS), ragged), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-equal",
        code="M01",
        what="the experts sum their own output too, in steps of equal groups alone",
        block=EXPERTS,
        when=When.EQUAL,
        in_stream=on_write(both(of(EXPERTS), equal), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-attention",
        code="M01",
        what="attention sums its own output, and the stream sums it again",
        block=ATTENTION,
        in_stream=on_write(of(ATTENTION), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-dense",
        code="M01",
        what="a dense layer sums its own output, and the stream sums it again",
        block=DENSE,
        needs=Needs.DENSE,
        model="qwen3-moe-mixed",
        in_stream=on_write(of(DENSE), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-dense-ragged",
        code="M01",
        what="a dense layer sums its own output too, in steps of unequal groups alone",
        block=DENSE,
        needs=Needs.DENSE,
        model="qwen3-moe-mixed",
        when=When.UNEQUAL,
        in_stream=on_write(both(of(DENSE), ragged), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-shared",
        code="M01",
        what="a shared expert sums its own output, and the stream sums it again",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_stream=on_write(of(SHARED), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-embedding",
        code="M01",
        what="the embedding sums its own output, and the stream sums it again",
        block=EMBEDDING,
        in_stream=on_write(of(EMBEDDING), _sum_too_early),
    ),
    Mutant(
        name="double-reduce-last-layer",
        code="M01",
        what="the last layer's blocks sum their own output, and the stream sums it again",
        block=EXPERTS,
        in_stream=on_write(last_layer, _sum_too_early),
    ),
    Mutant(
        name="wrong-group",
        code="M02",
        what="an all-reduce over the wrong group of ranks",
        block=EMBEDDING,
        in_stream=on_move(_sum_other_group),
    ),
    Mutant(
        name="missing-reduce",
        code="M03",
        what="partial sums are handed on, or scattered, without being summed",
        block=EMBEDDING,
        in_stream=on_move(_skip_sum),
    ),
    Mutant(
        name="missing-reduce-experts",
        code="M03",
        what="the experts' addends are handed on, or scattered, without being summed",
        block=EXPERTS,
        in_stream=on_settle(of(EXPERTS), _skip_sum),
    ),
    Mutant(
        name="missing-reduce-ragged",
        code="M03",
        what="the experts' addends are not summed, in steps of unequal groups alone",
        block=EXPERTS,
        when=When.UNEQUAL,
        in_stream=on_settle(both(of(EXPERTS), ragged), _skip_sum),
    ),
    Mutant(
        name="missing-reduce-attention",
        code="M03",
        what="attention's addends are handed on, or scattered, without being summed",
        block=ATTENTION,
        in_stream=on_settle(of(ATTENTION), _skip_sum),
    ),
    Mutant(
        name="missing-reduce-embedding",
        code="M20",
        what="the first norm, which has no residual to add, skips the sum that fuses with it",
        block=EMBEDDING,
        in_stream=on_settle(of(EMBEDDING), _skip_sum),
    ),
    Mutant(
        name="one-axis-of-two",
        code="M04",
        what="a sum over two axes that is made over one of them",
        block=EXPERTS,
        in_stream=on_move(_sum_one_axis),
    ),
    Mutant(
        name="reduce-over-rows",
        code="M05",
        what="attention's output is summed over ranks that hold other rows",
        block=ATTENTION,
        in_stream=on_write(of(ATTENTION), _sum_over_rows),
    ),
    Mutant(
        name="reduce-over-rows-dense",
        code="M05",
        what="a dense layer's output is summed over ranks that hold other rows",
        block=DENSE,
        needs=Needs.DENSE,
        model="qwen3-moe-mixed",
        layout="tp4,dp2,ep2,dense1",
        in_stream=on_write(of(DENSE), _sum_over_rows),
    ),
    Mutant(
        name="reduce-over-rows-embedding",
        code="M05",
        what="the embedding's output is summed over ranks that hold other rows",
        block=EMBEDDING,
        in_stream=on_write(of(EMBEDDING), _sum_over_rows),
    ),
    Mutant(
        name="residual-into-partial",
        code="M07",
        what="each rank adds the replicated residual to its addend before the sum",
        block=ATTENTION,
        in_stream=on_move(_residual_in_every_addend),
    ),
    Mutant(
        name="uncompensated-scale",
        code="M09",
        what="attention's output is scaled by the group's size, and nothing scales it back",
        block=ATTENTION,
        in_stream=on_write(
            of(ATTENTION), lambda s, _, x: x * s.plan.mesh.size_of(s.plan.mesh.attn_tp)
        ),
    ),
    Mutant(
        name="shared-expert-divided",
        code="M09",
        what="a shared expert is divided by the group's size, and nothing multiplies it back",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_stream=on_write(of(SHARED), lambda s, _, x: _divided(x, s.plan.mesh.size)),
    ),
    Mutant(
        name="scale-twice",
        code="M17",
        what="the routed experts are scaled at two sites",
        block=EXPERTS,
        in_stream=on_write(of(EXPERTS), lambda _, __, x: x * 2),
    ),
    Mutant(
        name="shared-expert-scaled-too",
        code="M17",
        what="the factor of the routed experts multiplies the shared expert as well",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_stream=on_write(of(SHARED), lambda _, __, x: x * 2),
    ),
    Mutant(
        name="double-reduce-large-steps",
        code="M19",
        what="who sums is decided for small steps: in larger ones the experts and the stream do",
        block=EXPERTS,
        when=When.LARGE,
        in_stream=on_write(both(of(EXPERTS), large), _sum_too_early),
    ),
    Mutant(
        name="missing-reduce-small-steps",
        code="M19",
        what="who sums is decided for large steps: in smaller ones nobody sums the experts",
        block=EXPERTS,
        when=When.SMALL,
        in_stream=on_settle(both(of(EXPERTS), small), _skip_sum),
    ),
    Mutant(
        name="last-reduce-lost",
        code="M20",
        what="the last layer leaves its sum to a next layer, which does not exist",
        block=EXPERTS,
        in_stream=on_move(_skip_last_sum),
    ),
    Mutant(
        name="lost-shared-expert",
        code="M22",
        what="a shared expert's slot is masked out by a count that leaves it out",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_stream=on_write(of(SHARED), lambda _, __, x: x * 0),
    ),
)
