"""Tuned launch configurations, by card.

`isomoe tune` writes a file a card: kernel -> shape -> rows -> configuration. A kernel asks for the
entry of its shape that was tuned for the nearest number of rows, and runs on its own default where
there is none.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import log
from pathlib import Path

import torch

Config = dict[str, int]
"""Meta-parameters of a launch: tile sizes, num_warps, num_stages."""
Tuned = dict[str, dict[str, dict[str, Config]]]
"""Kernel -> shape -> rows -> configuration, as in the file."""

FOLDER = Path(__file__).parent / "tuned"
_FAR = log(2.5)
"""An entry for more or fewer rows than by this factor says nothing."""
_overrides: dict[str, Config] = {}


def find(kernel: str, shape: tuple[int, ...], rows: int, default: Config) -> Config:
    """The configuration for `rows` rows: as tried now, as tuned for this card, or the default."""
    if kernel in _overrides:
        return _overrides[kernel]
    by_rows = _shapes(kernel).get(shape)
    if not by_rows or rows < 1:
        return default
    return _nearest(kernel, shape, rows) or default


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """`find` gives `config` to `kernel` within; for tuning."""
    _overrides[kernel] = config
    try:
        yield
    finally:
        del _overrides[kernel]


def card() -> str:
    """The name of this process's GPU, as a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def read(file: Path) -> Tuned:
    """The content of a file; nothing if there is none."""
    found: Tuned = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def shape_name(shape: tuple[int, ...]) -> str:
    """How a file spells a shape."""
    return "x".join(map(str, shape))


@cache
def _tuned() -> Mapping[str, Mapping[tuple[int, ...], Mapping[int, Config]]]:
    return {
        kernel: {
            tuple(map(int, shape.split("x"))): {int(rows): one for rows, one in by_rows.items()}
            for shape, by_rows in shapes.items()
        }
        for kernel, shapes in read(FOLDER / f"{card()}.json").items()
    }


@cache
def _shapes(kernel: str) -> Mapping[tuple[int, ...], Mapping[int, Config]]:
    return _tuned().get(kernel, {})


@cache
def _nearest(kernel: str, shape: tuple[int, ...], rows: int) -> Config | None:
    by_rows = _shapes(kernel)[shape]
    nearest = min(by_rows, key=lambda tuned: abs(log(tuned / rows)))
    return by_rows[nearest] if abs(log(nearest / rows)) <= _FAR else None
