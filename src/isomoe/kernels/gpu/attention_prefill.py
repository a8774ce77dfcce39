"""Flash attention of requests' new rows over their paged keys.

T: rows   N: query heads   K: KV heads   G = N / K: query heads a KV head   d: head dim

Source: Dao, FlashAttention-2 (2023).
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.paged_rows import PagedRows

_LOG2_E = 1.4426950408889634


def prefill_attention(
    q: Tensor, kv_cache: Tensor, rows: PagedRows, scale: float, out: Tensor
) -> None:
    """Fills the prefills' rows of `out`, one launch.

    q: [T, N, d], T and N may be strided; kv_cache: [pages, page, 2K, d] contiguous, in q's dtype,
    the new rows already written; out: [T, N, d] contiguous. A tile holds neighbouring rows for all
    G heads of a KV head, so that a few new rows fill one too. Softmax and sums are fp32.
    """
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = kv_cache.shape[2] // 2
    group = heads // kv_heads
    prefills = len(rows.prefill_lens)
    new_rows = sum(new for new, _ in rows.prefill_lens)
    config = _config(q.dtype, new_rows, heads, kv_heads, dim)
    # A prefill's first tile is its first row's in a tiling of all rows without gaps, plus one for
    # each prefill before it: room for any number of rows, known without a look at the device.
    tiles = new_rows * group // config["BLOCK_M"] + prefills
    _prefill_attention[(tiles * kv_heads,)](
        q,
        q.stride(0),
        q.stride(1),
        kv_cache,
        out,
        rows.prefill_starts,
        prefills,
        rows.table_rows,
        rows.positions,
        rows.block_tables,
        rows.block_tables.stride(0),
        scale * _LOG2_E,
        GROUP=group,
        KV_HEADS=kv_heads,
        D=dim,
        PAGE=rows.page_size,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_P=max(16, triton.next_power_of_2(prefills)),
        **config,
    )


def fresh_prefill(q: Tensor, k: Tensor, v: Tensor, rows: PagedRows, scale: float) -> Tensor:
    """The rows of prefill, where none has earlier context, by torch: a call for a run of equals.

    q: [T, N, d]; k, v: [T, K, d], rotated, strides free but the last. Returns [rows, N, d].
    """
    grouped = q.shape[1] != k.shape[1]
    start = rows.num_decodes
    pieces = []
    for count, length in equal_runs(rows.prefill_lens):
        span = slice(start, start + count * length)
        queries, keys, values = (
            x[span].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        found = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
        )
        pieces.append(found.transpose(1, 2).flatten(0, 1))
        start = span.stop
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def equal_runs(lens: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """(how many, new rows of each) of neighbours with as many new rows."""
    runs = groupby(new for new, _ in lens)
    return [(len(list(equal)), new) for new, equal in runs]


def candidates(num_rows: int) -> Iterator[Config]:
    """Configurations worth timing for `prefill_attention` in bf16."""
    for block_m, block_n, warps, most_stages in (
        (16, 64, 4, 4),
        (32, 64, 4, 4),
        (64, 32, 4, 4),
        (64, 64, 4, 4),
        (64, 128, 4, 2),
        (64, 128, 8, 3),
        (128, 32, 4, 3),
        (128, 32, 8, 4),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (256, 32, 8, 3),
        (256, 64, 8, 3),
    ):
        if block_m <= 64 or num_rows >= 8:
            for stages in range(2, most_stages + 1):
                yield {
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                    "num_warps": warps,
                    "num_stages": stages,
                }


def _config(dtype: torch.dtype, num_rows: int, heads: int, kv_heads: int, dim: int) -> Config:
    if dtype.itemsize > 2:
        block_n = 32 if dim <= 128 else 16
        return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 2}
    few = num_rows * (heads // kv_heads) <= 64
    if dim > 128:
        block_m = 64 if few else 128
        default = {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    elif few:
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    else:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return find("prefill_attention", (heads, kv_heads, dim), num_rows, default)


@triton.jit(do_not_specialize=["prefills"])  # type: ignore[untyped-decorator]
def _prefill_attention(  # type: ignore[no-untyped-def]
    q,
    q_row,
    q_head,
    cache,
    out,
    starts,
    prefills,
    table_rows,
    positions,
    tables,
    table_stride,
    scale_log2,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program tile * K + KV head; the tiles of a request from its last rows to its first."""
    head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS

    origin = tl.load(starts)
    index = tl.arange(0, BLOCK_P)
    present = index < prefills
    first_rows = tl.load(starts + index, mask=present, other=0) - origin
    before = present & (first_rows * GROUP // BLOCK_M + index <= tile)
    prefill = tl.sum(before.to(tl.int32)) - 1
    begin = tl.load(starts + prefill)
    new = tl.load(starts + prefill + 1) - begin
    place = tile - ((begin - origin) * GROUP // BLOCK_M + prefill)
    tiles = tl.cdiv(new * GROUP, BLOCK_M)
    if place >= tiles:
        return
    # The longest first: what ends last is then short.
    place = tiles - 1 - place
    table_row = tl.load(table_rows + begin)
    context = tl.load(positions + begin)

    # Rows of the tile: (new row, query head of the group), the head fastest.
    flat = place * BLOCK_M + tl.arange(0, BLOCK_M)
    new_row = flat // GROUP
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    here = (new_row < new)[:, None] & inside[None, :]
    row = (begin + new_row).to(tl.int64)[:, None]
    query_head = (head * GROUP + flat % GROUP)[:, None]
    queries = tl.load(q + row * q_row + query_head * q_head + column[None, :], mask=here, other=0.0)

    position = context + new_row
    final = tl.minimum((place + 1) * BLOCK_M, new * GROUP) - 1
    end = context + final // GROUP + 1
    # Keys below `clear` are seen by every row of the tile.
    clear = (context + place * BLOCK_M // GROUP + 1) // BLOCK_N * BLOCK_N
    end = tl.where(table_row >= 0, end, 0)
    clear = tl.where(table_row >= 0, clear, 0)

    table = tables + table_row.to(tl.int64) * table_stride
    source = cache + (head * D + column)[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, top, total = _attend(
        acc, top, total, queries, position, source, table, inside, 0, clear, end,
        scale_log2, KV_HEADS, D, PAGE, BLOCK_N, D != BLOCK_D, False,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, position, source, table, inside, clear, end, end,
        scale_log2, KV_HEADS, D, PAGE, BLOCK_N, D != BLOCK_D, True,
    )  # fmt: skip

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    target = out + (row * (KV_HEADS * GROUP) + query_head) * D + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    acc,
    top,
    total,
    queries,
    position,
    source,
    table,
    inside,
    begin,
    stop,
    end,
    scale_log2,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Adds the tiles of keys from `begin` to `stop`; keys from `end` on are not read.

    RAGGED: d is less than its block. CAUSAL: not all rows see all these keys.
    """
    lane = tl.arange(0, BLOCK_N)
    ahead = begin + lane
    page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
    for start in range(begin, stop, BLOCK_N):
        key = start + lane
        token = page.to(tl.int64) * PAGE + key % PAGE
        place = source + token[:, None] * (2 * KV_HEADS * D)
        if CAUSAL:
            unmasked = (key < end)[:, None] & inside[None, :]
            keys = tl.load(place, mask=unmasked, other=0.0)
            values = tl.load(place + KV_HEADS * D, mask=unmasked, other=0.0)
        elif RAGGED:
            keys = tl.load(place, mask=inside[None, :], other=0.0)
            values = tl.load(place + KV_HEADS * D, mask=inside[None, :], other=0.0)
        else:
            keys = tl.load(place)
            values = tl.load(place + KV_HEADS * D)
        # The next tile's pages, an iteration early: its keys then need not wait for them.
        ahead = key + BLOCK_N
        page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if CAUSAL:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        top = new_top
    return acc, top, total
