"""Gated experts over the experts of one rank, in Triton.

T: rows   K: experts a row   E: local experts   H: hidden size   I: intermediate size
"""

import torch
from torch import Tensor

from isomoe.kernels.experts import PLAIN, ExpertForm
from isomoe.kernels.gpu.experts_few import few_rows_experts
from isomoe.kernels.gpu.experts_grouped import grouped_experts


def fused_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """The weighted sum of each row's local experts, [T, H] in x's dtype; zeros if it has none.

    x: [T, H] bf16 or fp32; gate_up: [E, 2I, H] (gate first) and down: [E, H, I] in x's dtype;
    topk_ids: [T, K] int32 or int64, local ids, distinct in a row, -1 for an expert of another
    rank or a padding row; topk_weights: [T, K] fp32, ignored where id is -1; biases of the form in
    x's dtype. All contiguous.

    Products accumulate in fp32; the activation between them is rounded to x's dtype. The sum over
    experts is fp32, in the order of ids, rounded once. With more than a few thousand pairs an
    expert's output is rounded to x's dtype before. No atomics: equal inputs give equal bits. Which
    kernels run depends on the shapes alone.
    """
    rows, top_k = topk_ids.shape
    if rows == 0:
        return torch.empty_like(x)
    if rows * top_k <= max(top_k, gate_up.shape[0] // 2):
        return few_rows_experts(x, gate_up, down, topk_ids, topk_weights, form)
    return grouped_experts(x, gate_up, down, topk_ids, topk_weights, form)
