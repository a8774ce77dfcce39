"""The safetensors files of a checkpoint: which tensors they hold, and parts of them."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from isomoe.errors import CheckpointError

Box = tuple[tuple[int, int], ...]
"""[start, stop) of each dim."""

_INDEX = "model.safetensors.index.json"
_LISTED = 8
_OPEN = 2  # a tensor and its scales may lie in two


class TensorFiles:
    """The tensors in a folder, by the index or by looking into the only file.

    Attributes:
        file_of: the file of each tensor.
        bytes_read: of each tensor that was read.

    Raises:
        CheckpointError: if a file is missing or truncated; here, and whenever one is opened.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes_read: Counter[str] = Counter()
        self._open = lru_cache(maxsize=_OPEN)(_opened)
        index = folder / _INDEX
        self.file_of = _indexed(index) if index.is_file() else self._in_single(folder)

    def lacks(self, name: str) -> str | None:
        """What to say of a tensor that is not there; None if it is."""
        if name not in self.file_of:
            return f"missing {name}"
        if name not in self._open(self.file_of[name])[1]:
            return f"missing {name} (the index names a file that lacks it)"
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """As the file has it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """In safetensors' spelling: BF16, U8 and so on."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, on the CPU, which may be a view of the file."""
        file = self.file_of[name]
        with _explained(file):
            part: Tensor = self._slice(name)[tuple(slice(*one) for one in box)]
        self.bytes_read[name] += part.numel() * part.itemsize
        return part

    def _slice(self, name: str) -> Any:
        return self._open(self.file_of[name])[0].get_slice(name)

    def _in_single(self, folder: Path) -> dict[str, Path]:
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{folder}: neither {_INDEX} nor model.safetensors is there")
        return dict.fromkeys(sorted(self._open(single)[1]), single)


def _indexed(index: Path) -> dict[str, Path]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors ({error})") from None
    match content:
        case {"weight_map": dict(weight_map)} if all(
            isinstance(f, str) for f in weight_map.values()
        ):
            folder = index.parent
        case _:
            raise CheckpointError(f"{index}: not an index of safetensors (no map to file names)")
    absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} shard file(s) of the index are missing: "
            f"{', '.join(absent[:_LISTED])}"
        )
    return {name: folder / file for name, file in weight_map.items()}


def _opened(file: Path) -> tuple[Any, frozenset[str]]:
    """A file, and the tensors in it. It is closed when nothing refers to it."""
    with _explained(file):
        tensors: Any = safe_open(file, framework="pt")
        return tensors, frozenset(tensors.keys())


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(
            f"{file}: truncated or no safetensors file ({size} bytes; {error})"
        ) from None
