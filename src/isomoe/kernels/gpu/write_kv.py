"""The write of new keys and values to their pages, of heads that `prepare_heads` does not do.

T: rows   K: KV heads   D, V: dims of a key, of a value
"""

import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.paged_rows import PagedRows


def write_kv(k: Tensor, v: Tensor | None, kv_cache: Tensor, rows: PagedRows) -> None:
    """As `kernels.attention.write_kv`; rows of padding write nothing.

    k: [T, K, D], v: [T, K, V] or None, their last dim dense; kv_cache: [pages, page, width]
    contiguous, mutated.
    """
    num_rows, kv_heads, dim = k.shape
    if num_rows == 0:
        return
    value = k if v is None else v
    value_dim = 0 if v is None else v.shape[2]
    _write_kv[(num_rows,)](
        k,
        k.stride(0),
        k.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        kv_cache,
        rows.table_rows,
        rows.positions,
        rows.block_tables,
        rows.block_tables.stride(0),
        KV_HEADS=kv_heads,
        D=dim,
        DV=value_dim,
        PAGE=rows.page_size,
        BLOCK_K=triton.next_power_of_2(kv_heads),
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_V=triton.next_power_of_2(max(value_dim, 1)),
        num_warps=4,
        **overlapped(),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _write_kv(  # type: ignore[no-untyped-def]
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    cache,
    table_rows,
    positions,
    tables,
    table_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(table_rows + row)
    if table_row < 0:
        return
    position = tl.load(positions + row)
    page = tl.load(tables + table_row.to(tl.int64) * table_stride + position // PAGE).to(tl.int64)
    token = cache + (page * PAGE + position % PAGE) * (KV_HEADS * (D + DV))
    head = tl.arange(0, BLOCK_K)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (column < D)
    keys = tl.load(k + row * k_row + head * k_head + column, mask=mask)
    tl.store(token + head * D + column, keys, mask=mask)
    if DV:
        column = tl.arange(0, BLOCK_V)[None, :]
        mask = (head < KV_HEADS) & (column < DV)
        values = tl.load(v + row * v_row + head * v_head + column, mask=mask)
        tl.store(token + KV_HEADS * D + head * DV + column, values, mask=mask)
