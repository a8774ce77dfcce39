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


def route(
    router_logits: Tensor,
    k: int,
    renormalize: bool,
    first: int = 0,
    stop: int | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`topk_softmax` for a rank that holds the experts from `first` to `stop` (None: all).

    real: [T] bool, False for padding rows; None if there are none. Returns weights [T, K] fp32
    and the ids among the rank's experts, [T, K]; -1 for other ranks' experts and for padding.
    """
    num_experts = router_logits.shape[1]
    stop = num_experts if stop is None else stop
    weights, ids = topk_softmax(router_logits, k, renormalize)
    if first > 0 or stop < num_experts:
        ids = ids.masked_fill((ids < first) | (ids >= stop), first - 1) - first
    if real is not None:
        ids = ids.masked_fill(~real.unsqueeze(1), -1)
    return weights, ids
