"""Known defects, planted on purpose: each must make the proof fail.

A mutant changes what a model declares, a rank's model, or its stream; never the oracle. Those that
only touch the stream are also planted in the real engine by `isomoe parity --inject`. The codes
are the mutation operators of docs/mutants.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isomoe.blocks import Attention, Batch, GatedMLP, SparseMoe
from isomoe.errors import ConfigError
from isomoe.layout import BlockSpec, Chain, Letter, LogitsRows, Move, Op, Variant
from isomoe.models import CausalLM
from isomoe.stream import Norm, Normed, ResidualStream

_REDUCING = (Op.ALL_REDUCE, Op.REDUCE_SCATTER)


def _chain_as_it_is(chain: Chain) -> Chain:
    return chain


def _model_as_it_is(model: CausalLM) -> None:
    """Changes nothing."""


def _stream_as_it_is(stream: ResidualStream) -> None:
    """Changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A defect.

    Attributes:
        name: as typed.
        code: the mutation operator.
        what: one line for `--list-mutants`.
        in_chain: changes what the model declares, before it is planned.
        in_model: changes one rank's model after it is built.
        in_stream: changes one rank's stream before a step.
    """

    name: str
    code: str
    what: str
    in_chain: Callable[[Chain], Chain] = _chain_as_it_is
    in_model: Callable[[CausalLM], None] = _model_as_it_is
    in_stream: Callable[[ResidualStream], None] = _stream_as_it_is

    @property
    def runs_in_engine(self) -> bool:
        """Whether it can be planted in the real engine: nothing but the stream is touched."""
        return self.in_stream is not _stream_as_it_is


Hook = Callable[[ResidualStream], None]


def _on_write(kind: str, change: Callable[[ResidualStream, str, Tensor], Tensor]) -> Hook:
    """Passes what every block of a kind writes through `change`."""

    def in_stream(stream: ResidualStream) -> None:
        write = stream.write

        def mutated(block: str, x: Tensor) -> None:
            write(block, change(stream, block, x) if stream.plan.kinds[block] == kind else x)

        stream.write = mutated  # type: ignore[method-assign]

    return in_stream


_Run = Callable[[Tensor, Move], Tensor]


def _on_move(change: Callable[[ResidualStream, _Run, Tensor, Move], Tensor]) -> Hook:
    """Passes every move through `change`, which may call the real one."""

    def in_stream(stream: ResidualStream) -> None:
        run = stream.move

        def mutated(x: Tensor, move: Move) -> Tensor:
            return change(stream, run, x, move)

        stream.move = mutated  # type: ignore[method-assign]

    return in_stream


def _sum_too_early(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    """Sums over every axis over which the stream will sum again."""
    for read in stream.plan.reads:
        for settle in read.settles:
            if block in settle.producers:
                for move in settle.route.moves:
                    if move.op in _REDUCING:
                        x = stream.comm.all_reduce(x, move.axes)
    return x


def _sum_over_rows(stream: ResidualStream, block: str, x: Tensor) -> Tensor:
    axes = stream.plan.mesh.attn_dp
    return stream.comm.all_reduce(x, axes) if axes else x


def _skip_sum(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    match move.op:
        case Op.ALL_REDUCE:
            return x
        case Op.REDUCE_SCATTER:
            return x[stream.rows.cut(stream.comm.seat, move.axes)]
    return run(x, move)


def _skip_last_sum(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    if isinstance(stream.rows, LogitsRows):
        return _skip_sum(stream, run, x, move)
    return run(x, move)


def _sum_one_axis(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    if move.op in _REDUCING and len(move.axes) > 1:
        x = stream.comm.all_reduce(x, move.axes[-1:])
        return _skip_sum(stream, run, x, move)
    return run(x, move)


def _sum_other_group(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    others = [a for a in stream.plan.mesh.all if a not in move.axes]
    if move.op is Op.ALL_REDUCE and others:
        return stream.comm.all_reduce(x, (others[-1],))
    return run(x, move)


def _gather_as_sum(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    y = run(x, move)
    axes = stream.plan.mesh.attn_tp
    if move.op is Op.ALL_GATHER and axes and not set(axes) & set(move.axes):
        return stream.comm.all_reduce(y, axes)
    return y


def _gather_again(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    y = run(x, move)
    axes = stream.plan.mesh.attn_tp
    if move.op is Op.ALL_GATHER and axes and not set(axes) & set(move.axes):
        return stream.comm.all_gather(y, axes, [len(y)] * stream.plan.mesh.size_of(axes))
    return y


def _roll_rows(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    if move.op in (Op.REDUCE_SCATTER, Op.SLICE) and len(x):
        x = torch.roll(x, 1, 0)
    return run(x, move)


def _idle_rank_returns(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    seat, mesh = stream.comm.seat, stream.plan.mesh
    if stream.tokens.real[seat.rank // mesh.parallelism.attn_tp]:
        return run(x, move)
    match move.op:
        case Op.ALL_GATHER:
            return x.new_zeros((sum(stream.rows.counts(seat, move.axes)), *x.shape[1:]))
        case Op.REDUCE_SCATTER:
            return x[stream.rows.cut(seat, move.axes)]
    return x


def _infer_from_shape(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
    if move.op is Op.ALL_GATHER and len(x) == stream.rows.total:
        return x
    return run(x, move)


def _rank_decides(stream: ResidualStream, run: _Run, x: Tensor, move: Move) -> Tensor:
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


def _redeclared(kind: str, change: Callable[[Variant], Variant]) -> Callable[[Chain], Chain]:
    """Changes the declared placements of every block of a kind."""

    def block(spec: BlockSpec) -> BlockSpec:
        if spec.kind != kind:
            return spec
        return replace(spec, variants=tuple(change(variant) for variant in spec.variants))

    def in_chain(chain: Chain) -> Chain:
        reads = tuple(
            replace(read, consumers=tuple(block(spec) for spec in read.consumers))
            for read in chain.reads
        )
        return replace(chain, reads=reads)

    return in_chain


def _needs_partial(variant: Variant) -> Variant:
    assert variant.needs is not None
    return Variant(variant.needs.put(Letter.P, variant.gives.where(Letter.P)), variant.gives)


def _gives_replicated(variant: Variant) -> Variant:
    return Variant(variant.needs, variant.gives.put(Letter.R, variant.gives.where(Letter.P)))


def _bias_everywhere(model: CausalLM) -> None:
    for block in model.blocks():
        if isinstance(block, Attention):
            block.output.bias_here = True


def _whole_expert_width(model: CausalLM) -> None:
    for block in model.blocks():
        if isinstance(block, SparseMoe):
            block.experts.width = (0, block.experts.intermediate_size)


def _whole_shared_expert(model: CausalLM) -> None:
    for block in model.blocks():
        if isinstance(block, GatedMLP) and block.spec.kind == "shared expert":
            block.down.columns = (0, block.down.in_features)


def _own(first_by: int, when_first: bool) -> Callable[[CausalLM], None]:
    """Moves the start of a rank's experts, on the ranks that own (or do not own) expert 0."""

    def in_model(model: CausalLM) -> None:
        for block in model.blocks():
            if isinstance(block, SparseMoe) and (block.owned[0] == 0) == when_first:
                block.owned = (block.owned[0] + first_by, block.owned[1])
                block.experts.owned = block.owned

    return in_model


def _on_local_ids(change: Callable[[Tensor], Tensor]) -> Callable[[CausalLM], None]:
    def in_model(model: CausalLM) -> None:
        for block in model.blocks():
            if isinstance(block, SparseMoe):
                _change_local_ids(block, change)

    return in_model


def _change_local_ids(block: SparseMoe, change: Callable[[Tensor], Tensor]) -> None:
    route = block.route

    def mutated(router_logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        weights, ids = route(router_logits, batch)
        return weights, change(ids)

    block.route = mutated  # type: ignore[method-assign]


def _lose_last_slot(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], -1)], dim=1)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="double-reduce",
        code="M01",
        what="the experts sum their own output, and the stream sums (reduce-scatters) it again",
        in_stream=_on_write("experts", _sum_too_early),
    ),
    Mutant(
        name="double-reduce-attention",
        code="M01",
        what="attention sums its own output, and the stream sums it again",
        in_stream=_on_write("attention", _sum_too_early),
    ),
    Mutant(
        name="double-reduce-dense",
        code="M01",
        what="a dense layer sums its own output, and the stream sums it again",
        in_stream=_on_write("dense FFN", _sum_too_early),
    ),
    Mutant(
        name="double-reduce-shared",
        code="M01",
        what="a shared expert sums its own output, and the stream sums it again",
        in_stream=_on_write("shared expert", _sum_too_early),
    ),
    Mutant(
        name="wrong-group",
        code="M02",
        what="an all-reduce over the wrong group of ranks",
        in_stream=_on_move(_sum_other_group),
    ),
    Mutant(
        name="missing-reduce",
        code="M03",
        what="partial sums are handed on, or scattered, without being summed",
        in_stream=_on_move(_skip_sum),
    ),
    Mutant(
        name="partial-declared-replicated",
        code="M03",
        what="the experts declare that they give R, and give addends",
        in_chain=_redeclared("experts", _gives_replicated),
    ),
    Mutant(
        name="one-axis-of-two",
        code="M04",
        what="a sum over two axes that is made over one of them",
        in_stream=_on_move(_sum_one_axis),
    ),
    Mutant(
        name="reduce-over-rows",
        code="M05",
        what="attention's output is summed over ranks that hold other rows",
        in_stream=_on_write("attention", _sum_over_rows),
    ),
    Mutant(
        name="gather-as-sum",
        code="M06",
        what="a gather made of zero padding and a sum, over ranks that hold copies",
        in_stream=_on_move(_gather_as_sum),
    ),
    Mutant(
        name="replicated-into-partial",
        code="M07",
        what="the experts' width is not sharded, but their output is summed as if it were",
        in_model=_whole_expert_width,
    ),
    Mutant(
        name="replicated-shared-expert",
        code="M07",
        what="a complete shared expert on every rank is added to addends before the sum",
        in_model=_whole_shared_expert,
    ),
    Mutant(
        name="unreduced-shared-expert",
        code="M08",
        what="a shared expert's addend joins after the sum of the routed experts",
        in_chain=_redeclared("shared expert", _gives_replicated),
    ),
    Mutant(
        name="uncompensated-scale",
        code="M09",
        what="attention's output is scaled by the group's size, and nothing scales it back",
        in_stream=_on_write(
            "attention", lambda s, _, x: x * s.plan.mesh.size_of(s.plan.mesh.attn_tp)
        ),
    ),
    Mutant(
        name="norm-on-partial",
        code="M10",
        what="the experts are fed from a norm over partial sums",
        in_chain=_redeclared("experts", _needs_partial),
    ),
    Mutant(
        name="layout-from-shape",
        code="M12",
        what="a gather is skipped where a rank's rows happen to be as many as all rows",
        in_stream=_on_move(_infer_from_shape),
    ),
    Mutant(
        name="ragged-offsets",
        code="M13",
        what="scattered rows are off by one",
        in_stream=_on_move(_roll_rows),
    ),
    Mutant(
        name="logits-of-wrong-rows",
        code="M13",
        what="the rows that get logits are off by one",
        in_stream=_shift_selection,
    ),
    Mutant(
        name="padding-leaks",
        code="M14",
        what="garbage in padding rows reaches their neighbours through a batch-wide operation",
        in_stream=_on_write("experts", _padding_leaks),
    ),
    Mutant(
        name="ids-in-other-order",
        code="M15",
        what="expert ids are gathered in another order than the rows they belong to",
        in_model=_on_local_ids(lambda ids: torch.roll(ids, 1, 0)),
    ),
    Mutant(
        name="bias-on-every-rank",
        code="M16",
        what="the output projection's bias is added on every rank before the sum",
        in_model=_bias_everywhere,
    ),
    Mutant(
        name="scale-twice",
        code="M17",
        what="the routed experts are scaled at two sites",
        in_stream=_on_write("experts", lambda _, __, x: x * 2),
    ),
    Mutant(
        name="rank-decides",
        code="M19",
        what="each rank picks its collective by its own number of rows",
        in_stream=_on_move(_rank_decides),
    ),
    Mutant(
        name="last-reduce-lost",
        code="M20",
        what="the last layer leaves its sum to a next layer, which does not exist",
        in_stream=_on_move(_skip_last_sum),
    ),
    Mutant(
        name="expert-owned-twice",
        code="M21",
        what="an expert map gives one expert to two ranks",
        in_model=_own(-1, when_first=False),
    ),
    Mutant(
        name="expert-unowned",
        code="M21",
        what="an expert map gives one expert to nobody",
        in_model=_own(1, when_first=True),
    ),
    Mutant(
        name="lost-slot",
        code="M22",
        what="the last of a token's experts is dropped",
        in_model=_on_local_ids(_lose_last_slot),
    ),
    Mutant(
        name="mispaired-weights",
        code="M22",
        what="routing weights are paired with other experts",
        in_model=_on_local_ids(lambda ids: ids.flip(1)),
    ),
    Mutant(
        name="idle-rank-returns",
        code="M23",
        what="a rank without tokens returns early and skips its collectives",
        in_stream=_on_move(_idle_rank_returns),
    ),
    Mutant(
        name="conditional-collective",
        code="M24",
        what="some ranks enter a collective of all ranks",
        in_stream=_on_write("attention", _extra_collective),
    ),
    Mutant(
        name="gather-of-full-rows",
        code="M25",
        what="rows that are already complete are gathered again",
        in_stream=_on_move(_gather_again),
    ),
)


def find_mutant(name: str) -> Mutant:
    """The mutant of that name.

    Raises:
        ConfigError: if there is none; lists them.
    """
    for mutant in MUTANTS:
        if mutant.name == name:
            return mutant
    raise ConfigError(f"mutant {name!r}: known are {', '.join(m.name for m in MUTANTS)}")


def __getattr__(name: str) -> Mutant:
    """Each mutant is an attribute too (`double_reduce`), so that the engine can import it."""
    for mutant in MUTANTS:
        if mutant.name.replace("-", "_") == name:
            return mutant
    raise AttributeError(name)
