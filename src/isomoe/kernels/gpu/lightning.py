"""Lightning attention in Triton: `kernels/lightning.py` is the specification.

T: rows   N: heads   d: head dim   C: rows of a piece
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.launch import overlapped
from isomoe.kernels.paged_rows import PagedRows

_PIECE = 16
"""Rows computed at once; the state stays in registers from piece to piece."""


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, states: Tensor, decay: Tensor, rows: PagedRows
) -> Tensor:
    """S <- exp(-decay) S + k^T v, then out = d^-1/2 q S, token by token: [T, N, d] fp32.

    q, k, v: [T, N, d] fp32, their last dim dense; states: [slots, N, d, d] fp32, contiguous,
    mutated: a request's slot is its row of the block tables, and its first row finds zeros there;
    decay: [N] fp32. Rows of padding give zeros and change no state.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if rows.num_decodes:
        _launch(q, k, v, states, decay, out, rows, rows.num_decodes, rows.positions, decode=True)
    if rows.prefill_lens:
        assert rows.prefill_starts is not None
        prefills = len(rows.prefill_lens)
        _launch(q, k, v, states, decay, out, rows, prefills, rows.prefill_starts, decode=False)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    decay: Tensor,
    out: Tensor,
    rows: PagedRows,
    requests: int,
    starts: Tensor,
    *,
    decode: bool,
) -> None:
    _, heads, dim = q.shape
    block_d = max(16, triton.next_power_of_2(dim))
    block_v = min(32, block_d)
    tiles = triton.cdiv(dim, block_v)
    _lightning_attention[(requests, heads * tiles)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        states,
        decay,
        out,
        rows.table_rows,
        rows.positions,
        starts,
        dim**-0.5,
        HEADS=heads,
        D=dim,
        TILES=tiles,
        DECODE=decode,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_C=_PIECE,
        num_warps=4,
        **overlapped(),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _lightning_attention(  # type: ignore[no-untyped-def]
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    states,
    decay,
    out,
    table_rows,
    positions,
    starts,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (request, head * TILES + tile of the values' dims), all of the request's rows."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request = tl.program_id(0)
    head = tl.program_id(1) // TILES
    if DECODE:
        begin = request
        new = 1
    else:
        begin = tl.load(starts + request)
        new = tl.load(starts + request + 1) - begin
    table_row = tl.load(table_rows + begin)
    if table_row < 0:
        return
    began = tl.load(positions + begin) > 0
    rate = tl.load(decay + head)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    unit = tl.program_id(1) % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    within = unit < D
    state_at = states + (table_row.to(tl.int64) * HEADS + head) * (D * D)
    state_at = state_at + column[:, None] * D + unit[None, :]
    held = inside[:, None] & within[None, :]
    state = tl.load(state_at, mask=held & began, other=0.0)
    row = begin.to(tl.int64)
    if DECODE:
        query = tl.load(q + row * q_row + head * q_head + column, mask=inside, other=0.0)
        key = tl.load(k + row * k_row + head * k_head + column, mask=inside, other=0.0)
        value = tl.load(v + row * v_row + head * v_head + unit, mask=within, other=0.0)
        state = state * tl.exp(-rate) + key[:, None] * value[None, :]
        result = tl.sum(query[:, None] * state, axis=0) * scale
        tl.store(out + (row * HEADS + head) * D + unit, result, mask=within)
    else:
        step = tl.arange(0, BLOCK_C)
        age = step[:, None] - step[None, :]
        kept = tl.where(age >= 0, tl.exp(-rate * tl.maximum(age, 0)), 0.0)
        since = tl.exp(-rate * (step + 1))
        for start in range(0, new, BLOCK_C):
            count = tl.minimum(new - start, BLOCK_C)
            real = (step < count)[:, None]
            at = (row + start + step)[:, None]
            place = at * q_row + head * q_head + column[None, :]
            queries = tl.load(q + place, mask=real & inside[None, :], other=0.0)
            place = at * k_row + head * k_head + column[None, :]
            keys = tl.load(k + place, mask=real & inside[None, :], other=0.0)
            place = at * v_row + head * v_head + unit[None, :]
            values = tl.load(v + place, mask=real & within[None, :], other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * kept
            result = tl.dot(queries * since[:, None], state, input_precision="ieee")
            result = tl.dot(scores, values, result, input_precision="ieee") * scale
            place = (at * HEADS + head) * D + unit[None, :]
            tl.store(out + place, result, mask=real & within[None, :])
            # Before the last of them there are as many steps of decay.
            left = tl.exp(-rate * tl.maximum(count - 1 - step, 0))
            state = state * tl.exp(-rate * count)
            state = tl.dot(tl.trans(keys * left[:, None]), values, state, input_precision="ieee")
    tl.store(state_at, state, mask=held)
