"""Matrix products with weights laid out once for the CPU.

T: rows   N: outputs   K: inputs
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS = 2
"""Up to this many rows a small matrix is faster in fp32, whose products start at once."""
_SMALL = 192 * 1024
"""Values of a small matrix. One of 256 x 256 takes 4 us a row in fp32, 19 us in oneDNN's bf16."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A bf16 weight [N, K] laid out for `linear` on a CPU, made by `pack_linear`."""

    blocked: Tensor
    """In oneDNN's blocked layout: F.linear would rearrange the weight at each call."""
    exact: Tensor | None
    """A small matrix in fp32 too, for few rows; None for others."""


def pack_linear(weight: Tensor) -> PackedLinear | Tensor:
    """The weight laid out for `linear` alone where that is faster; the weight itself elsewhere.

    weight: [N, K]. Only bf16 on a CPU where oneDNN has bf16 is laid out anew; the caller may then
    drop the weight.
    """
    if not packs(weight):
        return weight
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return PackedLinear(blocked, weight.float() if weight.numel() <= _SMALL else None)


def linear(x: Tensor, weight: PackedLinear | Tensor) -> Tensor:
    """x @ weight.T, accumulated in fp32, in x's dtype. x: [T, K]; weight: [N, K], plain or packed.

    A packed weight takes x in bf16 only.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    if weight.exact is not None and x.shape[0] <= _FEW_ROWS:
        return F.linear(x.float(), weight.exact).to(x.dtype)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.blocked, None, "none", [], None)
    return out


def packs(weight: Tensor) -> bool:
    """Whether `pack_linear` lays this weight out anew."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
