"""Leaves: operations on weights or caches, the grain at which the proof replaces arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fp8Part:
    """What a slice takes of a matrix in FP8, instead of its values.

    Attributes:
        block: rows and columns of it that share a scale.
        grain: a divisor, for a dim whose slice cuts blocks: no run of so many lies in two.
        scales: the scales, else the codes.
    """

    block: int
    grain: int
    scales: bool


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """The part of one checkpoint tensor that a rank keeps, and where it goes.

    Attributes:
        source: the tensor's name in the checkpoint.
        shape: its full shape.
        index: one slice for each dim of it; steps may be more than 1.
        out: the view to fill, transposed or not; its shape is that of the slice.
        plus: added in fp32 to what is read, such as the one that zero-centred norms lack.
        fp8: what `out` takes of it, if it is kept in FP8; None: its values. Of scales it takes, in
            each dim, one for each block or for each grain, whichever it has room for.
    """

    source: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    out: Tensor
    plus: float = 0.0
    fp8: Fp8Part | None = None

    def nothing(self) -> "WeightSlice":
        """The same tensor of the checkpoint, of which this rank keeps nothing."""
        empty = tuple(slice(0, 0) for _ in self.index)
        return WeightSlice(self.source, self.shape, empty, self.out[(slice(0, 0),) * len(empty)])


class Leaf:
    """One operation. `forward` may be replaced on an instance (the proof does)."""

    def __call__(self, *args: Any) -> Tensor:
        return self.forward(*args)

    def forward(self, *args: Any) -> Tensor:
        """The arithmetic; each leaf documents its own arguments."""
        raise NotImplementedError(type(self).__name__)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the (uninitialised) weights; construction makes none."""

    def slices(self) -> Iterator[WeightSlice]:
        """What the allocated weights are filled from."""
        return iter(())

    def pack(self) -> None:
        """Lays the filled weights out for the device, where that is faster; they then go."""
