"""Attention of single rows over paged keys, split over keys where rows are few.

T: rows   N: query heads   K: KV heads   G = N / K: query heads a KV head   d: head dim
S: splits of a row's keys
"""

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.paged_rows import PagedRows

_LOG2_E = 1.4426950408889634
_MERGED = 2048
"""Elements of partial results that a warp holds at once in a merge: 64 registers a thread."""


def decode_attention(
    q: Tensor, kv_cache: Tensor, rows: PagedRows, scale: float, out: Tensor
) -> None:
    """Fills the rows of decode of `out`, one launch.

    q: [T, N, d], T and N may be strided; kv_cache: [pages, page, 2K, d] contiguous, in q's dtype;
    out: [T, N, d] contiguous. A program takes one split of one row's keys for one KV head, whose G
    query heads are the rows of its tile. The last of a row's programs to arrive merges the splits,
    in their order. Softmax and sums are fp32.

    Launches of one device share a buffer of arrival counters: they must not run side by side on
    two streams.
    """
    num_rows, heads, dim = rows.num_decodes, q.shape[1], q.shape[2]
    kv_heads = kv_cache.shape[2] // 2
    group = heads // kv_heads
    config = _config(q.dtype, num_rows, heads, kv_heads, dim)
    block = config["BLOCK_N"]
    most = _processors(q.device) * config.pop("PER_SM") // (num_rows * kv_heads)
    splits = max(1, min(most, -(-rows.max_context // block)))
    partial, counters = out, out
    if splits > 1:
        floats = num_rows * heads * splits * (dim + 1)
        partial = torch.empty(floats, dtype=torch.float32, device=q.device)
        counters = _counters(q.device)
    block_d = max(16, triton.next_power_of_2(dim))
    merge_g = triton.next_power_of_2(group)
    chunk = max(1, _MERGED * config["num_warps"] // (merge_g * block_d))
    chunk = min(chunk, triton.next_power_of_2(splits))
    _decode_attention[(num_rows * kv_heads, splits)](
        q,
        q.stride(0),
        q.stride(1),
        kv_cache,
        out,
        partial,
        counters,
        rows.table_rows,
        rows.positions,
        rows.block_tables,
        rows.block_tables.stride(0),
        scale * _LOG2_E,
        num_rows,
        splits,
        GROUP=group,
        KV_HEADS=kv_heads,
        D=dim,
        PAGE=rows.page_size,
        SPLIT=splits > 1,
        BLOCK_D=block_d,
        BLOCK_G=max(16, merge_g),
        MERGE_G=merge_g,
        CHUNK=chunk,
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


def _config(dtype: torch.dtype, num_rows: int, heads: int, kv_heads: int, dim: int) -> Config:
    """A copy that the caller may change."""
    if dtype.itemsize > 2:
        return {"BLOCK_N": 32, "PER_SM": 2, "num_warps": 8, "num_stages": 2}
    block = 64 if dim <= 128 else 32
    default = {"BLOCK_N": block, "PER_SM": 3, "num_warps": 4, "num_stages": 3}
    return dict(find("decode_attention", (heads, kv_heads, dim), num_rows, default))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros [2^16] int32, which every launch leaves as zeros; one a (row, KV head).

    Rows that are split are fewer than the processors' programs; so this is enough for any launch,
    and the buffer never moves: captured graphs hold its address.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["num_rows", "splits"])  # type: ignore[untyped-decorator]
def _decode_attention(  # type: ignore[no-untyped-def]
    q,
    q_row,
    q_head,
    cache,
    out,
    partial,
    counters,
    table_rows,
    positions,
    tables,
    table_stride,
    scale_log2,
    num_rows,
    splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MERGE_G: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row * K + KV head, split); `partial` holds [T, K, S, G, d], then [T, K, S, G]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    split = tl.program_id(1)
    row = (pair // KV_HEADS).to(tl.int64)
    head = pair % KV_HEADS
    group = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)
    inside = column < D

    table_row = tl.load(table_rows + row)
    length = tl.load(positions + row) + 1
    length = tl.where(table_row >= 0, length, 0)
    here = (group < GROUP)[:, None] & inside[None, :]
    query_at = (head * GROUP + group)[:, None] * q_head + column[None, :]

    # Short rows leave their last splits without keys, rather than all splits with few.
    each = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * each
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
    queries = tl.load(q + row * q_row + query_at, mask=here, other=0.0)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + lane
        seen = key < end
        token = page.to(tl.int64) * PAGE + key % PAGE
        source = cache + token[:, None] * (2 * KV_HEADS * D) + (head * D + column)[None, :]
        unmasked = seen[:, None] & inside[None, :]
        keys = tl.load(source, mask=unmasked, other=0.0)
        values = tl.load(source + KV_HEADS * D, mask=unmasked, other=0.0)
        # The next tile's pages, an iteration early: its keys then need not wait for them.
        ahead = key + BLOCK_N
        page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        top = new_top
    # No key at all (padding) gives zeros.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]

    out_at = out + (row * KV_HEADS + head) * (GROUP * D)
    tile_at = group[:, None] * D + column[None, :]
    if SPLIT:
        used = tl.cdiv(length, tl.maximum(each, 1))
        if used <= 1:
            tl.store(out_at + tile_at, acc.to(out.dtype.element_ty), mask=here)
        else:
            first = (row * KV_HEADS + head) * splits
            levels = partial + num_rows.to(tl.int64) * KV_HEADS * splits * (GROUP * D)
            tl.store(partial + (first + split) * (GROUP * D) + tile_at, acc, mask=here)
            level = top + tl.log2(total)
            tl.store(levels + (first + split) * GROUP + group, level, mask=group < GROUP)
            # All threads' stores come before the one thread's release.
            tl.debug_barrier()
            arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
            if arrived == used - 1:
                _merge(partial, levels, out_at, first, used, GROUP, D, BLOCK_D, MERGE_G, CHUNK)
                tl.store(counters + pair, 0)
    else:
        tl.store(out_at + tile_at, acc.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial,
    levels,
    out_at,
    first,
    used,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_G: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The mean of `used` partial results, each weighted by 2^level, in their order."""
    group = tl.arange(0, MERGE_G)
    column = tl.arange(0, BLOCK_D)
    here = (group < GROUP)[:, None] & (column < D)[None, :]
    # Heads past the group are copies of its last: a number at hand, and not stored.
    source = tl.minimum(group, GROUP - 1)
    top = tl.full([MERGE_G], float("-inf"), tl.float32)
    total = tl.zeros([MERGE_G], tl.float32)
    acc = tl.zeros([MERGE_G, BLOCK_D], tl.float32)
    for start in range(0, used, CHUNK):
        split = start + tl.arange(0, CHUNK)
        present = split < used
        level_at = levels + (first + split)[:, None] * GROUP + source[None, :]
        # Past L1, where another launch's numbers may still lie.
        level = tl.load(level_at, mask=present[:, None], other=float("-inf"), cache_modifier=".cg")
        part_at = (first + split)[:, None, None] * (GROUP * D) + source[None, :, None] * D
        part = tl.load(
            partial + part_at + column[None, None, :],
            mask=present[:, None, None] & (column < D)[None, None, :],
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
    tile_at = group[:, None] * D + column[None, :]
    tl.store(out_at + tile_at, acc.to(out_at.dtype.element_ty), mask=here)
