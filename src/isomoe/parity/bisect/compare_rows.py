"""How far rows lie from where they should be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isomoe.parity.bisect.assemble import Whole

_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """One side's rows against the baseline's, at one station.

    Attributes:
        places: of the rows that both have.
        error: [n], norm of the difference relative to the baseline's row; infinite for NaN.
        ratios: [n], of the norms.
        spread: [n], how far copies of the row lie apart on the other side.
    """

    places: Tensor
    error: Tensor
    ratios: Tensor
    spread: Tensor

    @classmethod
    def of(cls, other: Whole, baseline: Whole) -> "Apart":
        """Compares the rows that both have."""
        places = other.places[torch.isin(other.places, baseline.places)]
        o, b = other.at(places), baseline.at(places)
        size = b.x.norm(dim=1).clamp_min(_TINY)
        error = ((o.x - b.x).norm(dim=1) / size).nan_to_num(nan=torch.inf)
        return cls(
            places=places,
            error=error,
            ratios=o.x.norm(dim=1) / size,
            spread=o.spread.nan_to_num(nan=torch.inf),
        )

    @property
    def median(self) -> float:
        """Of the errors."""
        return float(self.error.median()) if len(self.error) else 0.0

    @property
    def worst(self) -> float:
        """The largest error."""
        return float(self.error.max()) if len(self.error) else 0.0

    @property
    def ratio(self) -> float:
        """The median ratio of norms."""
        return float(self.ratios.median()) if len(self.ratios) else 1.0


def best_scale(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(factor, misfit): x is about factor * y, up to misfit of x's size. Every row counts alike."""
    size = y.norm(dim=1, keepdim=True).clamp_min(_TINY)
    x, y = x / size, y / size
    factor = float((x * y).sum() / y.square().sum().clamp_min(_TINY))
    misfit = float((x - factor * y).norm() / x.norm().clamp_min(_TINY))
    return factor, misfit


def typical_error(x: Tensor, y: Tensor) -> float:
    """The median over the rows of the difference, relative to y's row."""
    return float(((x - y).norm(dim=1) / y.norm(dim=1).clamp_min(_TINY)).median())


def nearest(x: Tensor, pool: Tensor) -> Tensor:
    """[n]: for each row of x, which row of the pool it is; -1 where it is none (5% or more off)."""
    gaps = torch.cdist(x, pool)
    gap, found = gaps.min(dim=1)
    return torch.where(gap < 0.05 * x.norm(dim=1), found, -1)
