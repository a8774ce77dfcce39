"""Attention of single rows over paged keys, split over keys where rows are few.

T: rows   N: query heads   K: KV heads   G = N / K: query heads a KV head   D, V: dims of a key, of
a value   S: splits of a row's keys
"""

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.attention import Heads
from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.head_blocks import WIDE, head_blocks, head_shape
from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.paged_rows import PagedRows

_LOG2_E = 1.4426950408889634
_WIDE_HEADS = 16
"""Query heads of a tile whose values are wide: its results then fit into registers."""
_MERGED = 2048
"""Elements of partial results that a warp holds at once in a merge: 64 registers a thread."""


def decode_attention(
    q: Tensor, kv_cache: Tensor, rows: PagedRows, heads: Heads, sinks: Tensor | None, out: Tensor
) -> None:
    """Fills the rows of decode of `out`, one launch.

    q: [T, N, D], T and N may be strided; kv_cache: [pages, page, width] contiguous, in q's dtype;
    sinks: [N] fp32; out: [T, N, V] contiguous. A program takes one split of one row's keys for one
    KV head, whose G query heads (or, of wide values, some of them) are the rows of its tile. The
    last of a row's programs to arrive merges the splits, in their order. Softmax and sums are fp32.

    Launches of one device share a buffer of arrival counters: they must not run side by side on
    two streams.
    """
    num_rows, span = rows.num_decodes, heads.span
    blocks = head_blocks(heads)
    group = blocks["GROUP"]
    most_heads = _WIDE_HEADS if blocks["BLOCK_V"] >= WIDE else group
    tiles = -(-group // most_heads)
    tile_heads = -(-group // tiles)
    programs = num_rows * heads.kv * tiles
    config = _config(q.dtype, num_rows, heads)
    block = config["BLOCK_N"]
    most = _processors(q.device) * config.pop("PER_SM") // programs
    longest = min(rows.max_context, span.window or span.chunk or rows.max_context)
    splits = max(1, min(most, -(-longest // block)))
    partial, counters = out, out
    if splits > 1:
        floats = programs * splits * tile_heads * (heads.v_dim + 1)
        partial = torch.empty(floats, dtype=torch.float32, device=q.device)
        counters = _counters(q.device)
    merge_g = triton.next_power_of_2(tile_heads)
    chunk = max(1, _MERGED * config["num_warps"] // (merge_g * blocks["BLOCK_V"]))
    chunk = min(chunk, triton.next_power_of_2(splits))
    _decode_attention[(programs, splits)](
        q,
        q.stride(0),
        q.stride(1),
        kv_cache,
        q if sinks is None else sinks,
        out,
        partial,
        counters,
        rows.table_rows,
        rows.positions,
        rows.block_tables,
        rows.block_tables.stride(0),
        heads.scale * _LOG2_E,
        programs,
        splits,
        TILES=tiles,
        TILE_HEADS=tile_heads,
        PAGE=rows.page_size,
        SINKS=sinks is not None,
        SPLIT=splits > 1,
        BLOCK_G=max(16, merge_g),
        MERGE_G=merge_g,
        MERGE_S=chunk,
        **blocks,
        **config,
        **overlapped(),
    )


def candidates(num_rows: int) -> Iterator[Config]:
    """Configurations worth timing for `decode_attention` in bf16."""
    for block, warps, stages in (
        (16, 1, 3),
        (32, 1, 3),
        (32, 1, 4),
        (32, 2, 3),
        (32, 4, 3),
        (64, 2, 3),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (128, 4, 2),
        (128, 4, 3),
        (128, 8, 3),
    ):
        for per_sm in (1, 2, 3, 4, 8) if num_rows < 512 else (1,):
            yield {"BLOCK_N": block, "PER_SM": per_sm, "num_warps": warps, "num_stages": stages}


def _config(dtype: torch.dtype, num_rows: int, heads: Heads) -> Config:
    """A copy that the caller may change."""
    wide = heads.v_dim > WIDE // 2
    if dtype.itemsize > 2:
        if wide:
            return {"BLOCK_N": 16, "PER_SM": 2, "num_warps": 8, "num_stages": 1}
        return {"BLOCK_N": 32, "PER_SM": 2, "num_warps": 8, "num_stages": 2}
    block = 64 if heads.qk_dim <= 128 else 32
    default = {"BLOCK_N": block, "PER_SM": 3, "num_warps": 4, "num_stages": 2 if wide else 3}
    return dict(find("decode_attention", head_shape(heads), num_rows, default))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros [2^16] int32, which every launch leaves as zeros; one a tile of a row's heads.

    Rows that are split are fewer than the processors' programs; so this is enough for any launch,
    and the buffer never moves: captured graphs hold its address.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["programs", "splits"])  # type: ignore[untyped-decorator]
def _decode_attention(  # type: ignore[no-untyped-def]
    q,
    q_row,
    q_head,
    cache,
    sinks,
    out,
    partial,
    counters,
    table_rows,
    positions,
    tables,
    table_stride,
    scale_log2,
    programs,
    splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    LATENT: tl.constexpr,
    MAIN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MERGE_G: tl.constexpr,
    MERGE_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program ((row * K + KV head) * TILES + tile of its heads, split).

    `partial` holds [programs, S, heads of a tile, V], then [programs, S, heads of a tile].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0)
    split = tl.program_id(1)
    row = (place // (KV_HEADS * TILES)).to(tl.int64)
    head = place // TILES % KV_HEADS
    first_head = place % TILES * TILE_HEADS
    group = tl.arange(0, BLOCK_G)
    held = (group < TILE_HEADS) & (first_head + group < GROUP)
    column = tl.arange(0, BLOCK_D)
    inside = column < MAIN
    value_column = tl.arange(0, BLOCK_V)

    table_row = tl.load(table_rows + row)
    length = tl.load(positions + row) + 1
    length = tl.where(table_row >= 0, length, 0)
    origin = 0
    if CHUNK:
        origin = tl.maximum(length - 1, 0) // CHUNK * CHUNK
    if WINDOW:
        origin = tl.maximum(length - WINDOW, 0)
    query_head = head * GROUP + first_head + group
    query_at = query_head[:, None] * q_head + column[None, :]

    # Short rows leave their last splits without keys, rather than all splits with few.
    each = tl.cdiv(tl.cdiv(length - origin, splits), BLOCK_N) * BLOCK_N
    begin = origin + split * each
    if (begin >= length) & (split > 0):
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    end = tl.minimum(begin + each, length)

    table = tables + table_row.to(tl.int64) * table_stride
    lane = tl.arange(0, BLOCK_N)
    ahead = begin + lane
    page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
    # The tables are older than the step; the queries and the newest keys are not.
    if PDL:
        tl.extra.cuda.gdc_wait()
    queries = tl.load(q + row * q_row + query_at, mask=held[:, None] & inside[None, :], other=0.0)
    if BLOCK_R:
        rest = MAIN + tl.arange(0, BLOCK_R)
        rest_at = q + row * q_row + query_head[:, None] * q_head + rest[None, :]
        other_queries = tl.load(rest_at, mask=held[:, None] & (rest < D)[None, :], other=0.0)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if SINKS:
        # A sink is one more key of value zero; the first split has it.
        sink = tl.load(sinks + query_head, mask=held, other=0.0) * 1.4426950408889634
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, total + 1.0, total)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + lane
        seen = key < end
        token = page.to(tl.int64) * PAGE + key % PAGE
        source = cache + token[:, None] * WIDTH + (head * D + column)[None, :]
        unmasked = seen[:, None] & inside[None, :]
        keys = tl.load(source, mask=unmasked, other=0.0)
        if LATENT:
            values = keys
        elif D == DV and BLOCK_R == 0:
            values = tl.load(source + KV_HEADS * D, mask=unmasked, other=0.0)
        else:
            value_at = token[:, None] * WIDTH + (KV_HEADS * D + head * DV + value_column)[None, :]
            present = seen[:, None] & (value_column < DV)[None, :]
            values = tl.load(cache + value_at, mask=present, other=0.0)
        # The next tile's pages, an iteration early: its keys then need not wait for them.
        ahead = key + BLOCK_N
        page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if BLOCK_R:
            other_at = cache + token[:, None] * WIDTH + (head * D + rest)[None, :]
            others = tl.load(other_at, mask=seen[:, None] & (rest < D)[None, :], other=0.0)
            scores = tl.dot(other_queries, tl.trans(others), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        top = new_top
    # No key at all (padding) gives zeros.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]

    out_at = out + ((row * KV_HEADS + head) * GROUP + first_head) * DV
    tile_at = group[:, None] * DV + value_column[None, :]
    here = held[:, None] & (value_column < DV)[None, :]
    if SPLIT:
        used = tl.cdiv(length - origin, tl.maximum(each, 1))
        if used <= 1:
            tl.store(out_at + tile_at, acc.to(out.dtype.element_ty), mask=here)
        else:
            first = place.to(tl.int64) * splits
            levels = partial + programs.to(tl.int64) * splits * (TILE_HEADS * DV)
            tl.store(partial + (first + split) * (TILE_HEADS * DV) + tile_at, acc, mask=here)
            level = top + tl.log2(total)
            tl.store(levels + (first + split) * TILE_HEADS + group, level, mask=held)
            # All threads' stores come before the one thread's release.
            tl.debug_barrier()
            arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
            if arrived == used - 1:
                count = tl.minimum(GROUP - first_head, TILE_HEADS)
                _merge(
                    partial, levels, out_at, first, used, count,
                    TILE_HEADS, DV, BLOCK_V, MERGE_G, MERGE_S,
                )  # fmt: skip
                tl.store(counters + place, 0)
    else:
        tl.store(out_at + tile_at, acc.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial,
    levels,
    out_at,
    first,
    used,
    count,
    TILE_HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MERGE_G: tl.constexpr,
    MERGE_S: tl.constexpr,
):
    """The mean of `used` partial results, each weighted by 2^level, in their order.

    count: the heads of this tile.
    """
    group = tl.arange(0, MERGE_G)
    column = tl.arange(0, BLOCK_V)
    here = (group < count)[:, None] & (column < DV)[None, :]
    # Heads past the tile's are copies of its last: a number at hand, and not stored.
    source = tl.minimum(group, count - 1)
    top = tl.full([MERGE_G], float("-inf"), tl.float32)
    total = tl.zeros([MERGE_G], tl.float32)
    acc = tl.zeros([MERGE_G, BLOCK_V], tl.float32)
    for start in range(0, used, MERGE_S):
        split = start + tl.arange(0, MERGE_S)
        present = split < used
        level_at = levels + (first + split)[:, None] * TILE_HEADS + source[None, :]
        # Past L1, where another launch's numbers may still lie.
        level = tl.load(level_at, mask=present[:, None], other=float("-inf"), cache_modifier=".cg")
        part_at = (first + split)[:, None, None] * (TILE_HEADS * DV) + source[None, :, None] * DV
        part = tl.load(
            partial + part_at + column[None, None, :],
            mask=present[:, None, None] & (column < DV)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(level, axis=0))
        weights = tl.exp2(level - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink[:, None] + tl.sum(part * weights[:, :, None], axis=0)
        top = new_top
    acc = acc / total[:, None]
    tile_at = group[:, None] * DV + column[None, :]
    tl.store(out_at + tile_at, acc.to(out_at.dtype.element_ty), mask=here)
