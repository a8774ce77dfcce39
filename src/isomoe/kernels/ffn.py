"""Activations of gated feed-forward layers.

T: rows   I: intermediate size
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SwiGlu:
    """silu(gate) * up.

    Source: Shazeer, GLU Variants Improve Transformer (2020); the limit is Step-3.5's.

    Attributes:
        limit: caps silu(gate) from above and up on both sides; None for no limit.
    """

    limit: float | None = None


@dataclass(frozen=True, slots=True)
class ClampedSwiGlu:
    """gate * sigmoid(alpha * gate) * (up + 1), of clamped gate and up.

    Source: gpt-oss model card (2025).

    Attributes:
        limit: caps gate from above and up on both sides, before anything else.
    """

    limit: float = 7.0
    alpha: float = 1.702


Activation = SwiGlu | ClampedSwiGlu
SWIGLU = SwiGlu()


def gated(x: Tensor, activation: Activation) -> Tensor:
    """Gate and up to one. x: [..., 2I], gate first; returns [..., I] in x's dtype."""
    if activation == SWIGLU:
        return silu_and_mul(x)
    gate, up = x.chunk(2, dim=-1)
    limit = activation.limit
    if isinstance(activation, ClampedSwiGlu):
        gate, up = gate.clamp(max=limit), up.clamp(-activation.limit, limit)
        return gate * torch.sigmoid(gate * activation.alpha) * (up + 1)
    assert limit is not None
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [..., 2I], gate first, bf16 or fp32; returns [..., I] in x's dtype.

    silu is computed in fp32 and rounded to x's dtype before the product.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
