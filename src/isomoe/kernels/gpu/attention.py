"""Attention over a paged KV cache on a GPU: `kernels/attention.py` is the specification.

T: rows   N: query heads   K: KV heads   d: head dim
"""

import torch
from torch import Tensor

from isomoe.kernels.gpu.attention_decode import decode_attention
from isomoe.kernels.gpu.attention_prefill import equal_runs, fresh_prefill, prefill_attention
from isomoe.kernels.gpu.heads import prepare_heads
from isomoe.kernels.paged_rows import PagedRows

__all__ = ["PagedRows", "attend", "fresh_prefill", "paged_attention", "prepare_heads"]

_LIBRARY_ROWS = 1024
"""Rows a call from which torch's own attention (cuDNN's, on an H100) beats ours on prompts without
earlier context: 500 TFLOP/s measured. Shorter prompts would take a call each."""


def attend(
    qkv: Tensor,
    num_heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor, float] | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    scale: float,
) -> Tensor:
    """From the QKV projection to the heads' outputs: `prepare_heads`, then `paged_attention`.

    qkv: [T, (N + 2K) d], overwritten in part. Returns [T, N, d] in its dtype.
    """
    if qkv.dtype.itemsize > 2 or not _for_library(rows):
        q = prepare_heads(qkv, num_heads, kv_heads, norms, cos, sin, kv_cache, rows)
        return paged_attention(q, kv_cache, rows, scale)
    heads = qkv.view(qkv.shape[0], num_heads + 2 * kv_heads, -1)
    k, v = heads[:, num_heads : num_heads + kv_heads], heads[:, num_heads + kv_heads :]
    q = prepare_heads(qkv, num_heads, kv_heads, norms, cos, sin, kv_cache, rows, keys=k)
    return paged_attention(q, kv_cache, rows, scale, new=(k, v))


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    scale: float,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of the rows over their requests' pages, [T, N, d] in q's dtype.

    q: [T, N, d], T and N may be strided; kv_cache: [pages, page, 2K, d] contiguous, in q's dtype,
    the new rows already written. Rows of padding give zeros. new: the rows' own (k, v), each
    [T, K, d], k rotated, if no prefill has earlier context: these then run in torch's attention.
    """
    prefilled = sum(new_rows for new_rows, _ in rows.prefill_lens)
    if new is not None and prefilled == q.shape[0]:
        return fresh_prefill(q, *new, rows, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows.num_decodes:
        decode_attention(q, kv_cache, rows, scale, out)
    covered = rows.num_decodes + prefilled
    if new is not None:
        out[rows.num_decodes : covered] = fresh_prefill(q, *new, rows, scale)
    elif prefilled:
        prefill_attention(q, kv_cache, rows, scale, out)
    if covered < q.shape[0]:
        out[covered:].zero_()
    return out


def _for_library(rows: PagedRows) -> bool:
    lens = rows.prefill_lens
    if not lens or any(new != keys for new, keys in lens):
        return False
    return sum(new for new, _ in lens) >= _LIBRARY_ROWS * len(equal_runs(lens))
