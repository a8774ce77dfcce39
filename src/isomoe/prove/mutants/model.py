"""Mutants of one rank's model: shares that are too large, too small or another rank's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks import (
    Block,
    ExpertWeights,
    GatedMLP,
    Ownership,
    Part,
    RowLinear,
    SparseMoe,
    WideNormCore,
)
from isomoe.blocks.embedding import vocabulary_part
from isomoe.kernels import split_heads
from isomoe.layout import Axes, Mesh
from isomoe.models import CausalLM
from isomoe.prove.mutants.base import ATTENTION, EMBEDDING, EXPERTS, SHARED, Mutant, Needs

InModel = Callable[[CausalLM], None]


def _experts(model: CausalLM) -> Iterator[SparseMoe]:
    return (block for block in model.blocks() if isinstance(block, SparseMoe))


def _of_kind(model: CausalLM, kind: str) -> Iterator[Block]:
    return (block for block in model.blocks() if block.spec.kind == kind)


def _bias_everywhere(model: CausalLM) -> None:
    for block in _of_kind(model, ATTENTION):
        for leaf in block.leaves():
            if isinstance(leaf, RowLinear):
                leaf.bias_here = True


def _expert_bias_everywhere(model: CausalLM) -> None:
    for block in _experts(model):
        block.experts.bias_here = True


class _UnweightedBias(ExpertWeights):
    """Experts that add their bias whole, whatever their weight in a row."""

    def __call__(self, *args: Any) -> Tensor:
        x, local_ids, weights = args
        out = super().__call__(x, local_ids, weights)
        if isinstance(x, Tensor) and not x.is_floating_point():
            # Provenance: what experts give for zeros is their bias.
            zeros, ones = torch.zeros_like(x), torch.ones_like(weights)
            whole = super().__call__(zeros, local_ids, ones)
            return out + whole - super().__call__(zeros, local_ids, weights)
        bias = self.form.down_bias
        if bias is None:
            return out
        each = torch.cat([bias, bias.new_zeros((1, bias.shape[1]))])[local_ids].float()
        added: Tensor = (each * (1 - weights).unsqueeze(-1)).sum(1)
        return out + added


def _unweighted_bias(model: CausalLM) -> None:
    for block in _experts(model):
        block.experts.__class__ = _UnweightedBias  # keeps all that it has been given


def _whole_expert_width(model: CausalLM) -> None:
    for block in _experts(model):
        block.experts.width = (0, block.experts.intermediate_size)


def _shared_over(axes_of: Callable[[Mesh], Axes]) -> InModel:
    """Shards the shared experts' width over other ranks than those that sum it."""

    def in_model(model: CausalLM) -> None:
        for block in _of_kind(model, SHARED):
            assert isinstance(block, GatedMLP)
            size, mesh = block.down.in_features, model.seat.mesh
            first, stop = model.seat.shard(size, axes_of(mesh), "columns")
            block.down.columns = (first, stop)
            block.gate_up.parts = tuple(
                Part(part.source, part.size, first, stop) for part in block.gate_up.parts
            )

    return in_model


def _embedding_over_all_ranks(model: CausalLM) -> None:
    lookup = model.embedding.lookup
    lookup.part = vocabulary_part(
        model.seat, model.seat.mesh.all, lookup.part.source, lookup.part.size
    )


def _own(first_by: int, when_first: bool) -> InModel:
    """Moves the start of a rank's experts, on the ranks that own (or do not own) expert 0."""

    def in_model(model: CausalLM) -> None:
        for block in _experts(model):
            own = block.ownership
            if (own.first == 0) == when_first:
                _hold(block, own.first + first_by, own.stop)

    return in_model


def _half_of_the_experts(model: CausalLM) -> None:
    for block in _experts(model):
        own = block.ownership
        _hold(block, own.first, (own.first + own.stop) // 2)


def _hold(block: SparseMoe, first: int, stop: int) -> None:
    """Gives a rank another run of the experts."""
    block.ownership = Ownership(block.ownership.location, first, stop)
    block.experts.held = block.ownership.held


def _on_slots(change: Callable[[Tensor, SparseMoe], Tensor]) -> InModel:
    """Passes the slots of a rank's experts (-1: another's) through `change`."""

    def in_model(model: CausalLM) -> None:
        for block in _experts(model):
            _change_slots(block, change)

    return in_model


def _change_slots(block: SparseMoe, change: Callable[[Tensor, SparseMoe], Tensor]) -> None:
    class Changed(type(block.experts)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Tensor:
            x, slots, weights = args
            out: Tensor = super().__call__(x, change(slots, block), weights)
            return out

    block.experts.__class__ = Changed  # keeps all that it has been given


def _lose_last_slot(ids: Tensor, block: SparseMoe) -> Tensor:
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], -1)], dim=1)


def _double_first_slot(ids: Tensor, block: SparseMoe) -> Tensor:
    return torch.cat([ids[:, :1], ids[:, :1], ids[:, 2:]], dim=1)


def _stale_map(ids: Tensor, block: SparseMoe) -> Tensor:
    count = len(block.experts.held)
    return torch.where(ids < 0, ids, (ids + 1) % count)


def _sentinel_is_a_slot(ids: Tensor, block: SparseMoe) -> Tensor:
    return ids.clamp(min=0)


def _own_statistic(model: CausalLM) -> None:
    for block in model.blocks():
        for leaf in block.leaves():
            if isinstance(leaf, WideNormCore):
                leaf.totals = _own_share(leaf, model)  # type: ignore[method-assign, assignment]


def _own_share(core: WideNormCore, model: CausalLM) -> Callable[[Tensor], Tensor]:
    """The mean over this rank's heads stands for that over all."""
    index = model.seat.index(model.seat.mesh.attn_tp)
    of_q, of_k = (part.size // part.rows for part in core.parts)

    def totals(gathered: Tensor) -> Tensor:
        each = split_heads(gathered, of_q)[:, index]
        q, k = each.chunk(2, dim=-1)
        return torch.cat((q * of_q, k * of_k), -1)

    return totals


def _count_copies(model: CausalLM) -> None:
    for block in model.blocks():
        for leaf in block.leaves():
            if isinstance(leaf, WideNormCore):
                leaf.copies = 1


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="embedding-over-all-ranks",
        code="M02",
        what="the embedding is sharded over all ranks, and summed over attention's alone",
        block=EMBEDDING,
        in_model=_embedding_over_all_ranks,
    ),
    Mutant(
        name="experts-of-missing-ranks",
        code="M02",
        what="the experts are dealt out over more ranks than those that sum them",
        block=EXPERTS,
        in_model=_half_of_the_experts,
    ),
    Mutant(
        name="replicated-into-partial",
        code="M07",
        what="the experts' width is not sharded, but their output is summed as if it were",
        block=EXPERTS,
        in_model=_whole_expert_width,
    ),
    Mutant(
        name="replicated-shared-expert",
        code="M07",
        what="a complete shared expert on every rank is added to addends before the sum",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_model=_shared_over(lambda mesh: ()),
    ),
    Mutant(
        name="shared-expert-over-fewer-ranks",
        code="M07",
        what="a shared expert is sharded over fewer ranks than those that sum it",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_model=_shared_over(lambda mesh: mesh.attn_tp),
    ),
    Mutant(
        name="norm-of-own-heads",
        code="M11",
        what="a norm over all heads takes its statistic from a rank's own heads",
        block=ATTENTION,
        needs=Needs.WIDE_NORM,
        model="minimax-m2",
        in_model=_own_statistic,
    ),
    Mutant(
        name="norm-counts-copies",
        code="M11",
        what="a norm over all heads counts KV heads as often as ranks hold them",
        block=ATTENTION,
        needs=Needs.WIDE_NORM,
        model="minimax-m2",
        layout="tp4",
        in_model=_count_copies,
    ),
    Mutant(
        name="ids-in-other-order",
        code="M15",
        what="expert ids are gathered in another order than the rows they belong to",
        block=EXPERTS,
        in_model=_on_slots(lambda ids, _: torch.roll(ids, 1, 0)),
    ),
    Mutant(
        name="bias-on-every-rank",
        code="M16",
        what="the output projection's bias is added on every rank before the sum",
        block=ATTENTION,
        needs=Needs.OUTPUT_BIAS,
        model="gpt-oss-20b",
        in_model=_bias_everywhere,
    ),
    Mutant(
        name="expert-bias-on-every-rank",
        code="M16",
        what="an expert's bias is added on every rank that holds a part of the expert",
        block=EXPERTS,
        needs=Needs.EXPERT_BIAS,
        model="gpt-oss-20b",
        in_model=_expert_bias_everywhere,
    ),
    Mutant(
        name="unweighted-expert-bias",
        code="M18",
        what="an expert's bias is added whole, whatever the expert's weight",
        block=EXPERTS,
        needs=Needs.EXPERT_BIAS,
        model="gpt-oss-20b",
        in_model=_unweighted_bias,
    ),
    Mutant(
        name="expert-owned-twice",
        code="M21",
        what="an expert map gives one expert to two ranks",
        block=EXPERTS,
        in_model=_own(-1, when_first=False),
    ),
    Mutant(
        name="expert-unowned",
        code="M21",
        what="an expert map gives one expert to nobody",
        block=EXPERTS,
        in_model=_own(1, when_first=True),
    ),
    Mutant(
        name="stale-expert-map",
        code="M21",
        what="a map of experts to slots is older than the slots' weights",
        block=EXPERTS,
        in_model=_on_slots(_stale_map),
    ),
    Mutant(
        name="lost-slot",
        code="M22",
        what="the last of a token's experts is dropped",
        block=EXPERTS,
        in_model=_on_slots(_lose_last_slot),
    ),
    Mutant(
        name="doubled-slot",
        code="M22",
        what="a token's first expert stands twice in its list, and replaces the second",
        block=EXPERTS,
        needs=Needs.SEVERAL_EXPERTS,
        in_model=_on_slots(_double_first_slot),
    ),
    Mutant(
        name="mispaired-weights",
        code="M22",
        what="routing weights are paired with other experts",
        block=EXPERTS,
        needs=Needs.SEVERAL_EXPERTS,
        in_model=_on_slots(lambda ids, _: ids.flip(1)),
    ),
    Mutant(
        name="sentinel-is-a-slot",
        code="M22",
        what="the mark of another rank's expert is taken for a rank's first one",
        block=EXPERTS,
        in_model=_on_slots(_sentinel_is_a_slot),
    ),
)
