"""Matrix products with weights laid out once for the CPU.

T: rows   N: outputs   K: inputs
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_linear(weight: Tensor) -> Tensor:
    """The weight in oneDNN's blocked layout, for `linear` alone; the weight itself elsewhere.

    weight: [N, K]. Only bf16 on a CPU where oneDNN has bf16 is laid out anew: F.linear there
    rearranges the weight at each call. The result has a shape and a dtype but no strides, cannot
    be sliced, and takes as much memory as the weight, which the caller may then drop.
    """
    if not packs(weight):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, accumulated in fp32, in x's dtype. x: [T, K]; weight: [N, K], plain or packed.

    A packed weight takes x in bf16 only.
    """
    if weight.is_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], None)
        return out
    return F.linear(x, weight)


def packs(weight: Tensor) -> bool:
    """Whether `pack_linear` lays this weight out anew."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
