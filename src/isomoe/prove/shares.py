"""What the ranks hold of each block: together the whole, each part once.

Shares are what a plan's moves do not depend on: moves add up whatever addends a placement says
are there. So shares are proven by themselves, on every layout, and moves by running plans.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from isomoe.blocks import (
    Batch,
    Block,
    ExpertWeights,
    RowLinear,
    SigmoidGate,
    SparseMoe,
    SquareSums,
)
from isomoe.kernels import choose
from isomoe.layout import Letter, Mesh
from isomoe.prove.provenance import LANES, Tickets, router_logits

_TOKENS = 32
"""Rows on which the experts' owners are compared."""


def share_of(block: Block) -> tuple[object, ...]:
    """What a rank holds of a block: equal for equal shares of one class, of models of any width."""
    held: list[object] = [type(block), block.spec.kind]
    for leaf in block.leaves():
        match leaf:
            case RowLinear():
                held += [Fraction(column, leaf.in_features) for column in leaf.columns]
                held += [leaf.has_bias, leaf.bias_here]
            case ExpertWeights():
                held += [Fraction(column, leaf.intermediate_size) for column in leaf.width]
                held += [leaf.owned, leaf.num_experts, leaf.names.has_bias and leaf.bias_here]
            case SquareSums():
                held += [Fraction(at, p.size) for p in leaf.parts for at in (p.start, p.stop)]
            case SigmoidGate():
                held.append("gate")
    if isinstance(block, SparseMoe):
        held.append(block.routing)
    return tuple(held)


def faults_of(mesh: Mesh, ranks: list[Block], tickets: Tickets) -> str | None:
    """What is wrong with the shares of one block, given on every rank; None if nothing is."""
    gives = ranks[0].spec.variants[0].gives
    shared = gives.where(Letter.P)
    by_index: dict[int, tuple[object, ...]] = {}
    for rank, block in enumerate(ranks):
        index, share = mesh.index(rank, shared), share_of(block)
        if by_index.setdefault(index, share) != share:
            return f"rank {rank} holds another part than ranks that it should be a copy of"
    first = [ranks[rank] for rank in mesh.group(0, shared)]
    checks: Iterator[Callable[[list[Block], Tickets], str | None]] = iter(
        (_experts, _owners) if isinstance(first[0], SparseMoe) else (_projections,)
    )
    return next((fault for check in checks if (fault := check(first, tickets))), None)


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
    blocks = cast(list[SparseMoe], group)
    one = blocks[0].experts
    found = torch.zeros(one.num_experts, LANES, dtype=torch.int64)
    biases = torch.zeros(one.num_experts, dtype=torch.int64)
    for block in blocks:
        owned = slice(*block.experts.owned)
        found[owned] += tickets.columns(one.name, *block.experts.width)
        biases[owned] += block.experts.bias_here
    whole = tickets.columns(one.name, 0, one.intermediate_size)
    if not bool((found == whole).all()):
        return "the columns of the experts on all ranks are not the whole, once"
    if one.names.has_bias and not bool((biases == 1).all()):
        return "the experts' biases are not added once"
    return None


def _owners(group: list[Block], tickets: Tickets) -> str | None:
    """Every chosen expert is found by the ranks that own it, under its number there."""
    blocks = cast(list[SparseMoe], group)
    count = blocks[0].num_experts
    rows = torch.arange(_TOKENS, dtype=torch.int64).unsqueeze(1) * 7919 + 1
    logits = router_logits(rows, blocks[0].router.parts[0].source, count)
    weights, ids = choose(logits, blocks[0].routing)
    batch = cast(Batch, SimpleNamespace(real_rows=lambda device: None))
    for block in {block.owned: block for block in blocks}.values():
        first, stop = block.owned
        found, local = block.route(logits, batch)
        mine = torch.where((ids >= first) & (ids < stop), ids - first, torch.full_like(ids, -1))
        if block.experts.owned != block.owned or not _same(local, mine, found, weights):
            return f"a rank that owns experts {first} to {stop} takes others"
    return None


def _same(local: Tensor, mine: Tensor, found: Tensor, weights: Tensor) -> bool:
    return torch.equal(local, mine) and torch.equal(found, weights)
