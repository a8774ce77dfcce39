"""Cases of the experts' kernels: with weights and rows in the model's dtype, and in FP8.

T: rows   E: experts   H: hidden size   I: width of an expert
"""

from dataclasses import replace

import torch
from torch import Tensor

from isomoe.bench.kernel_setting import Prepared, Run, Setting
from isomoe.kernels import WEIGHT_BLOCK, BlockFp8, Fp8Rows, pack_fp8
from isomoe.kernels import experts as plain_experts
from isomoe.kernels import routing as plain_routing


def fused_experts(at: Setting) -> Prepared:
    """As the checkpoint's dtype is."""
    from isomoe.kernels.gpu.experts import fused_experts

    return _experts(at, fused_experts)


def grouped_mm(at: Setting) -> Prepared:
    """The same by torch's grouped product."""
    from isomoe.kernels.gpu.experts_torch import grouped_mm_experts

    return _experts(at, grouped_mm_experts)


def fp8_weights(at: Setting) -> Prepared:
    """Weights in FP8, rows as they come."""
    one = fused_experts(at)
    _, gate_up, down, *_ = one.inputs[0]  # all copies have the same
    matrices = _in_blocks(gate_up, paired=True), _in_blocks(down)
    inputs = [(x, *matrices, ids, weights) for x, _, _, ids, weights in one.inputs]
    rows = 2 * at.rows * at.sizes.hidden * at.dtype.itemsize
    num_bytes = (one.num_bytes - rows) / at.dtype.itemsize + rows
    return replace(one, inputs=inputs, num_bytes=num_bytes)


def fp8_weights_and_rows(at: Setting) -> Prepared:
    """Both in FP8: the first product is one of FP8."""
    one = fp8_weights(at)
    inputs = []
    for x, *others in one.inputs:
        codes, scales = pack_fp8(x)
        inputs.append((Fp8Rows(codes=codes, scales=scales, dtype=x.dtype), *others))
    saved = at.rows * at.sizes.hidden * (at.dtype.itemsize - 1)
    return replace(one, inputs=inputs, num_bytes=one.num_bytes - saved)


def _in_blocks(weight: Tensor, paired: bool = False) -> BlockFp8:
    """Expert by expert: in fp32 all would take gigabytes. paired: of gate and up."""
    experts, rows, columns = weight.shape
    shape = (experts, 2, rows // 2, columns) if paired else weight.shape
    block = (WEIGHT_BLOCK, WEIGHT_BLOCK)
    whole = BlockFp8.zeros(*shape, block=block, device=weight.device, paired=paired)
    for index, one in enumerate(weight.view(shape)):
        part = BlockFp8.of(one, block)
        whole.codes[index] = part.codes
        whole.scales[index] = part.scales
    return whole


def _experts(at: Setting, run: Run) -> Prepared:
    sizes = at.sizes
    gate_up = at.matrix(sizes.experts, 2 * sizes.width, sizes.hidden)
    down = at.matrix(sizes.experts, sizes.hidden, sizes.width)
    inputs, distinct = [], 0
    for _ in range(at.copies):
        logits = torch.randn(at.rows, sizes.experts, device=at.device)
        weights, ids = plain_routing.route(logits, sizes.routing)
        distinct += int((torch.bincount(ids.flatten(), minlength=sizes.experts) > 0).sum())
        inputs.append((at.normal(at.rows, sizes.hidden), gate_up, down, ids.int(), weights))
    expert = 3 * sizes.hidden * sizes.width
    values = distinct / at.copies * expert + 2 * at.rows * sizes.hidden
    return Prepared(
        inputs=inputs,
        run=run,
        twin=_twin,
        num_bytes=values * at.dtype.itemsize,
        flops=2.0 * at.rows * sizes.routing.top_k * expert,
    )


def _twin(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    return plain_experts.fused_experts(x, gate_up, down, topk_ids.long(), topk_weights)
