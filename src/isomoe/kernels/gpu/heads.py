"""From the QKV projection to the attention kernels: QK norm, rope and the KV write in one launch.

T: rows   N: query heads   K: KV heads   D: head dim   R: dims that turn
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.attention import Heads
from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.paged_rows import PagedRows


def prepare_heads(
    qkv: Tensor,
    heads: Heads,
    norms: tuple[Tensor, Tensor, float] | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    *,
    keys: Tensor | None = None,
) -> Tensor:
    """Norms and rotates heads, writes keys and values to their pages; [T, N, D] in qkv's dtype.

    For values of as many dims as keys. qkv: [T, (N + 2K) D], rows may be strided; norms: (q weight
    [D], k weight [D], eps) of an RMS norm of each head, or None; cos, sin: [P, R] fp32 of
    `rope_rows`, of which the first half of cos and the second of sin are read; kv_cache: [pages,
    page, width] contiguous, mutated. keys: [T, K, D] that also gets the rotated keys, such as the
    key columns of qkv itself, for `fresh_prefill`. Rows of padding write nothing to the cache; they
    give what nobody may read.
    """
    num_rows, dim, turned = qkv.shape[0], heads.qk_dim, cos.shape[1]
    q = qkv.new_empty(num_rows, heads.query, dim)
    if num_rows == 0:
        return q
    shape = (heads.query, heads.kv, dim)
    config = find("prepare_heads", shape, num_rows, _default(num_rows))
    tiles = -(-(heads.query + 2 * heads.kv) // config["BLOCK_H"])
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
        HEADS=heads.query,
        KV_HEADS=heads.kv,
        D=dim,
        R=turned,
        PAGE=rows.page_size,
        NORM=norms is not None,
        KEEP=keys is not None,
        BLOCK_HALF=triton.next_power_of_2(turned // 2),
        BLOCK_REST=triton.next_power_of_2(dim - turned) if turned < dim else 0,
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
    R: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, tile of heads). What turns is held as two halves, which rope mixes."""
    HALF: tl.constexpr = R // 2
    row = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * BLOCK_H
    heads = first_head + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_HALF)
    inside = column < HALF
    known = (heads < HEADS + 2 * KV_HEADS)[:, None]
    mask = known & inside[None, :]

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # The heads do not wait for the row's place; so no early return for padding.
    source = qkv + row * qkv_row + heads[:, None] * D + column[None, :]
    low_raw = tl.load(source, mask=mask, other=0.0)
    high_raw = tl.load(source + HALF, mask=mask, other=0.0)
    low, high = low_raw.to(tl.float32), high_raw.to(tl.float32)
    if BLOCK_REST:
        rest_column = R + tl.arange(0, BLOCK_REST)
        rest_inside = rest_column < D
        rest_mask = known & rest_inside[None, :]
        rest_at = qkv + row * qkv_row + heads[:, None] * D + rest_column[None, :]
        rest_raw = tl.load(rest_at, mask=rest_mask, other=0.0)
        rest = rest_raw.to(tl.float32)
    table_row = tl.load(table_rows + row)
    real = table_row >= 0
    position = tl.where(real, tl.load(positions + row), 0)

    is_query = (heads < HEADS)[:, None]
    if NORM:
        square = tl.sum(low * low + high * high, axis=1)
        if BLOCK_REST:
            square += tl.sum(rest * rest, axis=1)
        inverse = tl.math.rsqrt(square * (1.0 / D) + eps)[:, None]
        dtype: tl.constexpr = qkv.dtype.element_ty
        low = _weighed(low * inverse, q_weight, k_weight, column, inside, is_query, dtype)
        high = _weighed(high * inverse, q_weight, k_weight, HALF + column, inside, is_query, dtype)
        if BLOCK_REST:
            rest = _weighed(
                rest * inverse, q_weight, k_weight, rest_column, rest_inside, is_query, dtype
            )
    table = position.to(tl.int64) * R + column
    cosine = tl.load(cos + table, mask=inside, other=0.0)[None, :]
    sine = tl.load(sin + HALF + table, mask=inside, other=0.0)[None, :]
    turned_low = (low * cosine - high * sine).to(qkv.dtype.element_ty)
    turned_high = (high * cosine + low * sine).to(qkv.dtype.element_ty)

    target = q + (row * HEADS + heads[:, None]) * D
    tl.store(target + column[None, :], turned_low, mask=mask & is_query)
    tl.store(target + HALF + column[None, :], turned_high, mask=mask & is_query)
    if BLOCK_REST:
        passed = rest.to(qkv.dtype.element_ty)
        tl.store(target + rest_column[None, :], passed, mask=rest_mask & is_query)
    if first_head + BLOCK_H > HEADS:
        # The cache holds a token's keys, then its values: in the order of qkv's heads.
        is_value = (heads >= HEADS + KV_HEADS)[:, None]
        table_at = tables + table_row.to(tl.int64) * table_stride + position // PAGE
        page = tl.load(table_at, mask=real, other=0).to(tl.int64)
        token = page * PAGE + position % PAGE
        place = cache + token * (2 * KV_HEADS * D) + (heads[:, None] - HEADS) * D
        cached = (heads >= HEADS)[:, None] & real
        low_kept = tl.where(is_value, low_raw, turned_low)
        high_kept = tl.where(is_value, high_raw, turned_high)
        tl.store(place + column[None, :], low_kept, mask=mask & cached)
        tl.store(place + HALF + column[None, :], high_kept, mask=mask & cached)
        if BLOCK_REST:
            rest_kept = tl.where(is_value, rest_raw, passed)
            tl.store(place + rest_column[None, :], rest_kept, mask=rest_mask & cached)
        if KEEP:
            kept = cached & (heads < HEADS + KV_HEADS)[:, None]
            copy = keys + row * keys_row + (heads[:, None] - HEADS) * keys_head
            tl.store(copy + column[None, :], turned_low, mask=mask & kept)
            tl.store(copy + HALF + column[None, :], turned_high, mask=mask & kept)
            if BLOCK_REST:
                tl.store(copy + rest_column[None, :], passed, mask=rest_mask & kept)


@triton.jit  # type: ignore[untyped-decorator]
def _weighed(x, q_weight, k_weight, column, inside, is_query, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, normed, times its head's weight. Rounded to the weight's dtype before and after the
    product, then to `dtype`, as `rms_norm` does."""
    weight = tl.where(
        is_query,
        tl.load(q_weight + column, mask=inside, other=0.0)[None, :],
        tl.load(k_weight + column, mask=inside, other=0.0)[None, :],
    )
    product = x.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    return product.to(weight.dtype).to(dtype).to(tl.float32)
