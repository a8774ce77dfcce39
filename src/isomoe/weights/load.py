"""Fills a rank's weights from safetensors files, reading only what the rank keeps."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isomoe.blocks import WeightSlice
from isomoe.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

_INDEX = "model.safetensors.index.json"
_LISTED = 8
_FLOATS = ("BF16", "F16", "F32")
DUMMY_STD = 0.02
"""Standard deviation of dummy weights, as models of these families are initialised."""


def load_safetensors(
    folder: Path,
    wanted: Iterable[WeightSlice],
    ignores: Callable[[str], bool],
    progress: Progress | None = None,
) -> None:
    """Fills every slice of `wanted` from the checkpoint in `folder`.

    Only the slices are read, so the peak is this rank's shard plus one tensor.

    Args:
        ignores: whether a tensor that nothing wants may be in the checkpoint.

    Raises:
        CheckpointError: listing every tensor that is missing, unexpected or of another shape, and
            any file that is missing or truncated.
    """
    by_source: dict[str, list[WeightSlice]] = {}
    for piece in wanted:
        by_source.setdefault(piece.source, []).append(piece)
    files = _tensor_files(folder)
    faults = [f"missing {name}" for name in by_source if name not in files]
    faults += [
        f"unexpected {name}" for name in files if name not in by_source and not ignores(name)
    ]
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        if name in by_source:
            by_file.setdefault(file, []).append(name)
    done = 0
    for file, names in by_file.items():
        with _opened(file) as tensors:
            for name in names:
                faults += _fill(tensors, name, by_source[name])
                done += 1
                if progress is not None:
                    progress(done, len(by_source))
    if faults:
        more = f", and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise CheckpointError(f"{folder}: {'; '.join(faults[:_LISTED])}{more}")


def load_dummy(wanted: Iterable[WeightSlice], seed: int) -> None:
    """Random weights that are the same for a seed on every layout.

    Each tensor is drawn whole from a generator seeded with its name, then cut. Matrices are
    normal(0, DUMMY_STD); vectors are norms or biases: 1 plus the same noise, or the noise.
    They are drawn where they will lie, and a GPU draws other numbers than a CPU.
    """
    for piece in wanted:
        if not piece.out.numel():
            continue
        digest = hashlib.sha256(f"{seed}/{piece.source}".encode()).digest()
        device = piece.out.device
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        full = torch.randn(piece.shape, generator=generator, device=device).mul_(DUMMY_STD)
        if len(piece.shape) == 1 and not piece.source.endswith("bias"):
            full += 1
        piece.out.copy_(full[piece.index])


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by the index or by looking into the only file."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors ({error})") from None
        absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if absent:
            raise CheckpointError(
                f"{folder}: {len(absent)} shard file(s) of the index are missing: "
                f"{', '.join(absent[:_LISTED])}"
            )
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: neither {_INDEX} nor model.safetensors is there")
    with _opened(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(
            f"{file}: truncated or no safetensors file ({size} bytes; {error})"
        ) from None


def _fill(tensors: Any, name: str, pieces: list[WeightSlice]) -> list[str]:
    """Fills one tensor's slices; returns what is wrong with it."""
    if name not in tensors.keys():  # noqa: SIM118 - the file is no mapping
        return [f"missing {name} (the index names a file that lacks it)"]
    stored = tensors.get_slice(name)
    shape = tuple(stored.get_shape())
    if stored.get_dtype() not in _FLOATS:
        return [f"{name} is {stored.get_dtype()}, and {', '.join(_FLOATS)} can be read"]
    for piece in pieces:
        if shape != piece.shape:
            return [f"{name} is {list(shape)}, the config says {list(piece.shape)}"]
        if piece.out.numel():
            part: Tensor = stored[piece.index]
            piece.out.copy_(part)
    return []
