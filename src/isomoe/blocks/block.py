"""What a block is: leaves, and a declaration of the placements it takes and gives."""

from collections.abc import Iterator
from functools import cache
from typing import Protocol

from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.leaf import Leaf
from isomoe.layout import Axes, BlockSpec, Letter, Mesh, Move, Variant, row_sharded

Routed = tuple[tuple[Tensor, ...], Tensor, Tensor]
"""Hidden states in the wire format, [T, K] int32 physical experts (-1: none), [T, K] weights."""


class Inner(Protocol):
    """Carries out the inner moves that the named block declares: the residual stream does."""

    def inner(self, block: str) -> tuple[Move, ...]:
        """Those of the variant that the plan has chosen."""

    def collect(self, block: str, features: Tensor) -> Tensor:
        """On features that it shards."""

    def spread(self, block: str, rows: Routed, per_rank: int) -> Routed:
        """On rows that have chosen experts, of which each rank has `per_rank`."""

    def unite(self, block: str, out: Tensor) -> Tensor:
        """On what came of those rows."""


class Block:
    """A piece of a model between two touches of the residual stream.

    Attributes:
        spec: the name and the placements it declares; all that planner and stream know of it.
    """

    spec: BlockSpec

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        """x: [rows, hidden] in the placement it needs -> [rows, hidden] in the one it gives."""
        raise NotImplementedError(type(self).__name__)

    @property
    def name(self) -> str:
        """The block's path in the checkpoint."""
        return self.spec.name

    def leaves(self) -> Iterator[Leaf]:
        """Its leaves, in the order in which they were made."""
        return (part for part in vars(self).values() if isinstance(part, Leaf))


def rowwise_variants(mesh: Mesh, weights: Axes) -> tuple[Variant, ...]:
    """The placements of a block that treats rows alike, with its weights sharded over `weights`.

    Rows may be sharded over any leading axes on which the weights are replicated; each rank then
    gives an addend for the rows it took. One variant for each number of row-sharded axes.
    """
    return _rowwise_variants(len(mesh.axes), weights)


@cache
def _rowwise_variants(axes: int, weights: Axes) -> tuple[Variant, ...]:
    free = min(weights, default=axes)
    needs = (row_sharded(prefix, axes) for prefix in range(free + 1))
    return tuple(Variant(need, need.put(Letter.P, weights)) for need in needs)
