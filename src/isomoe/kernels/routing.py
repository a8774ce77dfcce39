"""The choice of experts.

T: rows   E: experts   K: experts a row
"""

import torch
from torch import Tensor


def topk_softmax(router_logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The k experts of largest probability, largest first; ties go to the lower index.

    router_logits: [T, E], any float dtype. Returns weights [T, K] fp32 and ids [T, K] int64.
    The weights are the softmax over all E experts, in fp32; with `renormalize`, over the K chosen.
    """
    logits, ids = torch.sort(router_logits.float(), dim=-1, descending=True, stable=True)
    if renormalize:
        weights = torch.softmax(logits[:, :k], dim=-1)
    else:
        weights = torch.softmax(logits, dim=-1)[:, :k].contiguous()
    return weights, ids[:, :k].contiguous()
