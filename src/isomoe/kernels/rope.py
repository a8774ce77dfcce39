"""Rotary position embedding.

T: rows   d: head dim   r: dims that turn, at the front of a head   P: positions
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by a factor. Source: Chen et al., Position Interpolation (2023)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Slow frequencies divided by a factor, fast ones kept. Source: Llama 3.1 (2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Frequencies that turn less than `beta_slow` times in the original context are divided by the
    factor, those that turn more than `beta_fast` times are kept, with a ramp between.

    Source: Peng et al., YaRN (2023).

    Attributes:
        truncate: whether the ramp begins and ends at whole dims.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


Scaling = LinearScaling | Llama3 | Yarn


def frequencies(r: int, theta: float, scaling: Scaling | None = None) -> Tensor:
    """How far each pair of dims turns a position: [r / 2] fp64, radians."""
    plain = theta ** -(torch.arange(0, r, 2, dtype=torch.float64) / r)
    match scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3():
            turns = scaling.original_positions * plain / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        case Yarn():
            fast, slow = (
                r
                * math.log(scaling.original_positions / (beta * 2 * math.pi))
                / 2
                / math.log(theta)
                for beta in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                fast, slow = math.floor(fast), math.ceil(slow)
            fast, slow = max(fast, 0), min(slow, r - 1)
            slow = slow + 0.001 if fast == slow else slow
            kept = 1 - ((torch.arange(r // 2) - fast) / (slow - fast)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rope_rows(positions: Tensor, turns: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, r] fp32, at `positions` [T].

    turns: of `frequencies`, on the same device. Column i and column i + r/2 turn together. The
    first half of `sin` is negated: the sign of the rotation is in the table, so that `rotate`
    needs three operations.
    """
    angle = torch.outer(positions.double(), turns)
    cos, sin = angle.cos() * amplitude, angle.sin() * amplitude
    return torch.cat((cos, cos), -1).float(), torch.cat((-sin, sin), -1).float()


def rope_table(
    positions_max: int, d: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """`rope_rows` of positions 0 to positions_max - 1, without scaling."""
    return rope_rows(torch.arange(positions_max, device=device), frequencies(d, theta).to(device))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turns the first r dims of every head. x: [T, heads, d]; the others pass.

    cos, sin: [T, r] fp32 of `rope_rows`, for each row's position. Computed in fp32.

    Args:
        interleaved: dims 2i and 2i + 1 are a pair, not i and i + r/2. They come out as pairs of
            the other kind: queries and keys alike, so that their products are the same.
    """
    r = cos.shape[-1]
    if r < x.shape[-1]:
        turned = rotate(x[..., :r], cos, sin, interleaved)
        return torch.cat((turned, x[..., r:]), -1)
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    swapped = torch.roll(x, r // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
