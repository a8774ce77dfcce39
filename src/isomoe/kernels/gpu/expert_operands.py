"""What the experts' kernels multiply: plain values, or FP8 codes and where their scales are."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.block_fp8 import BlockFp8, ExpertMatrices, ExpertRows
from isomoe.kernels.packed_rows import FP8_RUN


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOperand:
    """Rows of activations."""

    values: Tensor
    """[T, H], plain or codes."""
    scales: Tensor
    """[T, ceil(H / run)] fp32; anything where they are plain."""
    run: int
    """Columns that share a scale; 0: plain."""
    dtype: torch.dtype
    """Of what is made of them."""

    @classmethod
    def of(cls, x: ExpertRows) -> "RowOperand":
        if isinstance(x, Tensor):
            return cls(values=x, scales=x, run=0, dtype=x.dtype)
        codes, scales = x.codes.contiguous(), x.scales.contiguous()
        return cls(values=codes, scales=scales, run=FP8_RUN, dtype=x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixOperand:
    """Matrices of experts."""

    values: Tensor
    """[E, ..., K], plain or codes; in FP8 the rows of gate and up take turns in memory."""
    scales: Tensor
    """[E, ..., ceil(N / rows), ceil(K / columns)] fp32; anything where they are plain."""
    block: tuple[int, int]
    """Rows and columns that share a scale; (0, 0): plain."""

    @classmethod
    def of(cls, weight: ExpertMatrices) -> "MatrixOperand":
        """Raises ValueError if gate and up, in FP8, were not made as pairs."""
        if isinstance(weight, BlockFp8):
            codes = weight.codes
            if not (codes if codes.dim() == 3 else codes.transpose(1, 2)).is_contiguous():
                raise ValueError("gate and up in FP8 must take turns in memory, row by row")
            return cls(values=weight.codes, scales=weight.scales, block=weight.block)
        return cls(values=weight, scales=weight, block=(0, 0))

    @property
    def columns(self) -> int:
        """K."""
        return self.values.shape[-1]

    @property
    def step(self) -> int:
        """The most columns of a power of two of which each run of a matrix has one scale."""
        return self.block[1] & -self.block[1]


def tuned_shape(widths: tuple[int, int], *sizes: int) -> tuple[int, ...]:
    """Under which launches are kept: operands that are not bf16 have entries of their own.

    widths: bytes of a weight, and of a row's value.
    """
    return sizes if set(widths) == {torch.bfloat16.itemsize} else (*sizes, *widths)


@triton.jit  # type: ignore[untyped-decorator]
def load_scales(  # type: ignore[no-untyped-def]
    scales,
    unit,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    RUN_N: tl.constexpr,
    RUN_K: tl.constexpr,
):
    """Of the rows `unit` of a matrix [N, K], at one column."""
    RUNS: tl.constexpr = (K + RUN_K - 1) // RUN_K
    return tl.load(scales + tl.minimum(unit, N - 1) // RUN_N * RUNS + column // RUN_K)


@triton.jit  # type: ignore[untyped-decorator]
def dequantized(codes, by, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes [N, K] times scales [N], in dtype."""
    return (codes.to(tl.float32) * by[:, None]).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def empty_sum(M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, N] zeros, or [N, M] with SWAP."""
    return tl.zeros((N, M), tl.float32) if SWAP else tl.zeros((M, N), tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def add_product(x, weights, total, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + x @ weights.T. x: [M, K], weights: [N, K]; total: as `empty_sum`."""
    if SWAP:
        total = tl.dot(weights, x.T, total, input_precision="ieee")
    else:
        total = tl.dot(x, weights.T, total, input_precision="ieee")
    return total


@triton.jit  # type: ignore[untyped-decorator]
def product_of(x, weights, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """x @ weights.T of codes."""
    return tl.dot(weights, x.T) if SWAP else tl.dot(x, weights.T)


@triton.jit  # type: ignore[untyped-decorator]
def scales_of(x_by, by, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a product, from those of its rows [M] and columns [N]."""
    return by[:, None] * x_by[None, :] if SWAP else x_by[:, None] * by[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def split_pairs(both, M: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sum over 2N columns that take turns, as two over N."""
    if SWAP:
        return tl.split(tl.permute(tl.reshape(both, (N, 2, M)), (0, 2, 1)))
    else:
        return tl.split(tl.reshape(both, (M, N, 2)))
