"""Multi-head latent attention over a paged cache of latents.

Source: DeepSeek-V2 (2024), section 2.1.

T: rows   N: heads   c: latent dim   r: dims that turn   n: dims that do not   v: value dim

The cache holds c + r numbers a token, the same for all heads. Decoding absorbs the up-projections
into queries and outputs, so that it reads latents alone; a prompt expands them to keys and values
of every head, which takes fewer operations. (On GPUs only long prompts without earlier context do.)
Both are the same up to rounding.
"""

import torch
from torch import Tensor

from isomoe.kernels.attention import (
    AttentionBatch,
    Heads,
    decode_attention,
    gather,
    prefill_attention,
)


def latent_attention(
    q: Tensor, latents: Tensor, batch: AttentionBatch, up: Tensor, heads: Heads
) -> Tensor:
    """Attention of the new rows, [T, N, v] in q's dtype; rows after the requests' give zeros.

    q: [T, N, n + r], the turned dims last; latents: [pages, page, c + r], the new rows written;
    up: [N, n + v, c], a head's up-projection to its key and its value; heads: those of the
    expanded form: N query and KV heads of n + r and v dims.
    """
    c = up.shape[2]
    n = up.shape[1] - heads.v_dim
    absorbed = Heads(
        query=heads.query,
        kv=1,
        qk_dim=latents.shape[2],
        v_dim=c,
        scale=heads.scale,
        span=heads.span,
        latent=True,
    )
    key_up, value_up = up[:, :n], up[:, n:]
    out = q.new_empty((*q.shape[:2], heads.v_dim))
    out[batch.num_rows :].zero_()
    decodes, prefills = batch.split(heads.span)
    for prefill in prefills:
        seen, _ = gather(latents, prefill.pages, 1, prefill.keys, absorbed)
        k, v = _expand(seen[0, 0], up, n)
        rows = slice(prefill.begin, prefill.end)
        out[rows] = prefill_attention(q[rows], k, v, prefill, heads)
    for decode in decodes:
        mine = q.index_select(0, decode.rows)
        flat = torch.einsum("tnd,ndc->tnc", mine[..., :n], key_up)
        mixed = decode_attention(torch.cat((flat, mine[..., n:]), -1), latents, decode, absorbed)
        out.index_copy_(0, decode.rows, torch.einsum("tnc,nvc->tnv", mixed, value_up))
    return out


def _expand(seen: Tensor, up: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Keys [1, N, L, n + r] and values [1, N, L, v] of every head. seen: [L, c + r]."""
    c = up.shape[2]
    both = torch.einsum("lc,ndc->nld", seen[:, :c], up)
    turned = seen[:, c:].expand(len(up), -1, -1)
    return torch.cat((both[..., :n], turned), -1).unsqueeze(0), both[..., n:].unsqueeze(0)
