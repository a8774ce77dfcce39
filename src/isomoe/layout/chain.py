"""A model as the planner sees it: blocks with placements, and the norms that read between them."""

from dataclasses import dataclass, field
from itertools import pairwise

from isomoe.errors import PlacementError
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, Op
from isomoe.layout.placement import Letter, Placement


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a block: the placement of the rows it takes, and of what it gives.

    Attributes:
        needs: None for the embedding, which takes token ids.
        inner: moves that happen inside the block, or on its features behind it.
    """

    needs: Placement | None
    gives: Placement
    inner: tuple[Move, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """What a block declares.

    Attributes:
        name: its path in the checkpoint, for messages and the printed plan.
        kind: what it is; blocks of one kind and the same variants are planned alike.
        variants: the ways to run it with its weights sharded as they are.
        beside: whether it may run on a second stream, beside the others that are fed with it.
    """

    name: str
    kind: str
    variants: tuple[Variant, ...]
    beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpec:
    """A norm over the settled residual, and the blocks that its rows are delivered to.

    Attributes:
        name: the norm's path in the checkpoint.
        consumers: blocks in the order in which they write back.
        selects_rows: whether only the rows that get logits are still needed here.
    """

    name: str
    consumers: tuple[BlockSpec, ...]
    selects_rows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model: an embedding, then reads in order; the last read's consumer gives logits.

    Raises:
        PlacementError: for a declaration that cannot be right on any plan.
    """

    mesh: Mesh
    embedding: BlockSpec
    reads: tuple[ReadSpec, ...]
    hidden_size: int = field(default=0)

    def __post_init__(self) -> None:
        for variant in self.embedding.variants:
            self._check_gives(self.embedding, variant.gives, inside=False)
        for read in self.reads:
            for block in read.consumers:
                for variant in block.variants:
                    self._check_needs(block, variant.needs)
                    self._check_gives(block, variant.gives, inside=read is self.reads[-1])
                self._check_inner(block)

    @property
    def structure(self) -> object:
        """Equal for chains that have the same plans, but for names."""
        blocks = (self.embedding, *(block for read in self.reads for block in read.consumers))
        return (
            self.mesh.axes,
            self.mesh.attn_dp,
            self.mesh.parallelism.ep_num_redundant_experts > 0,
            self.hidden_size,
            tuple((block.kind, block.variants, block.beside) for block in blocks),
            tuple((len(read.consumers), read.selects_rows) for read in self.reads),
        )

    def _check_needs(self, block: BlockSpec, needs: Placement | None) -> None:
        if needs is None:
            raise PlacementError(f"{block.name}: takes rows, but declares no placement for them")
        self._check_length(block, needs)
        for letter, why in (
            (Letter.P, "a norm and what follows it may not run on a partial sum"),
            (Letter.C, "features are only sharded inside a block"),
        ):
            if needs.where(letter):
                axis = needs.where(letter)[0]
                raise PlacementError(f"{block.name}: needs {needs}, axis {axis} is {letter}: {why}")

    def _check_gives(self, block: BlockSpec, gives: Placement, inside: bool) -> None:
        self._check_length(block, gives)
        if gives.where(Letter.C) and not inside:
            axis = gives.where(Letter.C)[0]
            raise PlacementError(
                f"{block.name}: gives {gives}, axis {axis} is C: features may not leave a block"
            )
        if inside and gives.where(Letter.P):
            raise PlacementError(f"{block.name}: gives {gives}, a partial sum nobody would settle")

    def _check_inner(self, block: BlockSpec) -> None:
        """Inner moves lead from what the block takes to what it gives.

        They follow one another but where the block computes: on features of the rows that it took,
        or on rows that came to it and are now addends.
        """
        for variant in block.variants:
            if not variant.inner:
                continue
            first, last = variant.inner[0], variant.inner[-1]
            if Letter.C in first.before and variant.needs is not None:
                features = variant.needs.put(Letter.C, first.before.where(Letter.C))
                ends = [first.before in (features, variant.gives)]
            elif variant.needs is not None:
                ends = [first.before == variant.needs]
                if last.op is Op.COMBINE:
                    ends.append(last.after == variant.gives)
                elif first.op is Op.DISPATCH:
                    ends.append(False)
            else:
                ends = [first.before == variant.gives]
            joined = (
                one.after == two.before or two.op is Op.COMBINE
                for one, two in pairwise(variant.inner)
            )
            if not all(ends) or not all(joined):
                raise PlacementError(
                    f"{block.name}: needs {variant.needs} and gives {variant.gives}, but its inner "
                    f"moves are {', '.join(map(str, variant.inner))}"
                )

    def _check_length(self, block: BlockSpec, placement: Placement) -> None:
        if len(placement) != len(self.mesh.axes):
            raise PlacementError(
                f"{block.name}: placement {placement} has {len(placement)} letters, "
                f"the mesh {self.mesh.axes} has {len(self.mesh.axes)} axes"
            )
