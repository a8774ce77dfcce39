"""SwiGLU experts by torch's grouped product, to compare with."""

import torch
from torch import Tensor

from isomoe.kernels.gpu.align import align
from isomoe.kernels.gpu.combine import combine
from isomoe.kernels.gpu.ffn import silu_and_mul


def grouped_mm_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """`fused_experts` by torch's grouped product, on sorted copies of the rows."""
    experts, top_k = gate_up.shape[0], topk_ids.shape[1]
    aligned = align(topk_ids, experts, 1)
    # Slots beyond the last hold anything.
    sorted_rows = (aligned.sorted_pairs // top_k).clamp_(0, x.shape[0] - 1)
    inputs = x.index_select(0, sorted_rows)
    hidden = torch._grouped_mm(inputs, gate_up.transpose(1, 2), offs=aligned.ends)
    outputs = torch._grouped_mm(silu_and_mul(hidden), down.transpose(1, 2), offs=aligned.ends)
    return combine(outputs, aligned.slots, topk_weights, x.dtype, sorted_order=True)
