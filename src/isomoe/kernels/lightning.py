"""Lightning attention: linear attention whose state decays by a fixed factor of each head.

Source: Qin et al., Lightning Attention-2 (2024).

T: rows   N: heads   d: head dim   C: rows of a piece
"""

import torch
from torch import Tensor

from isomoe.kernels.attention import AttentionBatch

_PIECE = 64
"""Rows computed at once: C^2 products of rows against C updates of the state."""


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, states: Tensor, decay: Tensor, batch: AttentionBatch
) -> Tensor:
    """S <- exp(-decay) S + k^T v, then out = d^-1/2 q S, token by token: [T, N, d] fp32.

    q, k, v: [T, N, d] fp32; rows after the requests' give zeros and change no state.
    states: [slots, N, d, d] fp32, mutated; a request's first rows find its state at zero.
    decay: [N] fp32, positive.
    """
    assert batch.state_slots is not None
    out = torch.zeros_like(q)
    row = 0
    lens = zip(batch.query_lens, batch.context_lens, batch.state_slots, strict=True)
    for new, keys, slot in lens:
        state = states[slot]
        if new == keys:
            state.zero_()
        for first in range(row, row + new, _PIECE):
            piece = slice(first, min(first + _PIECE, row + new))
            out[piece] = _piece(q[piece], k[piece], v[piece], state, decay)
        row += new
    return out.mul_(q.shape[-1] ** -0.5)


def _piece(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    """The unscaled outputs of consecutive rows [C, N, d]; brings the state behind them."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    count = q.shape[1]
    step = torch.arange(1, count + 1, device=q.device)
    age = (step.unsqueeze(1) - step).clamp(min=0)  # of a key, in rows, when a query reads it
    kept = torch.exp(-decay.view(-1, 1, 1) * age).tril()
    since = torch.exp(-decay.view(-1, 1) * step).unsqueeze(-1)
    left = torch.exp(-decay.view(-1, 1) * (count - step)).unsqueeze(-1)
    out = (q @ k.transpose(1, 2) * kept) @ v + (q * since) @ state
    state.mul_(since[:, -1:]).add_((k * left).transpose(1, 2) @ v)
    return out.transpose(0, 1)
