"""Fits a machine's alphas and betas to how long collectives, and sums fused with a norm, took.

Least squares of the relative error, so that a reading of 10 us counts as much as one of 10 ms. Of a
fused sum it is that of the whole operation: what it takes, and what is predicted for it, is
addition and norm by themselves and the sum beyond them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from isomoe.blocks.norm import RMSNorm
from isomoe.comm.measure import FUSED_BYTES, OPS, SUMS, Reading
from isomoe.layout import FittedLink, FusedSums, Link, Op, Rate, Rates

_LEAST_ALPHA = 0.1
"""Microseconds. Nothing is free, and of equally cheap routes the shortest has to win."""
_ENDLESS = 1e9
"""Bytes a microsecond where readings do not grow with their size."""


def make_norm(row_values: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    """What follows a sum in the engine."""
    norm = RMSNorm("norm", row_values, eps=1e-6)
    norm.allocate(dtype, device)
    return norm


def telling(readings: Iterable[Reading], equal: bool, fused: bool = False) -> list[Reading]:
    """Those that stand for what a plan's steps cost.

    Steps with equal groups are replayed, as far as they were measured so. In a ragged step the host
    launches every collective; an all-reduce, which knows no counts, is the same there.
    """
    every = [reading for reading in readings if reading.fused == fused]
    if equal:
        replayed = {reading.op for reading in every if reading.replayed}
        return [
            reading
            for reading in every
            if reading.equal and reading.replayed == (reading.op in replayed)
        ]
    return [
        reading
        for reading in every
        if not reading.replayed and reading.equal == (reading.op is Op.ALL_REDUCE)
    ]


def fit(readings: Sequence[Reading]) -> FittedLink:
    """The link that explains the readings of collectives best.

    Args:
        readings: some of each collective, equal and ragged.
    """
    forms = {}
    for equal in (True, False):
        found = telling(readings, equal)
        forms[equal] = Rates(
            **{op.value: _rate([one for one in found if one.op is op]) for op in OPS}
        )
    return FittedLink(equal=forms[True], ragged=forms[False])


def fit_fused(readings: Sequence[Reading]) -> FusedSums:
    """The same for fused sums.

    Args:
        readings: of which `unfused` says that they can be fitted.
    """
    found = telling(readings, True, fused=True)
    whole, scattered = (_rate([one for one in found if one.op is op]) for op in SUMS)
    launched = telling(readings, False, fused=True)
    host_us = median(one.us - one.norm_us for one in launched)  # most are short: the host's time
    return FusedSums(
        whole=whole,
        scattered=scattered,
        host_us=round(max(host_us, 0.0), 3),
        max_bytes=FUSED_BYTES,
    )


def _rate(readings: Sequence[Reading]) -> Rate:
    """The alpha and the beta with the least sum of squared relative errors, neither negative."""
    times = torch.tensor([reading.us for reading in readings], dtype=torch.float64)
    norms = torch.tensor([reading.norm_us for reading in readings], dtype=torch.float64)
    parts = [(1.0, reading.sent_bytes) for reading in readings]
    columns = torch.tensor(parts, dtype=torch.float64) / times[:, None]
    wanted = (1.0 - norms / times)[:, None]
    alpha, beta = torch.linalg.lstsq(columns, wanted).solution.flatten().tolist()
    if beta <= 0:
        (alpha,), beta = torch.linalg.lstsq(columns[:, :1], wanted).solution[0].tolist(), 0.0
    return Rate(
        alpha_us=round(max(alpha, _LEAST_ALPHA), 3),
        bytes_per_us=round(1 / beta, 1) if beta else _ENDLESS,
    )


def predicted_us(link: Link, equal: bool, reading: Reading) -> float:
    """What a reading should be, with the norm if that is in it."""
    us = link.microseconds(reading.op, equal, reading.members, reading.sent_bytes)
    return reading.norm_us + us


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """How far predictions are from readings, as factors: 1.5 is half too much, or two thirds.

    Attributes:
        median, worst: of |prediction / reading|, whichever way round is above 1.
    """

    median: float
    worst: float

    @classmethod
    def of(cls, link: Link, readings: Sequence[Reading], fused: bool = False) -> "Misses":
        """Of a link's predictions for the readings that a plan's steps are made of."""
        factors = []
        for equal in (True, False):
            for one in telling(readings, equal, fused):
                ratio = predicted_us(link, equal, one) / one.us
                factors.append(max(ratio, 1 / ratio))
        return cls(median=median(factors), worst=max(factors))

    def __str__(self) -> str:
        return f"off by {self.median:.2f}x in the median, {self.worst:.1f}x at worst"


class MeasuredLink(Link):
    """The readings themselves: between two of them a straight line, beyond them the last slope."""

    def __init__(self, readings: Sequence[Reading], fused: bool = False) -> None:
        self._points: dict[tuple[Op, bool, int], list[tuple[float, float]]] = {}
        for equal in (True, False):
            for one in telling(readings, equal, fused):
                key = (one.op, equal, one.members)
                self._points.setdefault(key, []).append((one.sent_bytes, one.us - one.norm_us))
        for points in self._points.values():
            points.sort()

    def microseconds(self, op: Op, equal: bool, members: int, sent_bytes: float) -> float:
        points = self._points[op, equal, members]
        if sent_bytes <= points[0][0]:
            return points[0][1]
        pairs = list(pairwise(points))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if sent_bytes <= pair[1][0]), pairs[-1])
        return y0 + (y1 - y0) * (sent_bytes - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSums(FusedSums):
    """The same of fused sums, beside what was fitted to them."""

    measured: MeasuredLink

    @classmethod
    def of(cls, fitted: FusedSums, readings: Sequence[Reading]) -> "MeasuredSums":
        """From the readings and their fit."""
        return cls(
            whole=fitted.whole,
            scattered=fitted.scattered,
            host_us=fitted.host_us,
            max_bytes=fitted.max_bytes,
            measured=MeasuredLink(readings, fused=True),
        )

    def microseconds(self, op: Op, equal: bool, members: int, sent_bytes: float) -> float:
        return self.measured.microseconds(op, equal, members, sent_bytes)
