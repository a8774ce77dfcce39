"""Experts of many rows: grouped matrix products over tiles of one expert's rows.

T: rows   K: experts a row   P: pairs, T x K   E: local experts   H: hidden size
I: intermediate size   S: slots, pairs in the order of `align`

With few rows an expert the weights' stream is the cost. Then they are the first operand (SWAP):
64 or more of their rows fill a warpgroup's matrix instruction, which a tile of 16 rows cannot.
With many rows it is a plain matrix product, bound by arithmetic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from isomoe.kernels.experts import PLAIN, ExpertForm
from isomoe.kernels.gpu.align import Aligned, align
from isomoe.kernels.gpu.combine import combine
from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.expert_operands import (
    MatrixOperand,
    RowOperand,
    add_product,
    dequantized,
    empty_sum,
    load_scales,
    product_of,
    scales_of,
    split_pairs,
    tuned_shape,
)
from isomoe.kernels.gpu.ffn import activated, activation_kind
from isomoe.kernels.gpu.grouped_tiles import FP32, default_down, default_gate_up
from isomoe.kernels.gpu.launch import overlapped

GATE_UP = "experts_grouped_gate_up"
DOWN = "experts_grouped_down"

_EXACT_PAIRS = 4096
"""Up to so many, the pairs' outputs are fp32; of more, the bytes would cost too much."""


def grouped_experts(
    x: RowOperand,
    gate_up: MatrixOperand,
    down: MatrixOperand,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """`fused_experts` for any number of rows."""
    rows, hidden = x.values.shape
    experts, _, size = down.values.shape
    top_k = topk_ids.shape[1]
    pairs = rows * top_k
    sizes = (experts, top_k, hidden, size)
    exact = x.dtype == torch.float32
    widths = gate_up.values.itemsize, x.values.itemsize
    first = FP32 if exact else default_gate_up(pairs, experts, widths)
    first = find(GATE_UP, tuned_shape(widths, *sizes), rows, first)
    widths = down.values.itemsize, x.dtype.itemsize
    second = FP32 if exact else default_down(pairs, experts, widths)
    second = find(DOWN, tuned_shape(widths, *sizes), rows, second)
    aligned = align(topk_ids, experts, max(first["BLOCK_M"], second["BLOCK_M"]))
    act = _gate_up(x, gate_up, aligned, topk_weights, form, first)
    dtype = torch.float32 if pairs <= _EXACT_PAIRS else x.dtype
    outputs = torch.empty((pairs, hidden), dtype=dtype, device=topk_ids.device)
    _down(act, down, aligned, form, outputs, second)
    return combine(
        outputs,
        aligned.slots,
        topk_weights,
        x.dtype,
        sorted_order=False,
        weighted=not form.scales_input,
    )


def _gate_up(
    x: RowOperand,
    weight: MatrixOperand,
    aligned: Aligned,
    topk_weights: Tensor,
    form: ExpertForm,
    config: Config,
) -> Tensor:
    """[S, I] in x's dtype: gate and up to one, of each slot; anything where it is empty."""
    hidden = weight.columns
    size = weight.values[0].numel() // (2 * hidden)
    slots = aligned.max_tiles * aligned.block
    act = torch.empty((slots, size), dtype=x.dtype, device=topk_weights.device)
    config = _usable(config, weight, x.run)
    tiles_n = triton.cdiv(size, config["BLOCK_N"])
    split = aligned.block // config["BLOCK_M"]
    max_tiles = aligned.max_tiles * split
    _gate_up_kernel[(max_tiles * tiles_n,)](
        x.values,
        x.scales,
        _descriptor(weight, config, 2 if weight.block[1] else 1),
        weight.scales,
        topk_weights,
        topk_weights if form.gate_up_bias is None else form.gate_up_bias,
        act,
        aligned.sorted_pairs,
        aligned.tile_experts,
        aligned.slots.numel(),
        max_tiles,
        TOP_K=topk_weights.shape[1],
        H=hidden,
        SIZE=size,
        SPLIT=split,
        SCALED=form.scales_input,
        BIASED=form.gate_up_bias is not None,
        X_RUN=x.run,
        RUN_N=weight.block[0],
        RUN_K=weight.block[1],
        **activation_kind(form.activation),
        **config,
        **overlapped(),
    )
    return act


def _down(
    act: Tensor,
    weight: MatrixOperand,
    aligned: Aligned,
    form: ExpertForm,
    outputs: Tensor,
    config: Config,
) -> None:
    """Writes each pair's row of `outputs` [P, H], but those without a local expert."""
    _, hidden, size = weight.values.shape
    config = _usable(config, weight)
    split = aligned.block // config["BLOCK_M"]
    max_tiles = aligned.max_tiles * split
    tiles_n = triton.cdiv(hidden, config["BLOCK_N"])
    _down_kernel[(max_tiles * tiles_n,)](
        act,
        _descriptor(weight, config),
        weight.scales,
        act if form.down_bias is None else form.down_bias,
        outputs,
        aligned.sorted_pairs,
        aligned.tile_experts,
        aligned.slots.numel(),
        max_tiles,
        H=hidden,
        SIZE=size,
        SPLIT=split,
        BIASED=form.down_bias is not None,
        RUN_N=weight.block[0],
        RUN_K=weight.block[1],
        **config,
        **overlapped(),
    )


def _usable(config: Config, weight: MatrixOperand, x_run: int = 0) -> Config:
    """`config`, cut to columns that share their scales, and without the bulk copy engine for rows
    that it cannot address."""
    values = weight.values
    steps = [step for step in (config["BLOCK_K"], weight.step, x_run) if step]
    aligned = values.dtype != torch.float32 and weight.columns * values.itemsize % 16 == 0
    return {
        **config,
        "BLOCK_K": min(steps),
        "TMA": int(bool(config["TMA"]) and aligned),
    }


def _descriptor(weight: MatrixOperand, config: Config, matrices: int = 1) -> Any:
    """Weights as the kernels take them: a pointer, or a descriptor of all their rows in order, in
    tiles of BLOCK_N rows of each of the matrices whose rows take turns."""
    if not config["TMA"]:
        return weight.values
    inner = weight.columns
    rows = weight.values.numel() // inner
    tile = [matrices * config["BLOCK_N"], config["BLOCK_K"]]
    return TensorDescriptor(weight.values, [rows, inner], [inner, 1], tile)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of(pid, max_tiles, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """(m, n): GROUP_M row tiles take turns on a tile of weights, which stays in the L2 cache."""
    width = GROUP_M * TILES_N
    first = pid // width * GROUP_M
    height = tl.minimum(max_tiles - first, GROUP_M)
    return first + pid % width % height, pid % width // height


@triton.jit  # type: ignore[untyped-decorator]
def _load_weights(  # type: ignore[no-untyped-def]
    weight, tile, first_row, start, K: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """[BLOCK_N, BLOCK_K] from column `start`. weight: the descriptor, or else tile: pointers."""
    if TMA:
        out = weight.load([first_row, start])
    elif K % BLOCK_K == 0:
        out = tl.load(tile + start)
    else:
        inside = start + tl.arange(0, BLOCK_K) < K
        out = tl.load(tile + start, mask=inside[None, :], other=0.0)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _load_rows(tile, filled, inner, start, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_M, BLOCK_K] from column `start`; an empty slot reads nothing."""
    if K % BLOCK_K == 0:
        out = tl.load(tile + start, mask=filled[:, None], other=0.0)
    else:
        inside = filled[:, None] & (start + inner < K)[None, :]
        out = tl.load(tile + start, mask=inside, other=0.0)
    return out


@triton.jit(do_not_specialize=["pairs", "max_tiles"])  # type: ignore[untyped-decorator]
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_scales_ptr,
    weight,
    scales_ptr,
    weights_ptr,
    bias_ptr,
    act_ptr,
    sorted_ptr,
    tile_experts_ptr,
    pairs,
    max_tiles,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    X_RUN: tl.constexpr,
    RUN_N: tl.constexpr,
    RUN_K: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    TILES_N: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = _tile_of(tl.program_id(0), max_tiles, TILES_N, GROUP_M)
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Both loads before the branch: their latencies overlap.
    expert = tl.load(tile_experts_ptr + tile_m // SPLIT)
    pair = tl.load(sorted_ptr + slot)
    if expert < 0 or (SPLIT > 1 and tl.load(sorted_ptr + tile_m * BLOCK_M) >= pairs):
        return
    filled = pair < pairs
    row = tl.where(filled, pair // TOP_K, 0)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + row.to(tl.int64)[:, None] * H + inner[None, :]
    unit = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if RUN_K:
        # Rows of gate and up take turns, so that one product has both.
        PAIRS: tl.constexpr = 2 * BLOCK_N
        first = (expert * SIZE + tile_n * BLOCK_N) * 2
        tile = 0
        if not TMA:
            pair_read = tl.minimum(tile_n * PAIRS + tl.arange(0, PAIRS), 2 * SIZE - 1)
            tile = weight + (expert.to(tl.int64) * (2 * SIZE) + pair_read)[:, None] * H
            tile += inner[None, :]
        RUNS: tl.constexpr = ((SIZE + RUN_N - 1) // RUN_N) * ((H + RUN_K - 1) // RUN_K)
        gate_scales = scales_ptr + expert.to(tl.int64) * (2 * RUNS)
        up_scales = gate_scales + RUNS
        if X_RUN:
            x_scales = x_scales_ptr + row.to(tl.int64) * ((H + X_RUN - 1) // X_RUN)
            # One scale where a tile's rows share it.
            SCALES: tl.constexpr = 1 if RUN_N % BLOCK_N == 0 else BLOCK_N
            some = tile_n * BLOCK_N + tl.arange(0, SCALES)
            gate = empty_sum(BLOCK_M, BLOCK_N, SWAP)
            up = empty_sum(BLOCK_M, BLOCK_N, SWAP)
            x_by = tl.load(x_scales)
            gate_by = load_scales(gate_scales, some, 0, SIZE, H, RUN_N, RUN_K)
            up_by = load_scales(up_scales, some, 0, SIZE, H, RUN_N, RUN_K)
            for start in range(0, H, BLOCK_K):
                # The next ones are on their way while the product is made.
                ahead = tl.minimum(start + BLOCK_K, H - 1)
                next_x_by = tl.load(x_scales + ahead // X_RUN)
                next_gate_by = load_scales(gate_scales, some, ahead, SIZE, H, RUN_N, RUN_K)
                next_up_by = load_scales(up_scales, some, ahead, SIZE, H, RUN_N, RUN_K)
                x = _load_rows(x_tile, filled, inner, start, H, BLOCK_K)
                weights = _load_weights(weight, tile, first, start, H, BLOCK_K, TMA)
                more_gate, more_up = split_pairs(
                    product_of(x, weights, SWAP), BLOCK_M, BLOCK_N, SWAP
                )
                gate += more_gate * scales_of(x_by, gate_by, SWAP)
                up += more_up * scales_of(x_by, up_by, SWAP)
                x_by, gate_by, up_by = next_x_by, next_gate_by, next_up_by
        else:
            both = empty_sum(BLOCK_M, PAIRS, SWAP)
            for start in range(0, H, BLOCK_K):
                x = _load_rows(x_tile, filled, inner, start, H, BLOCK_K)
                weights = _load_weights(weight, tile, first, start, H, BLOCK_K, TMA)
                gate_by = load_scales(gate_scales, unit, start, SIZE, H, RUN_N, RUN_K)
                up_by = load_scales(up_scales, unit, start, SIZE, H, RUN_N, RUN_K)
                weights = dequantized(weights, tl.interleave(gate_by, up_by), x.dtype)
                both = add_product(x, weights, both, SWAP)
            gate, up = split_pairs(both, BLOCK_M, BLOCK_N, SWAP)
    else:
        first_gate = expert * (2 * SIZE) + tile_n * BLOCK_N
        gate_tile = 0
        up_tile = 0
        if not TMA:
            unit_read = unit if SIZE % BLOCK_N == 0 else tl.minimum(unit, SIZE - 1)
            gate_rows = expert.to(tl.int64) * (2 * SIZE) + unit_read
            gate_tile = weight + gate_rows[:, None] * H + inner[None, :]
            up_tile = gate_tile + SIZE * H
        gate = empty_sum(BLOCK_M, BLOCK_N, SWAP)
        up = empty_sum(BLOCK_M, BLOCK_N, SWAP)
        for start in range(0, H, BLOCK_K):
            x = _load_rows(x_tile, filled, inner, start, H, BLOCK_K)
            gate_weights = _load_weights(weight, gate_tile, first_gate, start, H, BLOCK_K, TMA)
            first_up = first_gate + SIZE
            up_weights = _load_weights(weight, up_tile, first_up, start, H, BLOCK_K, TMA)
            gate = add_product(x, gate_weights, gate, SWAP)
            up = add_product(x, up_weights, up, SWAP)
    if SCALED:
        # The products are linear in x.
        by = tl.load(weights_ptr + pair, mask=filled, other=0.0)
        by = by[None, :] if SWAP else by[:, None]
        gate *= by
        up *= by
    if BIASED:
        bias = bias_ptr + expert.to(tl.int64) * (2 * SIZE) + tl.minimum(unit, SIZE - 1)
        gate_bias = tl.load(bias).to(tl.float32)
        up_bias = tl.load(bias + SIZE).to(tl.float32)
        gate += gate_bias[:, None] if SWAP else gate_bias[None, :]
        up += up_bias[:, None] if SWAP else up_bias[None, :]
    act = activated(gate, up, KIND, LIMIT, ALPHA).to(act_ptr.dtype.element_ty)
    if SWAP:
        act = act.T
    out = act_ptr + slot.to(tl.int64)[:, None] * SIZE + unit[None, :]
    if SIZE % BLOCK_N == 0:
        tl.store(out, act)
    else:
        tl.store(out, act, mask=(unit < SIZE)[None, :])


@triton.jit(do_not_specialize=["pairs", "max_tiles"])  # type: ignore[untyped-decorator]
def _down_kernel(  # type: ignore[no-untyped-def]
    act_ptr,
    weight,
    scales_ptr,
    bias_ptr,
    out_ptr,
    sorted_ptr,
    tile_experts_ptr,
    pairs,
    max_tiles,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIASED: tl.constexpr,
    RUN_N: tl.constexpr,
    RUN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """SPLIT: tiles to one of the alignment; those at its end may be empty."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    TILES_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = _tile_of(tl.program_id(0), max_tiles, TILES_N, GROUP_M)
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.load(tile_experts_ptr + tile_m // SPLIT)
    pair = tl.load(sorted_ptr + slot)
    if expert < 0 or (SPLIT > 1 and tl.load(sorted_ptr + tile_m * BLOCK_M) >= pairs):
        return
    inner = tl.arange(0, BLOCK_K)
    act_tile = act_ptr + slot.to(tl.int64)[:, None] * SIZE + inner[None, :]
    unit = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_row = expert * H + tile_n * BLOCK_N
    weight_tile = 0
    if not TMA:
        unit_read = unit if H % BLOCK_N == 0 else tl.minimum(unit, H - 1)
        weight_rows = expert.to(tl.int64) * H + unit_read
        weight_tile = weight + weight_rows[:, None] * SIZE + inner[None, :]
    if RUN_K:
        RUNS: tl.constexpr = ((H + RUN_N - 1) // RUN_N) * ((SIZE + RUN_K - 1) // RUN_K)
        scales = scales_ptr + expert.to(tl.int64) * RUNS

    out = empty_sum(BLOCK_M, BLOCK_N, SWAP)
    for start in range(0, SIZE, BLOCK_K):
        if SIZE % BLOCK_K == 0:
            act = tl.load(act_tile + start)
        else:
            act = tl.load(act_tile + start, mask=(start + inner < SIZE)[None, :], other=0.0)
        weights = _load_weights(weight, weight_tile, first_row, start, SIZE, BLOCK_K, TMA)
        if RUN_K:
            by = load_scales(scales, unit, start, H, SIZE, RUN_N, RUN_K)
            weights = dequantized(weights, by, act.dtype)
        out = add_product(act, weights, out, SWAP)
    if BIASED:
        bias_at = bias_ptr + expert.to(tl.int64) * H + tl.minimum(unit, H - 1)
        bias = tl.load(bias_at).to(tl.float32)
        out += bias[:, None] if SWAP else bias[None, :]
    result = out.to(out_ptr.dtype.element_ty)
    if SWAP:
        result = result.T
    filled = pair < pairs
    at = out_ptr + tl.where(filled, pair, 0).to(tl.int64)[:, None] * H + unit[None, :]
    if H % BLOCK_N == 0:
        tl.store(at, result, mask=filled[:, None])
    else:
        tl.store(at, result, mask=filled[:, None] & (unit < H)[None, :])
