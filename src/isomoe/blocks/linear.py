"""Linear maps on shards of their weights.  T rows, I in features, O out features of this rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.kernels import PackedLinear, linear, pack_linear


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of one checkpoint matrix of `size` rows; `stop` may lie beyond `size`,
    which leaves zero rows at the end."""

    source: str
    size: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows that this rank keeps, padding included."""
        return self.stop - self.start

    def slices(self, out: Tensor, columns: tuple[slice, int] | None) -> WeightSlice:
        """Where they come from. columns: the kept ones and the full number; None for a vector."""
        start, stop = min(self.start, self.size), min(self.stop, self.size)
        shape: tuple[int, ...] = (self.size,)
        index: tuple[slice, ...] = (slice(start, stop),)
        if columns is not None:
            shape, index = (*shape, columns[1]), (*index, columns[0])
        return WeightSlice(self.source, shape, index, out[: stop - start])


class Linear(Leaf):
    """y = x W^T + b for one or more matrices stacked along their out features.

    Args:
        parts: the stacked matrices (`source` without `.weight`), and the rows kept of each.
        in_features: columns of each matrix in the checkpoint.
        bias: whether the checkpoint has one.
    """

    def __init__(self, parts: Sequence[Part], in_features: int, bias: bool = False) -> None:
        self.parts = tuple(parts)
        self.in_features = in_features
        self.columns = (0, in_features)
        self.has_bias = bias
        self.bias_here = True
        self.weight: Tensor
        self.packed: PackedLinear | Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Out features on this rank."""
        return sum(part.rows for part in self.parts)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        width = self.columns[1] - self.columns[0]
        self.weight = torch.zeros(self.out_features, width, dtype=dtype, device=device)
        if self.has_bias:
            self.bias = torch.zeros(self.out_features, dtype=dtype, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        at = 0
        for part in self.parts:
            weight = Part(f"{part.source}.weight", part.size, part.start, part.stop)
            kept = (slice(*self.columns), self.in_features)
            yield weight.slices(self.weight[at : at + part.rows], kept)
            if self.bias is not None:
                bias = Part(f"{part.source}.bias", part.size, part.start, part.stop)
                found = bias.slices(self.bias[at : at + part.rows], None)
                yield found if self.bias_here else found.nothing()
            at += part.rows

    def forward(self, *args: Any) -> Tensor:
        """x: [T, I] -> [T, O]."""
        (x,) = args
        out = linear(x, self.weight if self.packed is None else self.packed)
        return out if self.bias is None else out + self.bias

    def pack(self) -> None:
        self.packed = pack_linear(self.weight)
        del self.weight


class RowLinear(Linear):
    """A matrix sharded over its in features (its columns), so that the result is an addend.

    Args:
        columns: [start, stop) of the columns that this rank keeps.
        bias_here: whether this rank adds the bias. One rank of the group must, and only one.
    """

    def __init__(
        self,
        source: str,
        out_features: int,
        in_features: int,
        columns: tuple[int, int],
        bias: bool = False,
        bias_here: bool = True,
    ) -> None:
        super().__init__([Part(source, out_features, 0, out_features)], in_features, bias)
        self.columns = columns
        self.bias_here = bias_here


class Router(Linear):
    """The replicated map to router logits.

    Args:
        fp32: computed in fp32, from fp32 weights.
        bias: whether it has one.
        correction: the name of a bias that only the choice of experts sees, [E] fp32.
    """

    def __init__(
        self,
        source: str,
        num_experts: int,
        hidden_size: int,
        fp32: bool = False,
        bias: bool = False,
        correction: str | None = None,
    ) -> None:
        super().__init__([Part(source, num_experts, 0, num_experts)], hidden_size, bias)
        self.fp32 = fp32
        self.correction_from = correction
        self.correction: Tensor | None = None

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        super().allocate(torch.float32 if self.fp32 else dtype, device)
        if self.correction_from is not None:
            self.correction = torch.zeros(self.out_features, dtype=torch.float32, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        yield from super().slices()
        if self.correction_from is not None and self.correction is not None:
            every = (slice(None),)
            yield WeightSlice(self.correction_from, (self.out_features,), every, self.correction)

    def forward(self, *args: Any) -> Tensor:
        """x: [T, hidden] -> logits [T, E]."""
        (x,) = args
        return super().forward(x.float() if self.fp32 else x)
