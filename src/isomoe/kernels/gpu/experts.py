"""Gated experts over the experts of one rank, in Triton.

T: rows   K: experts a row   E: local experts   H: hidden size   I: intermediate size
"""

import torch
from torch import Tensor

from isomoe.kernels.block_fp8 import ExpertMatrices, ExpertRows, plain_rows
from isomoe.kernels.experts import PLAIN, ExpertForm
from isomoe.kernels.gpu.expert_operands import MatrixOperand, RowOperand
from isomoe.kernels.gpu.experts_few import few_rows_experts
from isomoe.kernels.gpu.experts_grouped import grouped_experts


def fused_experts(
    x: ExpertRows,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """The weighted sum of each row's local experts, [T, H] in x's dtype; zeros if it has none.

    x: [T, H] bf16 or fp32; gate_up: [E, 2I, H] (gate first) and down: [E, H, I] in x's dtype;
    topk_ids: [T, K] int32 or int64, local ids, distinct in a row, -1 for an expert of another
    rank or a padding row; topk_weights: [T, K] fp32, ignored where id is -1; biases of the form in
    x's dtype. All contiguous. In FP8, gate_up is [E, 2, I, H].

    Products accumulate in fp32; the activation between them is rounded to x's dtype. The sum over
    experts is fp32, in the order of ids, rounded once. With more than a few thousand pairs an
    expert's output is rounded to x's dtype before. No atomics: equal inputs give equal bits. Which
    kernels run depends on the shapes alone.

    Weights in FP8 become x's dtype on the way to a product, as if they had been dequantised before;
    of few rows, codes are multiplied and the sums scaled, which rounds once less. With rows in FP8
    too it is a product of FP8: the tensor core's sum of up to 128 products, which has fewer bits
    than fp32, is scaled and added in fp32.
    """
    rows, top_k = topk_ids.shape
    # Rows in FP8 are of use to weights in FP8 alone.
    x = plain_rows(x) if isinstance(gate_up, Tensor) else x
    operands = RowOperand.of(x), MatrixOperand.of(gate_up), MatrixOperand.of(down)
    given, _, matrices = operands
    if rows == 0:
        return torch.empty_like(given.values, dtype=given.dtype)
    if rows * top_k <= max(top_k, matrices.values.shape[0] // 2):
        return few_rows_experts(*operands, topk_ids, topk_weights, form)
    return grouped_experts(*operands, topk_ids, topk_weights, form)
