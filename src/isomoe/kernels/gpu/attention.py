"""Attention over a paged KV cache on a GPU: `kernels/attention.py` is the specification.

T: rows   N: query heads   K: KV heads   D, V: dims of a key, of a value
"""

import torch
from torch import Tensor

from isomoe.kernels.attention import Heads
from isomoe.kernels.gpu.attention_decode import decode_attention
from isomoe.kernels.gpu.attention_prefill import equal_runs, fresh_prefill, prefill_attention
from isomoe.kernels.gpu.heads import prepare_heads
from isomoe.kernels.paged_rows import PagedRows
from isomoe.kernels.span import CAUSAL

__all__ = ["PagedRows", "attend", "fresh_prefill", "paged_attention", "prepare_heads"]

_LIBRARY_ROWS = 1024
"""Rows a call from which torch's own attention (cuDNN's, on an H100) beats ours on prompts without
earlier context: 500 TFLOP/s measured. Shorter prompts would take a call each."""


def attend(
    qkv: Tensor,
    heads: Heads,
    norms: tuple[Tensor, Tensor, float] | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    sinks: Tensor | None = None,
) -> Tensor:
    """From the QKV projection to the heads' outputs: `prepare_heads`, then `paged_attention`.

    For values of as many dims as keys. qkv: [T, (N + 2K) D], overwritten in part. Returns
    [T, N, D] in its dtype.
    """
    if sinks is not None or not for_library(qkv, rows, heads):
        q = prepare_heads(qkv, heads, norms, cos, sin, kv_cache, rows)
        return paged_attention(q, kv_cache, rows, heads, sinks)
    n, k = heads.query, heads.kv
    split = qkv.view(qkv.shape[0], n + 2 * k, -1)
    key, value = split[:, n : n + k], split[:, n + k :]
    q = prepare_heads(qkv, heads, norms, cos, sin, kv_cache, rows, keys=key)
    return paged_attention(q, kv_cache, rows, heads, new=(key, value))


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    rows: PagedRows,
    heads: Heads,
    sinks: Tensor | None = None,
    *,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of the rows over their requests' pages, [T, N, V] in q's dtype.

    q: [T, N, D], T and N may be strided; kv_cache: [pages, page, width] contiguous, in q's dtype,
    the new rows already written; sinks: [N] fp32, or None. Rows of padding give zeros. new: the
    rows' own keys [T, K, D], rotated, and values [T, K, V], where `for_library` says so: prefills
    then run in torch's attention.
    """
    prefilled = sum(new_rows for new_rows, _ in rows.prefill_lens)
    if new is not None and prefilled == q.shape[0]:
        return fresh_prefill(q, *new, rows, heads.scale)
    out = torch.empty((*q.shape[:2], heads.v_dim), dtype=q.dtype, device=q.device)
    if rows.num_decodes:
        decode_attention(q, kv_cache, rows, heads, sinks, out)
    covered = rows.num_decodes + prefilled
    if new is not None:
        out[rows.num_decodes : covered] = fresh_prefill(q, *new, rows, heads.scale)
    elif prefilled:
        prefill_attention(q, kv_cache, rows, heads, sinks, out)
    if covered < q.shape[0]:
        out[covered:].zero_()
    return out


def for_library(x: Tensor, rows: PagedRows, heads: Heads) -> bool:
    """Whether torch's own attention is best for the prefills of a step: long, two-byte numbers,
    and none with earlier context, so that their keys are the rows' own."""
    lens = rows.prefill_lens
    if x.dtype.itemsize > 2 or heads.span != CAUSAL or not lens:
        return False
    fresh = all(new == keys for new, keys in lens)
    return fresh and sum(new for new, _ in lens) >= _LIBRARY_ROWS * len(equal_runs(lens))
