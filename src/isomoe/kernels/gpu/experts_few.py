"""Experts of few rows: every weight is used about once, so all that counts is to stream them.

T: rows   K: experts a row   E: local experts   H: hidden size   I: intermediate size

Two launches, no sorting, no tensor cores: a row's product is a multiply and a sum, and many
small programs with several 16-byte loads a thread under way fill the memory system.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.experts import PLAIN, ExpertForm
from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.expert_operands import MatrixOperand, RowOperand, tuned_shape
from isomoe.kernels.gpu.ffn import activated, activation_kind
from isomoe.kernels.gpu.launch import overlapped

GATE_UP = "experts_few_gate_up"
DOWN = "experts_few_down"


def few_rows_experts(
    x: RowOperand,
    gate_up: MatrixOperand,
    down: MatrixOperand,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """`fused_experts` for rows that hardly share an expert."""
    rows, hidden = x.values.shape
    experts, _, size = down.values.shape
    top_k = topk_ids.shape[1]
    sizes = (experts, top_k, hidden, size)
    first = gate_up.values.itemsize, x.values.itemsize
    second = down.values.itemsize, x.dtype.itemsize
    act = torch.empty((rows * top_k, size), dtype=x.dtype, device=topk_ids.device)
    out = torch.empty((rows, hidden), dtype=x.dtype, device=topk_ids.device)
    config = find(
        GATE_UP, tuned_shape(first, *sizes), rows, _default_gate_up(hidden, _vector(gate_up))
    )
    _few_gate_up[(triton.cdiv(size, config["BLOCK_I"]), rows * top_k)](
        x.values,
        x.scales,
        gate_up.values,
        gate_up.scales,
        topk_ids,
        topk_weights,
        topk_weights if form.gate_up_bias is None else form.gate_up_bias,
        act,
        TOP_K=top_k,
        H=hidden,
        SIZE=size,
        SCALED=form.scales_input,
        BIASED=form.gate_up_bias is not None,
        X_RUN=x.run,
        RUN_N=gate_up.block[0],
        RUN_K=gate_up.block[1],
        VECTOR=_vector(gate_up),
        **activation_kind(form.activation),
        **config,
        **overlapped(),
    )
    config = find(DOWN, tuned_shape(second, *sizes), rows, _default_down(size, _vector(down)))
    _few_down[(triton.cdiv(hidden, config["BLOCK_H"]), rows)](
        act,
        down.values,
        down.scales,
        topk_ids,
        topk_weights,
        topk_weights if form.down_bias is None else form.down_bias,
        out,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        H=hidden,
        SIZE=size,
        SCALED=form.scales_input,
        BIASED=form.down_bias is not None,
        RUN_N=down.block[0],
        RUN_K=down.block[1],
        VECTOR=_vector(down),
        **config,
        **overlapped(),
    )
    return out


def _vector(weight: MatrixOperand) -> int:
    """Neighbouring values of a row that a thread loads at once; they share a scale."""
    return 16 if weight.block[1] else 8


def _default_gate_up(hidden: int, vector: int) -> Config:
    if vector > 8:  # what is under way at once are bytes
        block = min(1024, max(64, triton.next_power_of_2(hidden)))
        return _tile("BLOCK_I", 4, "BLOCK_H", block, 2, 1, 1)
    # A warp is a program: all its loads are under way at once, and nothing waits for a barrier.
    block = min(2048, max(64, triton.next_power_of_2(hidden)))
    return _tile("BLOCK_I", 1, "BLOCK_H", block, 1, 1, 1)


def _default_down(size: int, vector: int) -> Config:
    block = min(256, max(64, triton.next_power_of_2(size)))
    if vector > 8:
        return _tile("BLOCK_H", 4, "BLOCK_I", block, 2, 1, 1)
    return _tile("BLOCK_H", 1, "BLOCK_I", block, 4, 1, min(4, triton.cdiv(size, block)))


def _tile(
    outer: str, rows: int, inner: str, columns: int, warps: int, stages: int, unroll: int
) -> Config:
    """STAGES 1: straight into registers, UNROLL turns at once; more: through shared memory."""
    return {
        outer: rows,
        inner: columns,
        "STAGES": stages,
        "UNROLL": unroll,
        "num_warps": warps,
    }


def gate_up_candidates(hidden: int) -> Iterator[Config]:
    """For the tuner."""
    yield from _candidates("BLOCK_I", (1, 2, 4), "BLOCK_H", hidden, 2)


def down_candidates(size: int, top_k: int) -> Iterator[Config]:
    """For the tuner."""
    matrices = triton.next_power_of_2(top_k)
    yield from _candidates("BLOCK_H", (1, 2, 4), "BLOCK_I", size, matrices)


def _candidates(
    outer: str, rows: tuple[int, ...], inner: str, length: int, matrices: int
) -> Iterator[Config]:
    for columns in (256, 512, 1024, 2048):
        turns = triton.cdiv(length, columns)
        if columns > 256 and (turns * columns > 1.4 * length):
            continue
        for height in rows:
            for warps in (1, 2, 4):
                # 16-byte loads a thread in a turn. Few under way starve the memory, many spill.
                loads = matrices * height * columns // (8 * 32 * warps)
                for unroll in (1, 2, 3, 4):
                    if 6 <= loads * unroll <= 16 and turns % unroll == 0 and loads > 1:
                        yield _tile(outer, height, inner, columns, warps, 1, unroll)
                if turns >= 3 and warps in (2, 4) and loads in (4, 8):
                    yield _tile(outer, height, inner, columns, warps, 4, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _few_gate_up(  # type: ignore[no-untyped-def]
    x_ptr,
    x_scales_ptr,
    gate_up_ptr,
    scales_ptr,
    ids_ptr,
    weights_ptr,
    bias_ptr,
    act_ptr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    X_RUN: tl.constexpr,
    RUN_N: tl.constexpr,
    RUN_K: tl.constexpr,
    VECTOR: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """act [T * K, I]: gate and up to one, of a pair, for a tile of I."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if expert < 0:
        return
    unit = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    # Beyond the last row, the last again: a load without a mask.
    unit_read = unit if SIZE % BLOCK_I == 0 else tl.minimum(unit, SIZE - 1)
    # In FP8 the rows of gate and up take turns.
    ROW: tl.constexpr = 2 * H if RUN_K else H
    gate_rows = gate_up_ptr + expert * (2 * SIZE * H) + (unit_read * ROW)[:, None]
    up_rows = gate_rows + (H if RUN_K else SIZE * H)
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * H
    # Neighbours, a thread's load, are added at once: so many fewer accumulators.
    GROUPS: tl.constexpr = BLOCK_H // VECTOR
    gate = tl.zeros((BLOCK_I, GROUPS), tl.float32)
    up = tl.zeros((BLOCK_I, GROUPS), tl.float32)
    if RUN_K:
        RUNS_N: tl.constexpr = (SIZE + RUN_N - 1) // RUN_N
        RUNS_K: tl.constexpr = (H + RUN_K - 1) // RUN_K
        gate_scales = scales_ptr + expert * (2 * RUNS_N * RUNS_K)
        up_scales = gate_scales + RUNS_N * RUNS_K
    for start in tl.range(0, H, BLOCK_H, num_stages=STAGES, loop_unroll_factor=UNROLL):
        at = start + tl.arange(0, BLOCK_H)
        if H % BLOCK_H == 0:
            x = tl.load(x_row + at)
            gate_weights = tl.load(gate_rows + at[None, :], eviction_policy="evict_first")
            up_weights = tl.load(up_rows + at[None, :], eviction_policy="evict_first")
        else:
            inside = at < H
            x = tl.load(x_row + at, mask=inside, other=0.0)
            gate_weights = tl.load(gate_rows + at[None, :], mask=inside[None, :], other=0.0)
            up_weights = tl.load(up_rows + at[None, :], mask=inside[None, :], other=0.0)
        x = x.to(tl.float32)
        if X_RUN:
            RUNS: tl.constexpr = (H + X_RUN - 1) // X_RUN
            x_scales = x_scales_ptr + (pair // TOP_K).to(tl.int64) * RUNS
            x *= tl.load(x_scales + tl.minimum(at, H - 1) // X_RUN)
        gate_part = gate_weights.to(tl.float32) * x[None, :]
        gate_part = tl.sum(tl.reshape(gate_part, (BLOCK_I, GROUPS, VECTOR)), axis=2)
        up_part = up_weights.to(tl.float32) * x[None, :]
        up_part = tl.sum(tl.reshape(up_part, (BLOCK_I, GROUPS, VECTOR)), axis=2)
        if RUN_K:
            group = tl.minimum(start + tl.arange(0, GROUPS) * VECTOR, H - 1)
            scale_at = (unit_read // RUN_N * RUNS_K)[:, None] + (group // RUN_K)[None, :]
            gate_part *= tl.load(gate_scales + scale_at)
            up_part *= tl.load(up_scales + scale_at)
        gate += gate_part
        up += up_part
    gate_sum = tl.sum(gate, axis=1)
    up_sum = tl.sum(up, axis=1)
    if SCALED:
        # The products are linear in x.
        weight = tl.load(weights_ptr + pair)
        gate_sum *= weight
        up_sum *= weight
    if BIASED:
        bias = bias_ptr + expert * (2 * SIZE) + unit_read
        gate_sum += tl.load(bias).to(tl.float32)
        up_sum += tl.load(bias + SIZE).to(tl.float32)
    act = activated(gate_sum, up_sum, KIND, LIMIT, ALPHA)
    out = act_ptr + pair.to(tl.int64) * SIZE + unit
    tl.store(out, act.to(act_ptr.dtype.element_ty), mask=unit < SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def _few_down(  # type: ignore[no-untyped-def]
    act_ptr,
    down_ptr,
    scales_ptr,
    ids_ptr,
    weights_ptr,
    bias_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    RUN_N: tl.constexpr,
    RUN_K: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [T, H]: a row's weighted sum over its experts, for a tile of H, all experts at once."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    out = out_ptr + row * H + unit
    # An absent expert reads a present one's tile, from the cache: no load has a mask, so that
    # all of them can be under way together.
    spare = -1
    for place in tl.static_range(TOP_K):
        spare = tl.maximum(spare, tl.load(ids_ptr + row * TOP_K + place).to(tl.int32))
    if spare < 0:
        tl.store(out, tl.zeros((BLOCK_H,), out_ptr.dtype.element_ty), mask=unit < H)
        return
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(ids_ptr + row * TOP_K + k, mask=k < TOP_K, other=-1).to(tl.int32)
    weight = tl.load(weights_ptr + row * TOP_K + k, mask=k < TOP_K, other=0.0)
    here = expert >= 0
    expert = tl.where(here, expert, spare).to(tl.int64)
    unit_read = unit if H % BLOCK_H == 0 else tl.minimum(unit, H - 1)
    tiles = down_ptr + (expert * (H * SIZE))[None, :, None] + (unit_read * SIZE)[:, None, None]
    acts = act_ptr + ((row * TOP_K + tl.minimum(k, TOP_K - 1)) * SIZE)[:, None]
    GROUPS: tl.constexpr = BLOCK_I // VECTOR
    total = tl.zeros((BLOCK_H, BLOCK_K, GROUPS), tl.float32)
    if RUN_K:
        RUNS_N: tl.constexpr = (H + RUN_N - 1) // RUN_N
        RUNS_K: tl.constexpr = (SIZE + RUN_K - 1) // RUN_K
        scales = expert[None, :] * (RUNS_N * RUNS_K) + (unit_read // RUN_N * RUNS_K)[:, None]
        scales = scales_ptr + scales[:, :, None]
    for start in tl.range(0, SIZE, BLOCK_I, num_stages=STAGES, loop_unroll_factor=UNROLL):
        at = start + tl.arange(0, BLOCK_I)
        if SIZE % BLOCK_I == 0:
            act = tl.load(acts + at[None, :])
            weights = tl.load(tiles + at[None, None, :], eviction_policy="evict_first")
        else:
            inside = at < SIZE
            act = tl.load(acts + at[None, :], mask=inside[None, :], other=0.0)
            weights = tl.load(tiles + at[None, None, :], mask=inside[None, None, :], other=0.0)
        product = weights.to(tl.float32) * act.to(tl.float32)[None, :, :]
        part = tl.sum(tl.reshape(product, (BLOCK_H, BLOCK_K, GROUPS, VECTOR)), axis=3)
        if RUN_K:
            group = tl.minimum(start + tl.arange(0, GROUPS) * VECTOR, SIZE - 1)
            part *= tl.load(scales + (group // RUN_K)[None, None, :])
        total += part
    # What an absent expert gave, and its weight, may be anything, NaN too.
    each = tl.sum(total, axis=2)
    if BIASED:
        each += tl.load(bias_ptr + expert[None, :] * H + unit_read[:, None]).to(tl.float32)
    if not SCALED:
        each *= weight[None, :]
    weighted = tl.where(here[None, :], each, 0.0)
    tl.store(out, tl.sum(weighted, axis=1).to(out_ptr.dtype.element_ty), mask=unit < H)
