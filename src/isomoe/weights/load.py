"""Fills a rank's weights from a checkpoint, reading only what the rank keeps."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isomoe.blocks import Fp8Part, WeightSlice
from isomoe.errors import CheckpointError
from isomoe.kernels import BlockFp8
from isomoe.weights.files import Box, TensorFiles
from isomoe.weights.quantization import Quantization
from isomoe.weights.stored import Stored, stored_tensors

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

_LISTED = 8
DUMMY_STD = 0.02
"""Standard deviation of dummy weights, as models of these families are initialised."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a rank has read.

    Attributes:
        bytes_read: of each tensor in the files, scales too; those that were not read are absent.
    """

    bytes_read: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(self.bytes_read.values())


def load_safetensors(
    folder: Path,
    wanted: Iterable[WeightSlice],
    ignores: Callable[[str], bool],
    progress: Progress | None = None,
    canonical: Callable[[str], str] = str,
    quantization: Quantization | None = None,
    rounds: bool = False,
) -> LoadReport:
    """Fills every slice of `wanted` from the checkpoint in `folder`.

    Only the slices are read, so the peak is this rank's shard plus one matrix in fp32; or, where
    they are rounded to FP8, the blocks that they touch, and some copies of one matrix.

    Args:
        ignores: whether a tensor that nothing wants may be in the checkpoint; takes canonical
            names.
        canonical: the name that slices have for a tensor of the checkpoint. Scales go with what
            they scale, so it never sees theirs.
        quantization: how weights are kept, as `read_quantization` gives it.
        rounds: whether what is wanted in FP8, and is not kept so, is rounded.

    Raises:
        CheckpointError: listing every tensor that is missing, unexpected, of another shape or
            dtype, or claims the name of another; or any file that is missing or truncated.
            Nothing has been read then.
    """
    pieces_of: dict[str, list[WeightSlice]] = {}
    for piece in wanted:
        pieces_of.setdefault(piece.source, []).append(piece)
    files = TensorFiles(folder)
    stored: dict[str, Stored] = {}
    faults = []
    for tensor in stored_tensors(files, quantization):
        first = stored.setdefault(name := canonical(tensor.name), tensor)
        if first is not tensor:
            faults.append(f"{first.made_of[0]} and {tensor.made_of[0]} are both {name}")
    faults += [f"missing {name}" for name in pieces_of if name not in stored]
    faults += [
        f"unexpected {tensor.made_of[0]}"
        for name, tensor in stored.items()
        if name not in pieces_of and not ignores(name)
    ]
    # File by file, since few are open at a time.
    todo = [(tensor, pieces_of[name]) for name, tensor in stored.items() if name in pieces_of]
    todo.sort(key=lambda one: str(files.file_of[one[0].made_of[0]]))
    for tensor, pieces in todo:
        faults += tensor.faults() or _misfits(tensor, pieces, rounds)
    if faults:
        more = f", and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise CheckpointError(f"{folder}: {'; '.join(faults[:_LISTED])}{more}")
    for done, (tensor, pieces) in enumerate(todo, 1):
        _fill(tensor, pieces)
        if progress is not None:
            progress(done, len(todo))
    return LoadReport(dict(files.bytes_read))


def load_dummy(wanted: Iterable[WeightSlice], seed: int) -> None:
    """Random weights that are the same for a seed on every layout.

    Each tensor is drawn whole from a generator seeded with its name, then cut. Matrices are
    normal(0, DUMMY_STD); vectors are norms or biases: 1 plus the same noise, or the noise. A norm
    kept less one gets its one from `plus`.
    They are drawn where they will lie, and a GPU draws other numbers than a CPU.
    """
    for piece in wanted:
        if not piece.out.numel():
            continue
        digest = hashlib.sha256(f"{seed}/{piece.source}".encode()).digest()
        device = piece.out.device
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        full = torch.randn(piece.shape, generator=generator, device=device).mul_(DUMMY_STD)
        norm = len(piece.shape) == 1 and not piece.source.endswith("bias")
        if offset := piece.plus or float(norm):
            full += offset
        if piece.fp8 is None:
            piece.out.copy_(full[piece.index])
        else:
            whole = BlockFp8.of(full, (piece.fp8.block, piece.fp8.block))
            origin = tuple((0, size) for size in piece.shape)
            _take_fp8(piece, piece.fp8, (whole.codes, whole.scales), origin)


def _misfits(tensor: Stored, pieces: list[WeightSlice], rounds: bool) -> list[str]:
    found = [
        f"{tensor.name} is {list(tensor.shape)}, the config says {list(shape)}"
        for shape in dict.fromkeys(piece.shape for piece in pieces)
        if shape != tensor.shape
    ]
    blocks = {piece.fp8.block for piece in pieces if piece.fp8 is not None}
    if not rounds and not all(tensor.is_fp8(block) for block in blocks):
        found.append(
            f"{tensor.name} is not in FP8 as other experts are; --moe-weight-format none, or fp8, "
            "which rounds it, would work"
        )
    return found


def _fill(tensor: Stored, pieces: list[WeightSlice]) -> None:
    """Fills one tensor's slices. What several of them cover is read once."""
    sharing: dict[tuple[Box, int | None], list[WeightSlice]] = {}
    for whole in pieces:
        for piece in _matrices(whole):
            block = None if piece.fp8 is None else piece.fp8.block
            sharing.setdefault((_covering(piece), block), []).append(piece)
    for (box, block), some in sharing.items():
        device = some[0].out.device
        if block is not None:
            matrix = tensor.read_fp8(box, block, device)
            for piece in some:
                assert piece.fp8 is not None
                _take_fp8(piece, piece.fp8, matrix, box)
            continue
        part = tensor.read(box, device)
        for piece in some:
            kept = part[_within(piece, box)]
            piece.out.copy_(kept.float() + piece.plus if piece.plus else kept)


def _take_fp8(piece: WeightSlice, fp8: Fp8Part, matrix: tuple[Tensor, Tensor], box: Box) -> None:
    """Fills a slice from the codes in a box, or from the scales of the blocks that it touches."""
    codes, scales = matrix
    if not fp8.scales:
        piece.out.copy_(codes[_within(piece, box)])
        return
    for dim in (-2, -1):
        kept, count = range(*piece.index[dim].indices(piece.shape[dim])), piece.out.shape[dim]
        run = fp8.block if -(-len(kept) // fp8.block) == count else fp8.grain
        at = torch.tensor(kept[::run], device=scales.device)
        scales = scales.index_select(dim, at // fp8.block - box[dim][0] // fp8.block)
    leading = _within(piece, box)[:-2]
    piece.out.copy_(scales[leading])


def _within(piece: WeightSlice, box: Box) -> tuple[slice, ...]:
    """Where a slice lies in a box of its tensor."""
    ranges = (one.indices(size) for one, size in zip(piece.index, piece.shape, strict=True))
    return tuple(
        slice(start - at, stop - at, step)
        for (start, stop, step), (at, _) in zip(ranges, box, strict=True)
    )


def _matrices(piece: WeightSlice) -> Iterator[WeightSlice]:
    """A slice of stacked matrices, matrix by matrix: dequantising needs room for one then."""
    if not piece.out.numel():
        return
    if len(piece.shape) < 3:
        yield piece
        return
    first, *others = piece.index
    for at, one in enumerate(range(*first.indices(piece.shape[0]))):
        yield replace(piece, index=(slice(one, one + 1), *others), out=piece.out[at : at + 1])


def _covering(piece: WeightSlice) -> Box:
    """The contiguous part that a slice is cut from, the same for slices that take turns."""
    ranges = (one.indices(size) for one, size in zip(piece.index, piece.shape, strict=True))
    return tuple(
        (start // step * step, min(-(-stop // step) * step, size))
        for (start, stop, step), size in zip(ranges, piece.shape, strict=True)
    )
