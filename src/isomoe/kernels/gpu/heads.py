"""From the QKV projection to the attention kernels: QK norm, rope and the KV write in one launch.

T: rows   N: query heads   K: KV heads   d: head dim
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.paged_rows import PagedRows


def prepare_heads(
    qkv: Tensor,
    num_heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor, float] | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    *,
    keys: Tensor | None = None,
) -> Tensor:
    """Norms and rotates heads, writes keys and values to their pages; [T, N, d] in qkv's dtype.

    qkv: [T, (N + 2K) d], rows may be strided; norms: (q weight [d], k weight [d], eps) of an RMS
    norm of each head, or None; cos, sin: [P, d] fp32 of `rope_table`, of which the first half of
    cos and the second of sin are read; kv_cache: [pages, page, 2K, d] contiguous, mutated.
    keys: [T, K, d] that also gets the rotated keys, such as the key columns of qkv itself, for
    `fresh_prefill`. Rows of padding write nothing to the cache; they give what nobody may read.
    """
    num_rows, dim = qkv.shape[0], kv_cache.shape[3]
    q = qkv.new_empty(num_rows, num_heads, dim)
    if num_rows == 0:
        return q
    heads = num_heads + 2 * kv_heads
    config = find("prepare_heads", (num_heads, kv_heads, dim), num_rows, _default(num_rows))
    tiles = -(-heads // config["BLOCK_H"])
    q_weight, k_weight, eps = (qkv, qkv, 0.0) if norms is None else norms
    _prepare_heads[(num_rows, tiles)](
        qkv,
        qkv.stride(0),
        q,
        qkv if keys is None else keys,
        0 if keys is None else keys.stride(0),
        0 if keys is None else keys.stride(1),
        kv_cache,
        q_weight,
        k_weight,
        eps,
        cos,
        sin,
        rows.table_rows,
        rows.positions,
        rows.block_tables,
        rows.block_tables.stride(0),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        D=dim,
        PAGE=rows.page_size,
        NORM=norms is not None,
        KEEP=keys is not None,
        BLOCK_HALF=triton.next_power_of_2(dim // 2),
        **config,
        **overlapped(),
    )
    return q


def candidates(num_rows: int) -> Iterator[Config]:
    """Configurations worth timing for `prepare_heads`."""
    for block in (4, 8, 16, 32, 64):
        for warps in (1, 2, 4, 8):
            if 4 * warps <= block:  # 16 bytes a thread of d = 128 and two-byte types
                yield {"BLOCK_H": block, "num_warps": warps}


def _default(num_rows: int) -> Config:
    # A tile of eight heads in one warp: norms need no exchange between warps. With few rows the
    # machine is empty, and more threads shorten the one chain of loads that counts.
    return {"BLOCK_H": 8, "num_warps": 2 if num_rows <= 64 else 1}


@triton.jit  # type: ignore[untyped-decorator]
def _prepare_heads(  # type: ignore[no-untyped-def]
    qkv,
    qkv_row,
    q,
    keys,
    keys_row,
    keys_head,
    cache,
    q_weight,
    k_weight,
    eps,
    cos,
    sin,
    table_rows,
    positions,
    tables,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, tile of heads). A head is held as two halves, which rope mixes."""
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * BLOCK_H
    heads = first_head + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_HALF)
    inside = column < HALF
    mask = (heads < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # The heads do not wait for the row's place; so no early return for padding.
    source = qkv + row * qkv_row + heads[:, None] * D + column[None, :]
    low_raw = tl.load(source, mask=mask, other=0.0)
    high_raw = tl.load(source + HALF, mask=mask, other=0.0)
    table_row = tl.load(table_rows + row)
    real = table_row >= 0
    position = tl.where(real, tl.load(positions + row), 0)

    low, high = low_raw.to(tl.float32), high_raw.to(tl.float32)
    is_query = (heads < HEADS)[:, None]
    if NORM:
        square = tl.sum(low * low + high * high, axis=1)
        inverse = tl.math.rsqrt(square * (1.0 / D) + eps)[:, None]
        weight_low = tl.where(
            is_query,
            tl.load(q_weight + column, mask=inside, other=0.0)[None, :],
            tl.load(k_weight + column, mask=inside, other=0.0)[None, :],
        )
        weight_high = tl.where(
            is_query,
            tl.load(q_weight + HALF + column, mask=inside, other=0.0)[None, :],
            tl.load(k_weight + HALF + column, mask=inside, other=0.0)[None, :],
        )
        # Rounded before and after the product with the weight, as `rms_norm` does.
        low = (low * inverse).to(weight_low.dtype).to(tl.float32) * weight_low.to(tl.float32)
        high = (high * inverse).to(weight_low.dtype).to(tl.float32) * weight_high.to(tl.float32)
        low = low.to(weight_low.dtype).to(tl.float32)
        high = high.to(weight_low.dtype).to(tl.float32)
    table = position.to(tl.int64) * D + column
    cosine = tl.load(cos + table, mask=inside, other=0.0)[None, :]
    sine = tl.load(sin + HALF + table, mask=inside, other=0.0)[None, :]
    turned_low = (low * cosine - high * sine).to(qkv.dtype.element_ty)
    turned_high = (high * cosine + low * sine).to(qkv.dtype.element_ty)

    target = q + (row * HEADS + heads[:, None]) * D + column[None, :]
    tl.store(target, turned_low, mask=mask & is_query)
    tl.store(target + HALF, turned_high, mask=mask & is_query)
    if first_head + BLOCK_H > HEADS:
        # The cache holds a token's keys, then its values: in the order of qkv's heads.
        is_value = (heads >= HEADS + KV_HEADS)[:, None]
        table_at = tables + table_row.to(tl.int64) * table_stride + position // PAGE
        page = tl.load(table_at, mask=real, other=0).to(tl.int64)
        token = page * PAGE + position % PAGE
        place = token * (2 * KV_HEADS * D) + (heads[:, None] - HEADS) * D + column[None, :]
        cached = mask & (heads >= HEADS)[:, None] & real
        tl.store(cache + place, tl.where(is_value, low_raw, turned_low), mask=cached)
        tl.store(cache + place + HALF, tl.where(is_value, high_raw, turned_high), mask=cached)
        if KEEP:
            kept = cached & (heads < HEADS + KV_HEADS)[:, None]
            copy = keys + row * keys_row + (heads[:, None] - HEADS) * keys_head + column[None, :]
            tl.store(copy, turned_low, mask=kept)
            tl.store(copy + HALF, turned_high, mask=kept)
