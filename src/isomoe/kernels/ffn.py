"""SwiGLU's activation.

T: rows   I: intermediate size
"""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [..., 2I], gate first, bf16 or fp32; returns [..., I] in x's dtype.

    silu is computed in fp32 and rounded to x's dtype before the product.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
