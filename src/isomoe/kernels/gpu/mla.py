"""Multi-head latent attention on a GPU: `kernels/mla.py` is the specification.

T: rows   N: heads   c: latent dim   r: dims that turn   n: dims that do not   v: value dim
"""

from dataclasses import replace

import torch
from torch import Tensor

from isomoe.kernels.attention import Heads
from isomoe.kernels.gpu.attention import for_library, paged_attention
from isomoe.kernels.gpu.attention_prefill import fresh_prefill
from isomoe.kernels.paged_rows import PagedRows


def latent_attention(
    q: Tensor, latents: Tensor, rows: PagedRows, up: Tensor, heads: Heads
) -> Tensor:
    """As `kernels.mla.latent_attention`. Only long prompts without earlier context are expanded,
    for torch's own attention: of a long context the keys of all heads may not fit into memory.
    """
    if not for_library(q, rows, heads):
        return _absorbed(q, latents, rows, up, heads)
    first = rows.num_decodes
    stop = first + sum(new for new, _ in rows.prefill_lens)
    out = q.new_empty((*q.shape[:2], heads.v_dim))
    out[stop:].zero_()
    if first:
        decodes = replace(rows, prefill_lens=(), prefill_starts=None)
        out[:first] = _absorbed(q[:first], latents, decodes, up, heads)
    position = rows.positions[first:stop].long()
    page = rows.block_tables[rows.table_rows[first:stop].long(), position // rows.page_size]
    own = latents.flatten(0, 1)[page.long() * rows.page_size + position % rows.page_size]
    c = up.shape[2]
    both = torch.einsum("tc,ndc->tnd", own[:, :c], up)
    plain, value = torch.split(both, [up.shape[1] - heads.v_dim, heads.v_dim], dim=-1)
    turned = own[:, c:].unsqueeze(1).expand(-1, heads.query, -1)
    key = torch.cat((plain, turned), -1)
    prompts = replace(rows, num_decodes=0)
    out[first:stop] = fresh_prefill(q[first:stop], key, value, prompts, heads.scale)
    return out


def _absorbed(q: Tensor, latents: Tensor, rows: PagedRows, up: Tensor, heads: Heads) -> Tensor:
    """By attention of all heads over the latents themselves, whose values are their first part."""
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
    flat = torch.einsum("tnd,ndc->tnc", q[..., :n], up[:, :n])
    mixed = paged_attention(torch.cat((flat, q[..., n:]), -1), latents, rows, absorbed)
    return torch.einsum("tnc,nvc->tnv", mixed, up[:, n:])
