"""Norms."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.kernels import rms_norm


class RMSNorm(Leaf):
    """RMSNorm over the last dim; statistics in fp32; gives the weight's dtype."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        self.name = name
        self.size = size
        self.eps = eps
        self.weight: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.ones(self.size, dtype=dtype, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        yield WeightSlice(f"{self.name}.weight", (self.size,), (slice(None),), self.weight)

    def forward(self, *args: Any) -> Tensor:
        """x: [..., size] -> the same shape."""
        (x,) = args
        return rms_norm(x, self.weight, self.eps)
