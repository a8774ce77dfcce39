"""What the ranks hold of each block: together the whole, each part once.

Shares are what a plan's moves do not depend on: moves add up whatever addends a placement says
are there. So shares are proven by themselves, on every layout, and moves by running plans.
"""

from collections.abc import Callable
from fractions import Fraction
from random import Random
from types import SimpleNamespace
from typing import cast

import torch

from isomoe.blocks import (
    Batch,
    Block,
    Embedding,
    ExpertWeights,
    LmHead,
    Ownership,
    Part,
    RowLinear,
    SigmoidGate,
    SparseMoe,
    SquareSums,
    WideNormCore,
    runs,
)
from isomoe.kernels import choose
from isomoe.layout import ExpertMap, Letter, Mesh
from isomoe.prove.provenance import LANES, Tickets, router_logits

_TOKENS = 32
"""Rows on which the experts' owners are compared."""


def share_of(block: Block) -> tuple[object, ...]:
    """What a rank holds of a block: equal for equal shares of one class, of models of any width and
    number of experts."""
    held: list[object] = [type(block), block.spec.kind]
    for leaf in block.leaves():
        match leaf:
            case RowLinear():
                held += [Fraction(column, leaf.in_features) for column in leaf.columns]
                held += [leaf.has_bias, leaf.bias_here]
            case ExpertWeights():
                held += [Fraction(column, leaf.intermediate_size) for column in leaf.width]
                held += [Fraction(end, leaf.num_experts) for run in runs(leaf.held) for end in run]
                held.append(leaf.names.has_bias and leaf.bias_here)
            case SquareSums():
                held += [Fraction(at, p.size) for p in leaf.parts for at in (p.start, p.stop)]
            case WideNormCore():
                held.append(leaf.copies)
            case SigmoidGate():
                held.append("gate")
    part = _vocabulary_part(block)
    if part is not None:
        held += [part.start, part.stop, part.size]
    return tuple(held)


def faults_of(mesh: Mesh, ranks: list[Block], tickets: Tickets) -> str | None:
    """What is wrong with the shares of one block, given on every rank; None if nothing is."""
    gives = ranks[0].spec.variants[0].gives
    if isinstance(ranks[0], SparseMoe):  # which may have summed, and give S
        shared = mesh.all
    else:
        shared = gives.where(Letter.C if isinstance(ranks[0], LmHead) else Letter.P)
    by_index: dict[int, tuple[object, ...]] = {}
    for rank, block in enumerate(ranks):
        index, share = mesh.index(rank, shared), share_of(block)
        if by_index.setdefault(index, share) != share:
            return f"rank {rank} holds another part than ranks that it should be a copy of"
    group = [ranks[rank] for rank in mesh.group(0, shared)]
    return next((fault for check in _checks(group[0]) if (fault := check(group, tickets))), None)


_Check = Callable[[list[Block], Tickets], str | None]


def _checks(block: Block) -> list[_Check]:
    """What is checked of a block's shares: something of every block."""
    if _vocabulary_part(block) is not None:
        return [_vocabulary]
    if isinstance(block, SparseMoe):
        return [_experts, _owners]
    assert _projections_of(block), f"the proof cannot add up the shares of {block.name}"
    return [_projections, _squares]


def _vocabulary_part(block: Block) -> Part | None:
    """A rank's run of the vocabulary; None for a block that is not sharded over it."""
    match block:
        case Embedding():
            return block.lookup.part
        case LmHead():
            return block.project.parts[0]
    return None


def _vocabulary(group: list[Block], tickets: Tickets) -> str | None:
    parts = [part for block in group if (part := _vocabulary_part(block)) is not None]
    bounds = [0, *(part.stop for part in parts)]
    if [part.start for part in parts] != bounds[:-1] or bounds[-1] < parts[0].size:
        return "the vocabulary on all ranks, in their order, is not the whole, once"
    return None


def _squares(group: list[Block], tickets: Tickets) -> str | None:
    """The statistic of a norm over all heads: every query head, and copies of a KV head once."""
    cores = [leaf for block in group for leaf in block.leaves() if isinstance(leaf, WideNormCore)]
    for index, step in enumerate((1, cores[0].copies) if cores else ()):
        parts = [core.parts[index] for core in cores[::step]]
        found = torch.stack([tickets.columns(p.source, p.start, p.stop) for p in parts]).sum(0)
        if not torch.equal(found, tickets.columns(parts[0].source, 0, parts[0].size)):
            return f"the heads behind {parts[0].source} on all ranks are not the whole, once"
    return None


def _projections(group: list[Block], tickets: Tickets) -> str | None:
    for leaves in zip(*(_projections_of(block) for block in group), strict=True):
        one = leaves[0]
        name = one.parts[0].source
        found = torch.stack([tickets.columns(name, *leaf.columns) for leaf in leaves]).sum(0)
        if not torch.equal(found, tickets.columns(name, 0, one.in_features)):
            return f"the columns of {name} on all ranks are not the whole, once"
        if one.has_bias and sum(leaf.bias_here for leaf in leaves) != 1:
            return f"the bias of {name} is not added once"
    return None


def _projections_of(block: Block) -> list[RowLinear]:
    return [leaf for leaf in block.leaves() if isinstance(leaf, RowLinear)]


def _experts(group: list[Block], tickets: Tickets) -> str | None:
    """Every physical expert is whole, once, and the copy that all ranks take it for."""
    blocks = cast(list[SparseMoe], group)
    one, location = blocks[0].experts, blocks[0].ownership.location
    found = torch.zeros(location.num_physical, LANES, dtype=torch.int64)
    biases = torch.zeros(location.num_physical, dtype=torch.int64)
    for block in blocks:
        own = block.ownership
        if own.location != location or block.experts.held != own.held:
            return "ranks do not agree on which expert is where"
        found[own.first : own.stop] += tickets.columns(one.name, *block.experts.width)
        biases[own.first : own.stop] += block.experts.bias_here
    whole = tickets.columns(one.name, 0, one.intermediate_size)
    if not bool((found == whole).all()):
        return "the columns of the experts on all ranks are not the whole, once"
    if one.names.has_bias and not bool((biases == 1).all()):
        return "the experts' biases are not added once"
    return None


def _owners(group: list[Block], tickets: Tickets) -> str | None:
    """Every chosen expert is found by one owner, in a slot that holds it."""
    blocks = cast(list[SparseMoe], group)
    count = blocks[0].num_experts
    rows = torch.arange(_TOKENS, dtype=torch.int64).unsqueeze(1) * 7919 + 1
    logits = router_logits(rows, blocks[0].router.parts[0].source, count)
    weights, ids = choose(logits, blocks[0].routing)
    every = SimpleNamespace(span=lambda rank, row_axes: (0, _TOKENS))
    batch = cast(Batch, SimpleNamespace(real_rows=lambda device: None, rows=every, rank=0))
    one_of_each = {block.ownership.first: block for block in blocks}.values()
    ranks = [block.ownership for block in one_of_each]
    shuffled = [Ownership(_shuffled(own.location), own.first, own.stop) for own in ranks]
    for ownerships in (ranks, shuffled):
        if not _serve_each_once(ownerships):
            return "a copy of an expert is served other than once, where it is"
    for block in one_of_each:
        found, slots = block.route(logits, batch)
        served, physical = block.choose(logits, batch, row_axes=0)
        if not torch.equal(slots, block.ownership.slots(physical)):
            return "rows that were gathered and rows that were sent find other experts"
        held = torch.tensor([*block.experts.held, -1])
        right = (slots < 0) | (held[slots] == ids)
        if not (bool(right.all()) and torch.equal(found, weights) and torch.equal(served, weights)):
            return f"a rank that holds experts {block.experts.held} takes others"
    return None


def _serve_each_once(ranks: list[Ownership]) -> bool:
    """Whether every expert, in as many rows as any has copies, is found in one slot that holds it;
    and all copies take turns."""
    location = ranks[0].location
    copies = [len(some) for some in location.copies]
    ids = torch.arange(location.num_logical).repeat(max(copies), 1)
    physical = ranks[0].copies_for(ids, first_row=0)
    owners = torch.zeros_like(ids)
    for own in ranks:
        slots = own.slots(physical)
        held = torch.tensor([*own.held, -1])
        if not bool(((slots < 0) | (held[slots] == ids)).all()):
            return False
        owners += slots >= 0
    turns = [len(set(column)) for column in physical.T.tolist()]
    return bool((owners == 1).all()) and turns == copies


def _shuffled(location: ExpertMap) -> ExpertMap:
    """Another placement of as many copies, as a file may say it: in no order, copies of a few."""
    extra = location.num_physical - location.num_logical
    every = [*range(location.num_logical), *(index // 2 for index in range(extra))]
    Random(location.num_physical).shuffle(every)
    return ExpertMap(tuple(every), location.num_logical)
