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
from isomoe.kernels.gpu.ffn import activated, activation_kind
from isomoe.kernels.gpu.launch import overlapped

GATE_UP = "experts_few_gate_up"
DOWN = "experts_few_down"


def few_rows_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """`fused_experts` for rows that hardly share an expert."""
    rows, hidden = x.shape
    experts, _, size = down.shape
    top_k = topk_ids.shape[1]
    shape = (experts, top_k, hidden, size)
    act = torch.empty((rows * top_k, size), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    config = find(GATE_UP, shape, rows, _default_gate_up(hidden))
    _few_gate_up[(triton.cdiv(size, config["BLOCK_I"]), rows * top_k)](
        x,
        gate_up,
        topk_ids,
        topk_weights,
        gate_up if form.gate_up_bias is None else form.gate_up_bias,
        act,
        TOP_K=top_k,
        H=hidden,
        SIZE=size,
        SCALED=form.scales_input,
        BIASED=form.gate_up_bias is not None,
        **activation_kind(form.activation),
        **config,
        **overlapped(),
    )
    config = find(DOWN, shape, rows, _default_down(size))
    _few_down[(triton.cdiv(hidden, config["BLOCK_H"]), rows)](
        act,
        down,
        topk_ids,
        topk_weights,
        down if form.down_bias is None else form.down_bias,
        out,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        H=hidden,
        SIZE=size,
        SCALED=form.scales_input,
        BIASED=form.down_bias is not None,
        **config,
        **overlapped(),
    )
    return out


def _default_gate_up(hidden: int) -> Config:
    # A warp is a program: all its loads are under way at once, and nothing waits for a barrier.
    block = min(2048, max(64, triton.next_power_of_2(hidden)))
    return _tile("BLOCK_I", 1, "BLOCK_H", block, 1, 1, 1)


def _default_down(size: int) -> Config:
    block = min(256, max(64, triton.next_power_of_2(size)))
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
    gate_up_ptr,
    ids_ptr,
    weights_ptr,
    bias_ptr,
    act_ptr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
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
    gate_rows = gate_up_ptr + expert * (2 * SIZE * H) + (unit_read * H)[:, None]
    up_rows = gate_rows + SIZE * H
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * H
    # Eight neighbours, a thread's load, are added at once: an eighth of the accumulators.
    gate = tl.zeros((BLOCK_I, BLOCK_H // 8), tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_H // 8), tl.float32)
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
        x = x.to(tl.float32)[None, :]
        gate += tl.sum(
            tl.reshape(gate_weights.to(tl.float32) * x, (BLOCK_I, BLOCK_H // 8, 8)), axis=2
        )
        up += tl.sum(tl.reshape(up_weights.to(tl.float32) * x, (BLOCK_I, BLOCK_H // 8, 8)), axis=2)
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
    total = tl.zeros((BLOCK_H, BLOCK_K, BLOCK_I // 8), tl.float32)
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
        total += tl.sum(tl.reshape(product, (BLOCK_H, BLOCK_K, BLOCK_I // 8, 8)), axis=3)
    # What an absent expert gave, and its weight, may be anything, NaN too.
    each = tl.sum(total, axis=2)
    if BIASED:
        each += tl.load(bias_ptr + expert[None, :] * H + unit_read[:, None]).to(tl.float32)
    if not SCALED:
        each *= weight[None, :]
    weighted = tl.where(here[None, :], each, 0.0)
    tl.store(out, tl.sum(weighted, axis=1).to(out_ptr.dtype.element_ty), mask=unit < H)
