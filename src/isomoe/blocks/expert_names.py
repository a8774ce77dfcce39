"""How checkpoints store experts.  E experts, H hidden size, I width of an expert."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from isomoe.blocks.leaf import WeightSlice

_ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShard:
    """What a rank holds of a layer's experts, to be filled.

    Attributes:
        owned, width: [start, stop) of the experts, and of each one's columns.
        gate_up: [L, 2I, H], gate first; down: [L, H, I]; of this rank.
        gate_up_bias, down_bias: [L, 2I] and [L, H], or None.
        bias_here: whether this rank adds the down projections' bias.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    owned: tuple[int, int]
    width: tuple[int, int]
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    bias_here: bool


class ExpertNames(ABC):
    """A way to store experts.

    Attributes:
        has_bias: whether the projections have biases.
    """

    has_bias: bool = False

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
        for expert in range(shard.num_experts):
            here = shard.owned[0] <= expert < shard.owned[1]
            local = expert - shard.owned[0] if here else 0
            gate, up = shard.gate_up[local].chunk(2)
            for which, shape, index, out in (
                (self.gate, full, (mine, _ALL), gate),
                (self.up, full, (mine, _ALL), up),
                (self.down, full[::-1], (_ALL, mine), shard.down[local]),
            ):
                kept = WeightSlice(f"{shard.name}.{expert}.{which}.weight", shape, index, out)
                yield kept if here else kept.nothing()


@dataclass(frozen=True)
class Stacked(ExpertNames):
    """A tensor for each projection: `gate_proj.weight` and `up_proj.weight` [E, I, H],
    `down_proj.weight` [E, H, I]."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def slices(self, shard: ExpertShard) -> Iterator[WeightSlice]:
        owned, mine = slice(*shard.owned), slice(*shard.width)
        shape = (shard.num_experts, shard.intermediate_size, shard.hidden_size)
        gate, up = shard.gate_up.chunk(2, dim=1)
        for which, out in ((self.gate, gate), (self.up, up)):
            yield WeightSlice(f"{shard.name}.{which}.weight", shape, (owned, mine, _ALL), out)
        yield WeightSlice(
            f"{shard.name}.{self.down}.weight",
            (shape[0], shape[2], shape[1]),
            (owned, _ALL, mine),
            shard.down,
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

    def slices(self, shard: ExpertShard) -> Iterator[WeightSlice]:
        owned, mine = slice(*shard.owned), slice(*shard.width)
        experts, width, hidden = shard.num_experts, shard.intermediate_size, shard.hidden_size
        both = f"{shard.name}.gate_up_proj"
        for columns, out in zip(self._columns(shard), shard.gate_up.chunk(2, dim=1), strict=True):
            yield WeightSlice(
                both, (experts, hidden, 2 * width), (owned, _ALL, columns), out.transpose(1, 2)
            )
        down = f"{shard.name}.down_proj"
        yield WeightSlice(
            down, (experts, width, hidden), (owned, mine, _ALL), shard.down.transpose(1, 2)
        )
        if shard.gate_up_bias is not None and shard.down_bias is not None:
            biases = shard.gate_up_bias.chunk(2, dim=1)
            for columns, out in zip(self._columns(shard), biases, strict=True):
                yield WeightSlice(f"{both}_bias", (experts, 2 * width), (owned, columns), out)
            bias = WeightSlice(f"{down}_bias", (experts, hidden), (owned, _ALL), shard.down_bias)
            yield bias if shard.bias_here else bias.nothing()

    def _columns(self, shard: ExpertShard) -> tuple[slice, slice]:
        """Those of gate, and of up."""
        first, stop = shard.width
        if self.interleaved:
            return slice(2 * first, 2 * stop, 2), slice(2 * first + 1, 2 * stop, 2)
        width = shard.intermediate_size
        return slice(first, stop), slice(width + first, width + stop)


PER_EXPERT = PerExpert()
