"""How checkpoints store experts.  E experts, H hidden size, I width of an expert."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from torch import Tensor

from isomoe.blocks.leaf import WeightSlice

_ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShard:
    """What a rank holds of a layer's experts, to be filled.

    Attributes:
        held: the expert in each slot.
        width: [start, stop) of each expert's columns.
        gate, up: [L, I, H]; down: [L, H, I]; of this rank.
        gate_up_bias, down_bias: [L, 2I] and [L, H], or None.
        bias_here: whether this rank adds the down projections' bias.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    held: tuple[int, ...]
    width: tuple[int, int]
    gate: Tensor
    up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    bias_here: bool

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Runs of slots that hold neighbouring experts, and those experts."""
        slot = 0
        for first, stop in runs(self.held):
            yield slice(slot, slot + stop - first), slice(first, stop)
            slot += stop - first


def runs(held: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of the experts in neighbouring slots, as long as they are neighbours too."""
    found: list[tuple[int, int]] = []
    for expert in held:
        if found and found[-1][1] == expert:
            found[-1] = (found[-1][0], expert + 1)
        else:
            found.append((expert, expert + 1))
    return found


class ExpertNames(ABC):
    """A way to store experts.

    Attributes:
        has_bias: whether the projections have biases.
    """

    has_bias: bool = False

    def grain(self, block: int, width: int, whole: int) -> int:
        """Columns of a shard that share a scale, wherever it starts, of blocks of `block`."""
        return block if width == whole else gcd(block, width)

    @abstractmethod
    def slices(self, shard: ExpertShard) -> Iterator[WeightSlice]:
        """Where the shard's tensors come from."""


@dataclass(frozen=True)
class PerExpert(ExpertNames):
    """A matrix for each expert and projection: `experts.7.gate_proj.weight` [I, H], down [H, I]."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def slices(self, shard: ExpertShard) -> Iterator[WeightSlice]:
        mine = slice(*shard.width)
        full = (shard.intermediate_size, shard.hidden_size)
        absent = set(range(shard.num_experts)) - set(shard.held)
        for slot, expert in (*enumerate(shard.held), *((0, expert) for expert in sorted(absent))):
            for which, shape, index, out in (
                (self.gate, full, (mine, _ALL), shard.gate[slot]),
                (self.up, full, (mine, _ALL), shard.up[slot]),
                (self.down, full[::-1], (_ALL, mine), shard.down[slot]),
            ):
                kept = WeightSlice(f"{shard.name}.{expert}.{which}.weight", shape, index, out)
                yield kept.nothing() if expert in absent else kept


@dataclass(frozen=True)
class Stacked(ExpertNames):
    """A tensor for each projection: `gate_proj.weight` and `up_proj.weight` [E, I, H],
    `down_proj.weight` [E, H, I]."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def slices(self, shard: ExpertShard) -> Iterator[WeightSlice]:
        mine = slice(*shard.width)
        shape = (shard.num_experts, shard.intermediate_size, shard.hidden_size)
        for slots, experts in shard.parts():
            for which, out in ((self.gate, shard.gate), (self.up, shard.up)):
                name, index = f"{shard.name}.{which}.weight", (experts, mine, _ALL)
                yield WeightSlice(name, shape, index, out[slots])
            yield WeightSlice(
                f"{shard.name}.{self.down}.weight",
                (shape[0], shape[2], shape[1]),
                (experts, _ALL, mine),
                shard.down[slots],
            )


@dataclass(frozen=True)
class Transposed(ExpertNames):
    """Two tensors: `gate_up_proj` [E, H, 2I] and `down_proj` [E, I, H].

    Attributes:
        interleaved: gate and up take turns, column by column, instead of halves.
        has_bias: `gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, H] exist too.
    """

    interleaved: bool = False
    has_bias: bool = False

    def grain(self, block: int, width: int, whole: int) -> int:
        """Finer where gate and up, in one matrix, have columns of both in a block."""
        return gcd(super().grain(block, width, whole), block // 2 if self.interleaved else whole)

    def slices(self, shard: ExpertShard) -> Iterator[WeightSlice]:
        mine = slice(*shard.width)
        count, width, hidden = shard.num_experts, shard.intermediate_size, shard.hidden_size
        both, down = f"{shard.name}.gate_up_proj", f"{shard.name}.down_proj"
        halves = list(zip(self._columns(shard), (shard.gate, shard.up), strict=True))
        for slots, experts in shard.parts():
            for columns, out in halves:
                index = (experts, _ALL, columns)
                part = out[slots].transpose(1, 2)
                yield WeightSlice(both, (count, hidden, 2 * width), index, part)
            part = shard.down[slots].transpose(1, 2)
            yield WeightSlice(down, (count, width, hidden), (experts, mine, _ALL), part)
            if shard.gate_up_bias is not None and shard.down_bias is not None:
                biases = shard.gate_up_bias.chunk(2, dim=1)
                for columns, out in zip(self._columns(shard), biases, strict=True):
                    name, shape = f"{both}_bias", (count, 2 * width)
                    yield WeightSlice(name, shape, (experts, columns), out[slots])
                whole = (experts, _ALL)
                bias = WeightSlice(f"{down}_bias", (count, hidden), whole, shard.down_bias[slots])
                yield bias if shard.bias_here else bias.nothing()

    def _columns(self, shard: ExpertShard) -> tuple[slice, slice]:
        """Those of gate, and of up."""
        first, stop = shard.width
        if self.interleaved:
            return slice(2 * first, 2 * stop, 2), slice(2 * first + 1, 2 * stop, 2)
        width = shard.intermediate_size
        return slice(first, stop), slice(width + first, width + stop)


PER_EXPERT = PerExpert()
