"""Experts' operands in FP8: weights with a scale for each square block, rows with one for each run.

N: rows of a matrix   K: its columns   T: rows of activations   H: hidden size
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isomoe.kernels.packed_rows import E4M3_MAX, scale_to, unpack_fp8

WEIGHT_BLOCK = 128
"""Rows and columns of a block where nothing else is said, as published checkpoints have them."""
MIN_FP8_RUN = 16
"""The fewest columns that share a scale: a thread's load, and a step of a bf16 product."""
MIN_FP8_BLOCK = 32
"""A block has a multiple of so many: a step of a product of FP8."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockFp8:
    """Matrices in FP8 E4M3. A value is code * scale.

    The last block of rows, or of columns, may be smaller.

    Source: DeepSeek-V3 technical report (2024), section 3.3.
    """

    codes: Tensor
    """[..., N, K] float8_e4m3fn."""
    scales: Tensor
    """[..., ceil(N / rows), ceil(K / columns)] fp32."""
    block: tuple[int, int]
    """Rows and columns of a block."""

    @classmethod
    def zeros(
        cls,
        *shape: int,
        block: tuple[int, int],
        device: torch.device | None = None,
        paired: bool = False,
    ) -> "BlockFp8":
        """Room for matrices.

        Args:
            shape: [..., N, K].
            paired: of [..., 2, N, K] the rows of both take turns in memory. So one product has
                gate and up side by side.
        """
        *stack, rows, columns = shape
        grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
        stored = (*stack[:-1], rows, stack[-1], columns) if paired else shape
        codes = torch.zeros(stored, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return cls(
            codes=codes.transpose(-3, -2) if paired else codes,
            scales=torch.zeros(grid, device=device),
            block=block,
        )

    @classmethod
    def of(cls, weight: Tensor, block: tuple[int, int]) -> "BlockFp8":
        """Scales each block to the range of E4M3, and rounds. weight: [..., N, K], finite.

        A block whose scale would be less than fp32's smallest normal number is zero, of scale 1.
        """
        *stack, rows, columns = weight.shape
        height, width = block
        pads = (0, -columns % width, 0, -rows % height)
        padded = torch.nn.functional.pad(weight.float(), pads)
        tall, wide = padded.shape[-2] // height, padded.shape[-1] // width
        tiles = padded.reshape(*stack, tall, height, wide, width)
        scales = scale_to(tiles.abs().amax((-3, -1)), E4M3_MAX)
        codes = (tiles / scales[..., None, :, None]).to(torch.float8_e4m3fn)
        codes = codes.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()
        return cls(codes=codes, scales=scales, block=block)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[..., N, K]: the product in fp32, then rounded; matrix by matrix, for fp32 takes room."""
        if self.codes.dim() > 2:
            out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
            for part, codes, scales in zip(out, self.codes, self.scales, strict=True):
                one = BlockFp8(codes=codes, scales=scales, block=self.block)
                part.copy_(one.dequantized(dtype))
            return out
        rows, columns = self.codes.shape[-2:]
        spread = self.scales.repeat_interleave(self.block[0], -2)[..., :rows, :]
        spread = spread.repeat_interleave(self.block[1], -1)[..., :columns]
        return (self.codes.float() * spread).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fp8Rows:
    """Rows as `pack_fp8` gives them, and what they stand for."""

    codes: Tensor
    """[T, H] float8_e4m3fn."""
    scales: Tensor
    """[T, ceil(H / 128)] fp32."""
    dtype: torch.dtype
    """Of the rows that were packed, and of what is made of them."""

    def unpacked(self) -> Tensor:
        """[T, H] in `dtype`."""
        return unpack_fp8(self.codes, self.scales, self.dtype)


ExpertRows = Tensor | Fp8Rows
ExpertMatrices = Tensor | BlockFp8


def plain_rows(x: ExpertRows) -> Tensor:
    """[T, H], unpacked if need be."""
    return x if isinstance(x, Tensor) else x.unpacked()


def plain_matrices(weight: ExpertMatrices, dtype: torch.dtype) -> Tensor:
    """[..., N, K], dequantised if need be."""
    return weight if isinstance(weight, Tensor) else weight.dequantized(dtype)
