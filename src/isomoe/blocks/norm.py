"""Norms."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.kernels import add_rms_norm, on_gpu, rms_norm


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

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """residual + addend in residual's dtype, and its norm: one kernel on a GPU.

        residual, addend: [rows, size]. The residual may be overwritten.
        """
        if on_gpu(residual):
            return add_rms_norm(residual, addend, self.weight, self.eps)
        total = (residual + addend).to(residual.dtype)
        return total, self(total)  # by `forward`, which the proof replaces
