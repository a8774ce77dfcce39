"""One small random checkpoint of a family, in its published format, and what it must answer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

Oracle = Callable[[Tensor], Tensor]
"""Token ids [T] int64 of one sequence -> logits [T, vocab] fp32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint and its oracle.

    Attributes:
        name: unique.
        family: the module of `isomoe.models` that must run it.
        oracle: what it is compared with, in words.
        save: writes config.json and model.safetensors (fp32, published names, fixed seed) into a
            folder, and returns the oracle.
    """

    name: str
    family: str
    oracle: str
    save: Callable[[Path], Oracle]
