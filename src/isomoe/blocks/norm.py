"""Norms."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.kernels import add_rms_norm, on_gpu, rms_norm


class RMSNorm(Leaf):
    """RMSNorm over the last dim; statistics in fp32; gives the model's dtype.

    Source: Zhang and Sennrich (2019).

    Args:
        zero_centred: the checkpoint holds weights less one. They are kept in fp32, since one plus
            a small number has no place in bf16.
    """

    def __init__(self, name: str, size: int, eps: float, zero_centred: bool = False) -> None:
        self.name = name
        self.size = size
        self.eps = eps
        self.zero_centred = zero_centred
        self.weight: Tensor
        self.dtype: torch.dtype

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        kept = torch.float32 if self.zero_centred else dtype
        self.weight = torch.ones(self.size, dtype=kept, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        plus = 1.0 if self.zero_centred else 0.0
        name = f"{self.name}.weight"
        yield WeightSlice(name, (self.size,), (slice(None),), self.weight, plus)

    def forward(self, *args: Any) -> Tensor:
        """x: [..., size] -> the same shape."""
        (x,) = args
        return rms_norm(x, self.weight, self.eps).to(self.dtype)

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """residual + addend in residual's dtype, and its norm: one kernel on a GPU.

        residual, addend: [rows, size]. The residual may be overwritten.
        """
        if on_gpu(residual):
            total, normed = add_rms_norm(residual, addend, self.weight, self.eps)
            return total, normed.to(self.dtype)
        total = (residual + addend).to(residual.dtype)
        return total, self(total)  # by `forward`, which the proof replaces


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """Each row of the last dim scaled to unit root mean square, in fp32; in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
