"""Mutants of the stream's rows: wrong, shifted, gathered twice; and of who enters a collective."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isomoe.layout import LogitsRows, Move, Op, ReadPlan
from isomoe.prove.mutants.base import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    LM_HEAD,
    SHARED,
    WAITS,
    Mutant,
    Needs,
    When,
)
from isomoe.prove.mutants.hooks import Run, of, on_move, on_write
from isomoe.stream import Norm, Normed, ResidualStream


def _gathers_rows(move: Move) -> bool:
    return move.op is Op.ALL_GATHER and move.before[move.axes[0]] == "S"


def _gather_from_other_group(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    others = [a for a in stream.plan.mesh.attn_tp if a not in move.axes]
    if not _gathers_rows(move) or not others:
        return run(x, move)
    axes = (others[-1],)
    return stream.comm.all_gather(x, axes, [len(x)] * stream.plan.mesh.size_of(axes))


def _gather_as_sum(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    y = run(x, move)
    axes = stream.plan.mesh.attn_tp
    if move.op is Op.ALL_GATHER and axes and not set(axes) & set(move.axes):
        return stream.comm.all_reduce(y, axes)
    return y


def _gather_again(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    y = run(x, move)
    axes = stream.plan.mesh.attn_tp
    if move.op is Op.ALL_GATHER and axes and not set(axes) & set(move.axes):
        return stream.comm.all_gather(y, axes, [len(y)] * stream.plan.mesh.size_of(axes))
    return y


def _infer_from_shape(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    """A shard padded to the largest one may have as many rows as the whole."""
    if not _gathers_rows(move):
        return run(x, move)
    counts = stream.rows.counts(stream.comm.seat, move.axes)
    if max(counts) < sum(counts):
        return run(x, move)
    return torch.cat([x, x.new_zeros((sum(counts) - len(x), *x.shape[1:]))])


def _roll_rows(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    if move.op in (Op.REDUCE_SCATTER, Op.SLICE) and len(x):
        x = torch.roll(x, 1, 0)
    return run(x, move)


def _ranges_by_rank(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    if move.op in (Op.REDUCE_SCATTER, Op.SLICE) and len(x):
        x = torch.roll(x, stream.comm.seat.index(move.axes), 0)
    return run(x, move)


def _groups_reversed(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    y = run(x, move)
    if not _gathers_rows(move):
        return y
    parts = torch.split(y, list(stream.rows.counts(stream.comm.seat, move.axes)))
    return torch.cat(parts[::-1])


def _idle_rank_returns(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    seat, mesh = stream.comm.seat, stream.plan.mesh
    if stream.tokens.real[seat.rank // mesh.parallelism.attn_tp]:
        return run(x, move)
    match move.op:
        case Op.ALL_GATHER:
            return x.new_zeros((sum(stream.rows.counts(seat, move.axes)), *x.shape[1:]))
        case Op.REDUCE_SCATTER:
            return x[stream.rows.cut(seat, move.axes)]
    return x


def _rank_decides(stream: ResidualStream, run: Run, x: Tensor, move: Move) -> Tensor:
    if move.op is Op.ALL_GATHER and len(x) == 0:
        counts = stream.rows.counts(stream.comm.seat, move.axes)
        return stream.comm.all_to_all(x, move.axes, [0] * len(counts), counts)
    return run(x, move)


def _extra_collective(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    mesh, seat = stream.plan.mesh, stream.comm.seat
    if mesh.all and seat.rank % 2 == 0:
        stream.comm.broadcast(x[:0], mesh.all)
    return x


def _padding_leaks(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    placement = stream.plan.gives[block]
    for rows in stream.tokens.padding(stream.comm.seat.rank, placement.row_axes):
        # Expert outputs of padding rows are zero, so let garbage stand there, as a kernel may.
        x = x + torch.ones_like(x[rows]).sum(0, dtype=x.dtype)
    return x


def _shift_selection(stream: ResidualStream) -> None:
    read = stream.read

    def mutated(norm: Norm, name: str, rows: LogitsRows | None = None) -> Normed:
        if rows is not None:
            rows = replace(rows, index=tuple(max(0, row - 1) for row in rows.index))
        return read(norm, name, rows)

    stream.read = mutated  # type: ignore[method-assign]


def _hidden_counts(stream: ResidualStream) -> None:
    select = stream._select

    def mutated(plan: ReadPlan, rows: LogitsRows) -> None:
        select(plan, rows)
        stream.rows = stream.tokens

    stream._select = mutated  # type: ignore[method-assign]


def _vocabulary_shifted(stream: ResidualStream) -> None:
    collect = stream.collect

    def mutated(block: str, features: Tensor) -> Tensor:
        found = collect(block, features)
        return torch.roll(found, 1, 1) if stream.plan.kinds[block] == LM_HEAD else found

    stream.collect = mutated  # type: ignore[method-assign]


class _OwnCopy:
    """A norm whose result nobody else holds, so that it can be spoilt."""

    weight: Tensor
    eps: float
    dtype: torch.dtype

    def __init__(self, norm: Norm) -> None:
        self._norm = norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._norm, name)

    def __call__(self, x: Tensor, /) -> Tensor:
        return self._norm(x).clone()

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """As of the norm."""
        total, h = self._norm.after_adding(residual, addend)
        return total, h.clone()


def _experts_overwrite(stream: ResidualStream) -> None:
    """What the experts give replaces what they took, which the shared expert takes next."""
    read, write = stream.read, stream.write
    normed: list[Normed] = []

    def mutated_read(norm: Norm, name: str, rows: LogitsRows | None = None) -> Normed:
        normed[:] = [read(_OwnCopy(norm), name, rows)]
        return normed[0]

    def mutated_write(block: str, x: Tensor) -> None:
        write(block, x)
        if stream.plan.kinds[block] == EXPERTS:
            taken = normed[0].to(block)
            taken.copy_(x.to(taken.dtype))

    stream.read = mutated_read  # type: ignore[method-assign]
    stream.write = mutated_write  # type: ignore[method-assign]


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="gather-from-other-group",
        code="M02",
        what="rows are gathered from the wrong group of ranks",
        block=EXPERTS,
        in_stream=on_move(_gather_from_other_group),
    ),
    Mutant(
        name="gather-as-sum",
        code="M06",
        what="a gather made of zero padding and a sum, over ranks that hold copies",
        block=EXPERTS,
        in_stream=on_move(_gather_as_sum),
    ),
    Mutant(
        name="layout-from-shape",
        code="M12",
        what="a gather is skipped where a padded shard has as many rows as the whole",
        block=EXPERTS,
        when=When.ONE_GROUP,
        in_stream=on_move(_infer_from_shape),
    ),
    Mutant(
        name="ragged-offsets",
        code="M13",
        what="scattered rows are off by one",
        block=EXPERTS,
        layout="tp2,dp2,ep2",
        in_stream=on_move(_roll_rows),
    ),
    Mutant(
        name="ranges-by-rank",
        code="M13",
        what="the ranks of a group scatter other ranges of rows",
        block=EXPERTS,
        layout="tp2,dp2,ep2",
        in_stream=on_move(_ranges_by_rank),
    ),
    Mutant(
        name="groups-reversed",
        code="M13",
        what="the groups' rows are joined in another order than they are scattered",
        block=EXPERTS,
        in_stream=on_move(_groups_reversed),
    ),
    Mutant(
        name="logits-of-wrong-rows",
        code="M13",
        what="the rows that get logits are off by one",
        block=LM_HEAD,
        when=When.SOME_ROWS,
        in_stream=_shift_selection,
    ),
    Mutant(
        name="hidden-counts-for-logits",
        code="M13",
        what="the counts of hidden rows are used for the rows that get logits",
        block=LM_HEAD,
        when=When.SOME_ROWS,
        in_stream=_hidden_counts,
    ),
    Mutant(
        name="vocabulary-shifted",
        code="M13",
        what="the vocabulary's parts are joined off by one",
        block=LM_HEAD,
        in_stream=_vocabulary_shifted,
    ),
    Mutant(
        name="padding-leaks",
        code="M14",
        what="garbage in padding rows reaches their neighbours through a batch-wide operation",
        block=EXPERTS,
        engine_refusal="needs padding rows, which only a GPU's captured steps have",
        when=When.PADDED,
        in_stream=on_write(of(EXPERTS), _padding_leaks),
    ),
    Mutant(
        name="undefined-operand",
        code="M14",
        what="the first norm, which has no residual yet, adds an undefined one",
        block=EMBEDDING,
        in_stream=on_write(of(EMBEDDING), lambda _, __, x: x + 1),
    ),
    Mutant(
        name="rank-decides",
        code="M19",
        what="each rank picks its collective by its own number of rows",
        block=EXPERTS,
        engine_refusal=WAITS,
        in_stream=on_move(_rank_decides),
    ),
    Mutant(
        name="idle-rank-returns",
        code="M23",
        what="a rank without tokens returns early and skips its collectives",
        block=EMBEDDING,
        engine_refusal=WAITS,
        when=When.ONE_GROUP,
        in_stream=on_move(_idle_rank_returns),
    ),
    Mutant(
        name="conditional-collective",
        code="M24",
        what="some ranks enter a collective of all ranks",
        block=ATTENTION,
        engine_refusal=WAITS,
        in_stream=on_write(of(ATTENTION), _extra_collective),
    ),
    Mutant(
        name="gather-of-full-rows",
        code="M25",
        what="rows that are already complete are gathered again",
        block=EXPERTS,
        in_stream=on_move(_gather_again),
    ),
    Mutant(
        name="overwritten-input",
        code="M27",
        what="the experts overwrite their input before the shared expert reads it",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_stream=_experts_overwrite,
    ),
)
