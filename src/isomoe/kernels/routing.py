"""The choice of experts.

T: rows   E: experts   K: experts a row   G: groups of experts
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a model picks experts, and with which weights.

    Sources: Switch Transformers (2021) for softmax; DeepSeek-V2 (2024) for groups; DeepSeek-V3
    (2024) for sigmoid scores with a bias that only the choice sees.

    Attributes:
        top_k: experts a row.
        scoring: what makes scores of logits, over all experts.
        renormalize: divide the chosen scores by their sum.
        scale: multiplies the weights at the end (`routed_scaling_factor`).
        num_groups: experts stand in so many groups of neighbours;
        kept_groups: and only those of the best so many groups can be chosen.
        group_score: a group's score: its best choice, or the sum of its two best.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"


def choose(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each row, best first; ties go to the lower index.

    logits: [T, E], any float dtype; bias: [E] fp32, added to the scores for the choice alone.
    Returns weights [T, K] fp32 and ids [T, K] int64. All in fp32.
    """
    logits = logits.float()
    softmax = routing.scoring == "softmax"
    if bias is None and routing.num_groups == 1:
        # Scores are in the order of logits, which tell more of them apart.
        chosen, ids = _largest(logits, routing.top_k)
        if softmax and routing.renormalize:
            return torch.softmax(chosen, -1) * routing.scale, ids
        if softmax:
            weights = torch.exp(chosen - torch.logsumexp(logits, -1, keepdim=True))
        else:
            weights = torch.sigmoid(chosen)
    else:
        scores = torch.softmax(logits, -1) if softmax else torch.sigmoid(logits)
        choice = scores if bias is None else scores + bias
        if routing.num_groups > 1:
            choice = _within_groups(choice, routing)
        ids = _largest(choice, routing.top_k)[1]
        weights = scores.gather(1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale, ids


def route(
    logits: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    first: int = 0,
    stop: int | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`choose` for a rank that holds the experts from `first` to `stop` (None: all).

    real: [T] bool, False for padding rows; None if there are none. Returns weights [T, K] fp32
    and the ids among the rank's experts, [T, K]; -1 for other ranks' experts and for padding.
    """
    num_experts = logits.shape[1]
    stop = num_experts if stop is None else stop
    weights, ids = choose(logits, routing, bias)
    if first > 0 or stop < num_experts:
        ids = ids.masked_fill((ids < first) | (ids >= stop), first - 1) - first
    if real is not None:
        ids = ids.masked_fill(~real.unsqueeze(1), -1)
    return weights, ids


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are; a stable sort, so that ties are settled."""
    values, ids = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), ids[:, :k].contiguous()


def _within_groups(choice: Tensor, routing: Routing) -> Tensor:
    """`choice` with -inf outside of the groups that are kept."""
    experts = choice.shape[1] // routing.num_groups
    grouped = choice.view(len(choice), routing.num_groups, experts)
    if routing.group_score == "max":
        score = grouped.amax(-1)
    else:
        score = grouped.topk(2, dim=-1).values.sum(-1)
    kept = _largest(score, routing.kept_groups)[1]
    allowed = torch.zeros_like(score, dtype=torch.bool).scatter_(1, kept, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).view_as(choice)
