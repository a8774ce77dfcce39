"""A tensor of a checkpoint, plain or quantised: what it is, and how a part of it is read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from isomoe.kernels import BlockFp8
from isomoe.weights.files import Box, TensorFiles
from isomoe.weights.quantization import Fp8, Mxfp4, Quantization

_FLOATS = ("BF16", "F16", "F32")
_READ = f"{', '.join(_FLOATS)} can be read"


class Stored(ABC):
    """A tensor as a model asks for it.

    Args:
        name: what the checkpoint would call it, were it plain.
        made_of: the tensors of the files that hold it.
    """

    def __init__(self, files: TensorFiles, name: str, *made_of: str) -> None:
        self.files = files
        self.name = name
        self.made_of = made_of

    def faults(self) -> list[str]:
        """What is wrong with the tensors that it is made of."""
        absent = [fault for part in self.made_of if (fault := self.files.lacks(part))]
        return absent or self._misfits()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Its full shape, if it has no faults."""

    @abstractmethod
    def read(self, box: Box, device: torch.device) -> Tensor:
        """A part of it: fp32 if it is quantised, else as it is kept.

        Args:
            device: where quantised values are dequantised; plain ones stay on the CPU.
        """

    def is_fp8(self, block: int) -> bool:
        """Whether it is kept in FP8, in square blocks of that size."""
        return False

    def read_fp8(self, box: Box, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A part of its matrices in FP8: codes, and scales of all square blocks that it touches.

        What is kept otherwise is rounded, in whole blocks: ranks that share one agree on it.
        """
        *leading, rows, columns = box
        within = [
            (start // block * block, min(-(-stop // block) * block, size))
            for (start, stop), size in zip((rows, columns), self.shape[-2:], strict=True)
        ]
        values = self.read((*leading, *within), device).to(device)
        whole = BlockFp8.of(values, (block, block))
        (top, _), (left, _) = within
        codes = whole.codes[
            ..., rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left
        ]
        return codes, whole.scales

    @abstractmethod
    def _misfits(self) -> list[str]: ...


class PlainTensor(Stored):
    """Kept as it is."""

    def __init__(self, files: TensorFiles, name: str) -> None:
        super().__init__(files, name, name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.files.shape(self.name)

    def read(self, box: Box, device: torch.device) -> Tensor:
        return self.files.read(self.name, box)

    def _misfits(self) -> list[str]:
        dtype = self.files.dtype(self.name)
        if dtype in _FLOATS:
            return []
        blocks = f", or F8_E4M3 with {self.name}_scale_inv and a quantization_config"
        return [f"{self.name} is {dtype}, and {_READ}{blocks if dtype == 'F8_E4M3' else ''}"]


class Fp8Tensor(Stored):
    """FP8 E4M3 [..., N, K], and scales [..., N / rows of a block, K / columns] rounded up.

    A value is the product of both in fp32.

    Source: DeepSeek-V3 technical report (2024), section 3.3.
    """

    def __init__(self, files: TensorFiles, name: str, scales: str, block: tuple[int, int]) -> None:
        super().__init__(files, name, name, scales)
        self.scales = scales
        self.block = block

    @property
    def shape(self) -> tuple[int, ...]:
        return self.files.shape(self.name)

    def read(self, box: Box, device: torch.device) -> Tensor:
        *_, rows, columns = box
        scales = self._scales(box, device)
        for dim, (start, stop), size in zip((-2, -1), (rows, columns), self.block, strict=True):
            block_of = torch.arange(start, stop, device=device) // size - start // size
            scales = scales.index_select(dim, block_of)
        return scales.mul_(self.files.read(self.name, box).to(device).float())

    def is_fp8(self, block: int) -> bool:
        return self.block == (block, block)

    def read_fp8(self, box: Box, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.is_fp8(block):
            return super().read_fp8(box, block, device)
        return self.files.read(self.name, box).to(device), self._scales(box, device)

    def _scales(self, box: Box, device: torch.device) -> Tensor:
        """Of all blocks that it touches, fp32."""
        *leading, rows, columns = box
        blocks = [
            (start // size, -(-stop // size))
            for (start, stop), size in zip((rows, columns), self.block, strict=True)
        ]
        return self.files.read(self.scales, (*leading, *blocks)).to(device).float()

    def _misfits(self) -> list[str]:
        dtype, of_scales = self.files.dtype(self.name), self.files.dtype(self.scales)
        if dtype != "F8_E4M3":
            return [f"{self.name} is {dtype}, and with {self.scales} F8_E4M3 can be read"]
        if of_scales not in _FLOATS:
            return [f"{self.scales} is {of_scales}, and {_READ}"]
        if len(self.shape) < 2:
            return [f"{self.name} is {list(self.shape)}, and blocks need two dims"]
        *leading, rows, columns = self.shape
        wanted = [*leading, -(-rows // self.block[0]), -(-columns // self.block[1])]
        found = list(self.files.shape(self.scales))
        if found != wanted:
            size = " x ".join(map(str, self.block))
            return [f"{self.scales} is {found}, blocks of {size} need {wanted}"]
        return []


class Mxfp4Tensor(Stored):
    """[..., K, N]: kept as `_blocks` [..., N, K / 32, 16] of two FP4 (E2M1) a byte, the low nibble
    first, and `_scales` [..., N, K / 32] in E8M0; both are uint8. A value is exact in fp32.

    Source: OCP Microscaling Formats (MX) Specification 1.0 (2023).
    """

    VALUES = 32  # that share a scale

    def __init__(self, files: TensorFiles, name: str) -> None:
        self.blocks, self.scales = f"{name}_blocks", f"{name}_scales"
        super().__init__(files, name, self.blocks, self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, rows, blocks, _ = self.files.shape(self.blocks)
        return (*leading, blocks * self.VALUES, rows)

    def read(self, box: Box, device: torch.device) -> Tensor:
        *leading, (start, stop), rows = box
        first = start // self.VALUES
        covering = (*leading, rows, (first, -(-stop // self.VALUES)))
        packed = self.files.read(self.blocks, (*covering, (0, self.VALUES // 2))).to(device)
        exponents = self.files.read(self.scales, covering).to(device)
        values = _looked_up(_fp4_pairs(), packed).flatten(-2)
        values *= _looked_up(_powers(), exponents)
        kept = slice(start - first * self.VALUES, stop - first * self.VALUES)
        return values.flatten(-2)[..., kept].transpose(-1, -2)

    def _misfits(self) -> list[str]:
        faults = [
            f"{name} is {dtype}, and U8 can be read"
            for name in self.made_of
            if (dtype := self.files.dtype(name)) != "U8"
        ]
        blocks, scales = self.files.shape(self.blocks), self.files.shape(self.scales)
        if len(blocks) < 3 or blocks[-1] != self.VALUES // 2:
            faults.append(f"{self.blocks} is {list(blocks)}, not [..., rows, blocks, 16]")
        elif scales != blocks[:-1]:
            faults.append(
                f"{self.scales} is {list(scales)}, {self.blocks} needs {list(blocks[:-1])}"
            )
        return faults


def stored_tensors(files: TensorFiles, quantization: Quantization | None) -> Iterator[Stored]:
    """The tensors of a checkpoint. Scales are no tensors, but part of what they scale."""
    names = files.file_of.keys()
    for name in names:
        match quantization:
            case Fp8(block) if (scales := f"{name}_scale_inv") in names:
                yield Fp8Tensor(files, name, scales, block)
            case Mxfp4() if name.endswith("_blocks"):
                yield Mxfp4Tensor(files, name.removesuffix("_blocks"))
            case Fp8() if name.endswith(end := "_scale_inv") and name.removesuffix(end) in names:
                pass
            case Mxfp4() if name.endswith(end := "_scales") and (
                f"{name.removesuffix(end)}_blocks" in names
            ):
                pass
            case _:
                yield PlainTensor(files, name)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """Rows of a table of 256, for codes of uint8."""
    found = table.to(codes.device).index_select(0, codes.flatten().int())
    return found.view(*codes.shape, -1)


def _fp4_pairs() -> Tensor:
    """The two values of each byte, [256, 2]."""
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat((positive, -positive))
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)


def _powers() -> Tensor:
    """What each E8M0 scale multiplies with, [256]: 2 ** -127 to 2 ** 127, and one NaN."""
    exponents = torch.arange(-127, 129, dtype=torch.float64)
    powers = torch.exp2(exponents).float()
    powers[255] = torch.nan
    return powers
