"""Rotary position embedding, NeoX half style.

T: rows   d: head dim   P: positions
"""

import torch
from torch import Tensor


def rope_table(
    positions_max: int, d: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [P, d] fp32, for positions 0 to positions_max - 1.

    Column i and column i + d/2 turn by position * theta^(-2i/d). The first half of `sin` is
    negated: the sign of the rotation is in the table, so that `apply_rope` needs three operations.
    """
    exponent = torch.arange(0, d, 2, dtype=torch.float64, device=device) / d
    position = torch.arange(positions_max, dtype=torch.float64, device=device)
    angle = torch.outer(position, theta**-exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).float(), torch.cat((-sin, sin), -1).float()


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys. q: [T, heads, d]; k: [T, kv heads, d]; returns their like.

    cos, sin: [T, d] fp32, the rows of `rope_table` at each row's position. Computed in fp32.
    """
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` of one tensor: queries and keys that lie side by side as [T, heads + kv, d].

    cos, sin: [T, d] fp32. Half the calls of `apply_rope`; the same values.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    swapped = torch.roll(x, x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
