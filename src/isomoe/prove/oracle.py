"""What each row must hold, worked out from the model on one rank: no layout, move or stream."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from isomoe.blocks import Block, GatedMLP, RowLinear, SparseMoe
from isomoe.kernels import choose
from isomoe.layout import Mesh
from isomoe.models import CausalLM
from isomoe.prove.cases import Case
from isomoe.prove.provenance import LANES, Tickets, logit_factors, router_logits


@dataclass(frozen=True, slots=True)
class View:
    """The rows that one rank must hold.

    Attributes:
        numbers: which rows, numbered over all groups.
        rows: [n, LANES], what they must be.
        tags: [n, LANES], what a norm hands out for them.
        real: [n, 1] bool, False for padding; None if none is padding.
    """

    numbers: list[int]
    rows: Tensor
    tags: Tensor
    real: Tensor | None


@dataclass
class Expected:
    """The right rows of one case, at every read.

    Rows are numbered over all attention-DP groups, padding included; what padding should hold is
    undefined.

    Attributes:
        residual: for each read, [rows, LANES].
        tags: for each read, what its norm hands out.
        real: [rows] bool.
        chosen: numbers of the rows that get logits, in order.
        contributions: block contributions so far, counted for the summary.
    """

    model: CausalLM
    mesh: Mesh
    case: Case
    tickets: Tickets
    residual: list[Tensor] = field(default_factory=list)
    tags: list[Tensor] = field(default_factory=list)
    contributions: int = 0

    def __post_init__(self) -> None:
        self.groups = []
        first = 0
        for held in self.case.padded:
            self.groups.append(list(range(first, first + held)))
            first += held
        self.real = torch.zeros(sum(self.case.padded), dtype=torch.bool)
        for rows, count in zip(self.groups, self.case.real, strict=True):
            self.real[rows[:count]] = True
        self.chosen = [
            rows[row]
            for rows, picks in zip(self.groups, self.case.chosen, strict=True)
            for row in picks
        ]
        self._is_chosen = set(self.chosen)
        self._views: dict[tuple[int, int, int, bool], View] = {}
        self._shares = [
            share for rows in self.groups for share in _cut(rows, self.mesh.parallelism.attn_tp)
        ]
        self._compute()

    @property
    def ids(self) -> Tensor:
        """Token ids, a different one for each real row: [rows]."""
        return torch.where(self.real, torch.arange(1, len(self.real) + 1), 0)

    def group_of(self, rank: int) -> list[int]:
        """The rows of `rank`'s attention-DP group."""
        return self.groups[rank // self.mesh.parallelism.attn_tp]

    def view(self, read: int, rank: int, row_axes: int, selected: bool) -> View:
        """What `rank` must hold at a read when the first `row_axes` axes are row-sharded."""
        stride = prod(self.mesh.axes[row_axes:])
        first = rank // stride * stride
        key = (read, first, stride, selected)
        if key not in self._views:
            rows = [row for share in self._shares[first : first + stride] for row in share]
            if selected:
                rows = [row for row in rows if row in self._is_chosen]
            self._views[key] = self._view(self.residual[read], self.tags[read], rows)
        return self._views[key]

    def attention_view(self, read: int, rank: int) -> View:
        """What must reach the attention of `rank`'s group behind a read."""
        key = (read, rank // self.mesh.parallelism.attn_tp, 0, False)
        if key not in self._views:
            tags = self.tags[read]
            self._views[key] = self._view(tags, tags, self.group_of(rank))
        return self._views[key]

    def _view(self, rows: Tensor, tags: Tensor, numbers: list[int]) -> View:
        real = self.real[numbers].unsqueeze(1)
        padded = not bool(real.all())
        return View(numbers, rows[numbers], tags[numbers], real if padded else None)

    def logits(self, rank: int) -> Tensor:
        """The logits of the selected rows of `rank`'s group: [rows, vocab]."""
        mine = set(self.group_of(rank))
        rows = [row for row in self.chosen if row in mine]
        return self.tags[-1][rows][:, :1] * logit_factors(self.model.config["vocab_size"])

    def _compute(self) -> None:
        table = self.tickets.ids(self.model.embedding.name, self.model.config["vocab_size"])
        total = table[self.ids]
        for norm_blocks in self._blocks_by_read():
            self.residual.append(total)
            tags = self.tickets.tag(total)
            self.tags.append(tags)
            for block in norm_blocks:
                total = total + self._contribution(block, tags)

    def _blocks_by_read(self) -> Iterator[tuple[Block, ...]]:
        for layer in self.model.layers:
            yield (layer.attn,)
            yield layer.ffn
        yield ()

    def _contribution(self, block: Block, tags: Tensor) -> Tensor:
        """What a whole block adds to each row: [rows, LANES]."""
        tickets = self.tickets
        match block:
            case GatedMLP(down=down, gate=gate):
                added = self._projected(down, tags)
                if gate is not None:
                    added = added * tickets.tag(tags * tickets.once(gate.parts[0].source))
                return added
            case SparseMoe(experts=experts, router=router):
                logits = router_logits(tags, router.parts[0].source, block.num_experts)
                weights, ids = choose(logits, block.routing)
                factors = tickets.routing_weight(weights)
                added = torch.zeros(len(tags), LANES, dtype=torch.int64)
                for row, slots in enumerate(ids.tolist()):
                    for slot, expert in enumerate(slots):
                        whole = tickets.columns(
                            f"{experts.name}.{expert}", 0, experts.intermediate_size
                        )
                        added[row] += whole * factors[row, slot]
                        self.contributions += 1
                added = added * tags
                if experts.names.has_bias:
                    bias = [tickets.once(f"{experts.name}.{e} bias") for e in range(len(logits[0]))]
                    added = added + (torch.stack(bias)[ids] * factors).sum(1)
                return added
        return self._projected(projection_of(block), tags)

    def _projected(self, output: RowLinear, tags: Tensor) -> Tensor:
        """What a projection of all columns adds."""
        self.contributions += len(tags)
        name = output.parts[0].source
        added = tags * self.tickets.columns(name, 0, output.in_features)
        return added + self.tickets.once(f"{name} bias") if output.has_bias else added


def _cut(rows: list[int], ways: int) -> list[list[int]]:
    """`rows` in `ways` runs of almost equal length: the first len % ways are one longer."""
    size, longer = divmod(len(rows), ways)
    bounds = [part * size + min(part, longer) for part in range(ways + 1)]
    return [rows[start:stop] for start, stop in itertools.pairwise(bounds)]


def summed_leaf(block: Block) -> str:
    """The name under which a block's contribution has its tickets."""
    if isinstance(block, SparseMoe):
        return block.experts.name
    return projection_of(block).parts[0].source


def projection_of(block: Block) -> RowLinear:
    """The projection through which all of a block's output comes.

    Raises:
        TypeError: if it has none, or several: the proof does not know what it contributes.
    """
    found = [leaf for leaf in block.leaves() if isinstance(leaf, RowLinear)]
    if len(found) != 1:
        raise TypeError(f"the proof does not know what a {type(block).__name__} contributes")
    return found[0]
