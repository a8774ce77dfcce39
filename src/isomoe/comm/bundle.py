"""Bundles: tensors of the same rows, joined byte by byte so that one collective moves them."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One tensor of a bundle: its dtype, and its shape but for the rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape) * self.dtype.itemsize


def parts_of(tensors: Sequence[Tensor]) -> list[Part]:
    """What `split` needs to take a bundle of such tensors apart."""
    return [Part(x.dtype, tuple(x.shape[1:])) for x in tensors]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """tensors: [rows, ...] of any dtypes -> [rows, bytes] uint8."""
    return torch.cat([_bytes(x.flatten(1)) for x in tensors], 1)


def _bytes(x: Tensor) -> Tensor:
    """[rows, n] -> [rows, bytes]."""
    if x.stride(1) != 1:  # a lone column may have any
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


def split(bundle: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """What was joined: [rows, bytes] uint8 -> tensors, in order."""
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + part.row_bytes)
    fresh = torch.contiguous_format  # a lone row is contiguous, but may start at an odd byte
    return [
        bundle[:, start:stop]
        .clone(memory_format=fresh)
        .view(part.dtype)
        .view(bundle.shape[0], *part.shape)
        for part, (start, stop) in zip(parts, pairwise(bounds), strict=True)
    ]
