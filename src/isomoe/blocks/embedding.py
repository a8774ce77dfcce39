"""The vocabulary's two ends: the embedding and the lm_head, both sharded over the vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Linear, Part
from isomoe.layout import (
    Axes,
    BlockSpec,
    Letter,
    Mesh,
    Move,
    Op,
    Seat,
    Variant,
    row_sharded,
)


def vocabulary_part(seat: Seat, axes: Axes, source: str, vocab_size: int) -> Part:
    """This rank's run of the vocabulary; the last ranks' runs are padded with zero rows."""
    width = -(-vocab_size // seat.mesh.size_of(axes))
    first = seat.index(axes) * width
    return Part(source, vocab_size, first, first + width)


class Lookup(Leaf):
    """Rows of this rank's part of the embedding; zeros for ids of other ranks."""

    def __init__(self, part: Part, hidden_size: int) -> None:
        self.part = part
        self.hidden_size = hidden_size
        self.weight: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.zeros(self.part.rows, self.hidden_size, dtype=dtype, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        columns = (slice(None), self.hidden_size)
        yield self.part.slices(self.weight, columns)

    def forward(self, *args: Any) -> Tensor:
        """ids: [T] int64 -> [T, hidden]."""
        (ids,) = args
        if self.part.rows >= self.part.size:
            return F.embedding(ids, self.weight)
        local = ids - self.part.start
        elsewhere = (local < 0) | (local >= self.part.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return found.masked_fill(elsewhere.unsqueeze(1), 0)


class Embedding(Block):
    """Token ids of an attention group to rows. Gives S over attn_dp, P over attn_tp."""

    def __init__(self, seat: Seat, name: str, vocab_size: int, hidden_size: int) -> None:
        mesh = seat.mesh
        self.lookup = Lookup(
            vocabulary_part(seat, mesh.attn_tp, f"{name}.weight", vocab_size), hidden_size
        )
        local = row_sharded(len(mesh.attn_dp), len(mesh.axes))
        variants = (Variant(None, local.put(Letter.P, mesh.attn_tp)),)
        self.spec = BlockSpec(name=name, kind="embedding", variants=variants)

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        """x: token ids [T] int64."""
        return self.lookup(x)


class LmHead(Block):
    """Rows that get logits to vocabulary-sharded logits.

    Needs R over lm_tp and gives C there. Its inner moves join the vocabulary over the axes of
    lm_tp that lie within an attention group, then trade features for rows over those along which
    groups differ: each rank ends with all logits of its own group.

    Args:
        tied: the name of the embedding's matrix where the two are one.
    """

    def __init__(
        self, seat: Seat, name: str, vocab_size: int, hidden_size: int, tied: str | None = None
    ) -> None:
        mesh = seat.mesh
        self.vocab_size = vocab_size
        part = vocabulary_part(seat, mesh.lm_tp, tied or name, vocab_size)
        self.project = Linear([part], hidden_size)
        needs = row_sharded(len(mesh.lm_dp), len(mesh.axes))
        gives = needs.put(Letter.C, mesh.lm_tp)
        self.spec = BlockSpec(
            name=name,
            kind="lm_head",
            variants=(Variant(needs, gives, _to_own_rows(mesh)),),
        )

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        """x: [rows, hidden] -> logits [rows of this rank's group, vocab], padding dropped."""
        return inner.collect(self.name, self.project(x))[:, : self.vocab_size]


def _to_own_rows(mesh: Mesh) -> tuple[Move, ...]:
    moves = []
    here = row_sharded(len(mesh.lm_dp), len(mesh.axes)).put(Letter.C, mesh.lm_tp)
    # Minor axes first, so that the vocabulary comes out in order.
    for op, letter, axes in (
        (Op.ALL_GATHER, Letter.R, tuple(a for a in mesh.lm_tp if a in mesh.attn_tp)),
        (Op.EXCHANGE, Letter.S, tuple(a for a in mesh.lm_tp if a in mesh.attn_dp)),
    ):
        if axes:
            there = here.put(letter, axes)
            moves.append(Move(op, axes, here, there))
            here = there
    return tuple(moves)
