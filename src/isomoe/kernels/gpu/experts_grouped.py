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
from isomoe.kernels.gpu.ffn import activated, activation_kind
from isomoe.kernels.gpu.grouped_tiles import FP32, default_down, default_gate_up
from isomoe.kernels.gpu.launch import overlapped

GATE_UP = "experts_grouped_gate_up"
DOWN = "experts_grouped_down"

_EXACT_PAIRS = 4096
"""Up to so many, the pairs' outputs are fp32; of more, the bytes would cost too much."""


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """`fused_experts` for any number of rows."""
    rows, hidden = x.shape
    experts, _, size = down.shape
    top_k = topk_ids.shape[1]
    pairs = rows * top_k
    shape: tuple[int, ...] = (experts, top_k, hidden, size)
    exact = x.dtype == torch.float32
    if exact:
        shape = (*shape, x.dtype.itemsize)  # has tuned entries of its own
    config = FP32 if exact else default_gate_up(pairs, experts)
    config = find(GATE_UP, shape, rows, config)
    aligned = align(topk_ids, experts, config["BLOCK_M"])
    act = _gate_up(x, gate_up, aligned, topk_weights, form, config)
    config = find(DOWN, shape, rows, FP32 if exact else default_down(pairs, experts))
    dtype = torch.float32 if pairs <= _EXACT_PAIRS else x.dtype
    outputs = torch.empty((pairs, hidden), dtype=dtype, device=x.device)
    _down(act, down, aligned, form, outputs, config)
    return combine(
        outputs,
        aligned.slots,
        topk_weights,
        x.dtype,
        sorted_order=False,
        weighted=not form.scales_input,
    )


def _gate_up(
    x: Tensor,
    weight: Tensor,
    aligned: Aligned,
    topk_weights: Tensor,
    form: ExpertForm,
    config: Config,
) -> Tensor:
    """[S, I] in x's dtype: gate and up to one, of each slot; anything where it is empty."""
    _, twice, hidden = weight.shape
    size = twice // 2
    act = torch.empty((aligned.max_tiles * aligned.block, size), dtype=x.dtype, device=x.device)
    config = _usable(config, x.dtype, hidden)
    tiles_n = triton.cdiv(size, config["BLOCK_N"])
    _gate_up_kernel[(aligned.max_tiles * tiles_n,)](
        x,
        _operand(weight, config),
        topk_weights,
        weight if form.gate_up_bias is None else form.gate_up_bias,
        act,
        aligned.sorted_pairs,
        aligned.tile_experts,
        aligned.slots.numel(),
        aligned.max_tiles,
        TOP_K=topk_weights.shape[1],
        H=hidden,
        SIZE=size,
        SCALED=form.scales_input,
        BIASED=form.gate_up_bias is not None,
        **activation_kind(form.activation),
        **config,
        **overlapped(),
    )
    return act


def _down(
    act: Tensor,
    weight: Tensor,
    aligned: Aligned,
    form: ExpertForm,
    outputs: Tensor,
    config: Config,
) -> None:
    """Writes each pair's row of `outputs` [P, H], but those without a local expert."""
    _, hidden, size = weight.shape
    config = _usable(config, act.dtype, size)
    block = config["BLOCK_M"] = min(config["BLOCK_M"], aligned.block)
    max_tiles = aligned.max_tiles * (aligned.block // block)
    tiles_n = triton.cdiv(hidden, config["BLOCK_N"])
    _down_kernel[(max_tiles * tiles_n,)](
        act,
        _operand(weight, config),
        weight if form.down_bias is None else form.down_bias,
        outputs,
        aligned.sorted_pairs,
        aligned.tile_experts,
        aligned.slots.numel(),
        max_tiles,
        H=hidden,
        SIZE=size,
        SPLIT=aligned.block // block,
        BIASED=form.down_bias is not None,
        **config,
        **overlapped(),
    )


def _usable(config: Config, dtype: torch.dtype, inner: int) -> Config:
    """`config`, without the bulk copy engine for rows that it cannot address."""
    aligned = dtype != torch.float32 and inner * dtype.itemsize % 16 == 0
    return {**config, "TMA": int(bool(config["TMA"]) and aligned)}


def _operand(weight: Tensor, config: Config) -> Any:
    """[E, N, K] weights as the kernels take them: a pointer, or a descriptor of [E * N, K]."""
    if not config["TMA"]:
        return weight
    experts, outer, inner = weight.shape
    return TensorDescriptor(
        weight, [experts * outer, inner], [inner, 1], [config["BLOCK_N"], config["BLOCK_K"]]
    )


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


@triton.jit(do_not_specialize=["pairs", "max_tiles"])  # type: ignore[untyped-decorator]
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight,
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
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
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
    expert = tl.load(tile_experts_ptr + tile_m)
    pair = tl.load(sorted_ptr + slot)
    if expert < 0:
        return
    filled = pair < pairs
    row = tl.where(filled, pair // TOP_K, 0)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + row.to(tl.int64)[:, None] * H + inner[None, :]
    unit = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_gate = expert * (2 * SIZE) + tile_n * BLOCK_N
    first_up = first_gate + SIZE
    gate_tile = 0
    up_tile = 0
    if not TMA:
        unit_read = unit if SIZE % BLOCK_N == 0 else tl.minimum(unit, SIZE - 1)
        gate_rows = expert.to(tl.int64) * (2 * SIZE) + unit_read
        gate_tile = weight + gate_rows[:, None] * H + inner[None, :]
        up_tile = gate_tile + SIZE * H

    if SWAP:
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_K):
        # An empty slot reads nothing.
        if H % BLOCK_K == 0:
            x = tl.load(x_tile + start, mask=filled[:, None], other=0.0)
        else:
            inside = filled[:, None] & (start + inner < H)[None, :]
            x = tl.load(x_tile + start, mask=inside, other=0.0)
        gate_weights = _load_weights(weight, gate_tile, first_gate, start, H, BLOCK_K, TMA)
        up_weights = _load_weights(weight, up_tile, first_up, start, H, BLOCK_K, TMA)
        if SWAP:
            gate = tl.dot(gate_weights, x.T, gate, input_precision="ieee")
            up = tl.dot(up_weights, x.T, up, input_precision="ieee")
        else:
            gate = tl.dot(x, gate_weights.T, gate, input_precision="ieee")
            up = tl.dot(x, up_weights.T, up, input_precision="ieee")
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """SPLIT: tiles to one of the alignment."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    TILES_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = _tile_of(tl.program_id(0), max_tiles, TILES_N, GROUP_M)
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.load(tile_experts_ptr + tile_m // SPLIT)
    pair = tl.load(sorted_ptr + slot)
    if expert < 0:
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

    if SWAP:
        out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        if SIZE % BLOCK_K == 0:
            act = tl.load(act_tile + start)
        else:
            act = tl.load(act_tile + start, mask=(start + inner < SIZE)[None, :], other=0.0)
        weights = _load_weights(weight, weight_tile, first_row, start, SIZE, BLOCK_K, TMA)
        if SWAP:
            out = tl.dot(weights, act.T, out, input_precision="ieee")
        else:
            out = tl.dot(act, weights.T, out, input_precision="ieee")
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
