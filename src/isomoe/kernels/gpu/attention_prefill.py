"""Flash attention of requests' new rows over their paged keys.

T: rows   N: query heads   K: KV heads   G = N / K: query heads a KV head   D, V: dims of a key, of
a value

Source: Dao, FlashAttention-2 (2023).
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.attention import Heads
from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.head_blocks import WIDE, head_blocks, head_shape
from isomoe.kernels.paged_rows import PagedRows

_LOG2_E = 1.4426950408889634


def prefill_attention(
    q: Tensor, kv_cache: Tensor, rows: PagedRows, heads: Heads, sinks: Tensor | None, out: Tensor
) -> None:
    """Fills the prefills' rows of `out`, one launch.

    q: [T, N, D], T and N may be strided; kv_cache: [pages, page, width] contiguous, in q's dtype,
    the new rows already written; sinks: [N] fp32; out: [T, N, V] contiguous. A tile holds
    neighbouring rows for all G heads of a KV head, so that a few new rows fill one too. Softmax
    and sums are fp32.
    """
    blocks = head_blocks(heads)
    prefills = len(rows.prefill_lens)
    new_rows = sum(new for new, _ in rows.prefill_lens)
    config = _config(q.dtype, new_rows, heads)
    # A prefill's first tile is its first row's in a tiling of all rows without gaps, plus one for
    # each prefill before it: room for any number of rows, known without a look at the device.
    tiles = new_rows * blocks["GROUP"] // config["BLOCK_M"] + prefills
    _prefill_attention[(tiles * heads.kv,)](
        q,
        q.stride(0),
        q.stride(1),
        kv_cache,
        q if sinks is None else sinks,
        out,
        rows.prefill_starts,
        prefills,
        rows.table_rows,
        rows.positions,
        rows.block_tables,
        rows.block_tables.stride(0),
        heads.scale * _LOG2_E,
        PAGE=rows.page_size,
        SINKS=sinks is not None,
        SPAN_BLOCK=heads.span.block or 0,
        BLOCK_P=max(16, triton.next_power_of_2(prefills)),
        **blocks,
        **config,
    )


def fresh_prefill(q: Tensor, k: Tensor, v: Tensor, rows: PagedRows, scale: float) -> Tensor:
    """The rows of prefill, where none has earlier context, by torch: a call for a run of equals.

    Causal. q: [T, N, D]; k: [T, K, D], v: [T, K, V], rotated, strides free but the last. Returns
    [rows, N, V].
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


def _config(dtype: torch.dtype, num_rows: int, heads: Heads) -> Config:
    dim, wide = heads.qk_dim, heads.v_dim > WIDE // 2
    if dtype.itemsize > 2:
        block_n = 32 if dim <= 128 else 16
        stages = 1 if wide else 2
        return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 8, "num_stages": stages}
    few = num_rows * (heads.query // heads.kv) <= 64
    if wide:
        default = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    elif dim > 128:
        block_m = 64 if few else 128
        default = {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    elif few:
        default = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    else:
        default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return find("prefill_attention", head_shape(heads), num_rows, default)


@triton.jit(do_not_specialize=["prefills"])  # type: ignore[untyped-decorator]
def _prefill_attention(  # type: ignore[no-untyped-def]
    q,
    q_row,
    q_head,
    cache,
    sinks,
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
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    LATENT: tl.constexpr,
    MAIN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
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
    inside = column < MAIN
    row = (begin + new_row).to(tl.int64)[:, None]
    query_head = (head * GROUP + flat % GROUP)[:, None]
    query_at = q + row * q_row + query_head * q_head
    filled = (new_row < new)[:, None]
    queries = tl.load(query_at + column[None, :], mask=filled & inside[None, :], other=0.0)
    other_queries = queries
    if BLOCK_R:
        rest = MAIN + tl.arange(0, BLOCK_R)
        other_queries = tl.load(
            query_at + rest[None, :], mask=filled & (rest < D)[None, :], other=0.0
        )

    position = context + new_row
    final = tl.minimum((place + 1) * BLOCK_M, new * GROUP) - 1
    end = context + final // GROUP + 1
    first = context + place * BLOCK_M // GROUP
    # Each row sees the keys from `lowest` to `position`.
    lowest = position
    if SPAN_BLOCK:
        position = tl.minimum((position // SPAN_BLOCK + 1) * SPAN_BLOCK, context + new) - 1
        end = tl.minimum(((end - 1) // SPAN_BLOCK + 1) * SPAN_BLOCK, context + new)
    # Keys below `clear` are seen by every row of the tile.
    low = 0
    clear = (first + 1) // BLOCK_N * BLOCK_N
    if CHUNK:
        lowest = position // CHUNK * CHUNK
        low = first // CHUNK * CHUNK // BLOCK_N * BLOCK_N
    if WINDOW:
        lowest = tl.maximum(position - WINDOW + 1, 0)
        low = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.where(table_row >= 0, end, 0)
    clear = tl.where(table_row >= 0, clear, 0)

    table = tables + table_row.to(tl.int64) * table_stride
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        # A sink is one more key of value zero.
        top = tl.load(sinks + head * GROUP + flat % GROUP) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if not (WINDOW or CHUNK):
        acc, top, total = _attend(
            acc, top, total, queries, other_queries, lowest, position, cache, head, table,
            0, clear, end, scale_log2, KV_HEADS, D, DV, WIDTH, LATENT, MAIN, PAGE,
            BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V, False, False,
        )  # fmt: skip
        low = clear
    acc, top, total = _attend(
        acc, top, total, queries, other_queries, lowest, position, cache, head, table,
        low, end, end, scale_log2, KV_HEADS, D, DV, WIDTH, LATENT, MAIN, PAGE,
        BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V, True, WINDOW + CHUNK > 0,
    )  # fmt: skip

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    value_column = tl.arange(0, BLOCK_V)
    target = out + (row * (KV_HEADS * GROUP) + query_head) * DV + value_column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=filled & (value_column < DV)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    acc,
    top,
    total,
    queries,
    other_queries,
    lowest,
    position,
    cache,
    head,
    table,
    begin,
    stop,
    end,
    scale_log2,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    LATENT: tl.constexpr,
    MAIN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
):
    """Adds the tiles of keys from `begin` to `stop`; keys from `end` on are not read.

    UPPER: not all rows see the last of these keys. LOWER: nor the first of them.
    """
    lane = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    inside = column < MAIN
    value_column = tl.arange(0, BLOCK_V)
    value_inside = value_column < DV
    source = cache + (head * D + column)[None, :]
    value_source = cache + (KV_HEADS * D + head * DV + value_column)[None, :]
    ahead = begin + lane
    page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
    for start in range(begin, stop, BLOCK_N):
        key = start + lane
        token = page.to(tl.int64) * PAGE + key % PAGE
        place = source + token[:, None] * WIDTH
        value_place = value_source + token[:, None] * WIDTH
        if UPPER:
            known = (key < end)[:, None]
            keys = tl.load(place, mask=known & inside[None, :], other=0.0)
        elif MAIN != BLOCK_D:
            keys = tl.load(place, mask=inside[None, :], other=0.0)
        else:
            keys = tl.load(place)
        if LATENT:
            values = keys
        elif UPPER:
            values = tl.load(value_place, mask=known & value_inside[None, :], other=0.0)
        elif DV != BLOCK_V:
            values = tl.load(value_place, mask=value_inside[None, :], other=0.0)
        else:
            values = tl.load(value_place)
        # The next tile's pages, an iteration early: its keys then need not wait for them.
        ahead = key + BLOCK_N
        page = tl.load(table + ahead // PAGE, mask=ahead < end, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if BLOCK_R:
            rest = MAIN + tl.arange(0, BLOCK_R)
            other_place = cache + (head * D + rest)[None, :] + token[:, None] * WIDTH
            read = (key < end)[:, None] & (rest < D)[None, :]
            others = tl.load(other_place, mask=read, other=0.0)
            scores = tl.dot(other_queries, tl.trans(others), scores, input_precision="ieee")
        if UPPER:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        if LOWER:
            scores = tl.where(key[None, :] >= lowest[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        base = new_top
        if LOWER:
            # A row that has not come to its first key yet.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        top = new_top
    return acc, top, total
