"""RMS norm.

T: rows   H: normed (last) dim
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales each row to unit root mean square, then by `weight`.

    x: [..., H], any float dtype (the residual stream is fp32 on CPUs); weight: [H], or [heads, H]
    for x of [T, heads, H] whose heads differ, as queries and keys that are normed in one call.
    Returns [..., H] in weight's dtype. The statistic and the scaling are fp32; the row is rounded
    to weight's dtype before the product with `weight`, as in Qwen3MoeRMSNorm.
    """
    x = x.float()
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (x * scale).to(weight.dtype)
    return normed.mul_(weight)


def add_rms_norm(
    residual: Tensor, addend: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream's step from one read to the next: adds, then norms the sum.

    residual, addend: [T, H]. Returns the sum in residual's dtype, and `rms_norm` of that.
    """
    total = (residual + addend).to(residual.dtype)
    return total, rms_norm(total, weight, eps)
