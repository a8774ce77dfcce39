"""Attention over a paged KV cache on a GPU: `kernels/attention.py` is the specification.

T: rows   N: query heads   K: KV heads   d: head dim
"""

import torch
from torch import Tensor

from isomoe.kernels.gpu.attention_decode import decode_attention
from isomoe.kernels.gpu.attention_prefill import fresh_prefill, prefill_attention
from isomoe.kernels.gpu.heads import prepare_heads
from isomoe.kernels.paged_rows import PagedRows

__all__ = ["PagedRows", "attend", "fresh_prefill", "paged_attention", "prepare_heads"]

library_prefill = False
"""Whether prompts without earlier context go through torch's own attention."""


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
    fresh = library_prefill and bool(rows.prefill_lens)
    fresh = fresh and all(new == keys for new, keys in rows.prefill_lens)
    if not fresh:
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
    [T, K, d], k rotated: prefills then run in torch's own attention if none has earlier context.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows.num_decodes:
        decode_attention(q, kv_cache, rows, scale, out)
    lens = rows.prefill_lens
    if lens:
        if new is not None and all(rows_new == keys for rows_new, keys in lens):
            fresh_prefill(q, *new, rows, scale, out)
        else:
            prefill_attention(q, kv_cache, rows, scale, out)
    covered = rows.num_decodes + sum(rows_new for rows_new, _ in lens)
    if covered < q.shape[0]:
        out[covered:].zero_()
    return out
