"""Sum over ranks, addition to the residual and RMS norm, in one launch of each rank.

R: rows that all ranks have addends for   M: rows that this rank gets   H: hidden   W: ranks

Every rank has a window that the others can read: two halves for addends, then flags. A program
copies its rows of x into a half, raises its flag at every rank, waits until the flags that the
same program raised elsewhere have come, and sums its rows out of all windows. Rows belong to
programs by their number alone, so what a program reads was written by programs of its number.

Calls are counted in device memory, for each program, so that graphs can be replayed in any order:
a flag holds the number of the call in which it was raised, and odd and even calls use different
halves. That makes one wait a call enough. Who writes into a half in call n + 2 has waited in
call n + 1, so every rank had then begun call n + 1, and had ended call n, which read that half.
For this every call launches the same number of programs, which all count; those without rows do
nothing else.

Source of the method: the one-shot all-reduce of FasterTransformer and vLLM (custom_all_reduce.cuh,
whose flags count calls as well).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16384
"""Values at most that a program has under way."""


def sum_add_norm(
    x: Tensor,
    start: int,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    windows: tuple[Tensor, ...],
    calls: Tensor,
    rank: int,
    half: int,
) -> Tensor:
    """The sum of x over ranks, added to `residual`, which it overwrites, and normed.

    Called by all ranks with the same R > 0. To be launched on one stream, or on streams that wait
    for one another.

    Args:
        x: [R, H], bf16 or fp32; dim 1 is dense.
        start: the first of the M rows that this rank gets; with M = R each gets all.
        residual: [M, H], of any float dtype; dim 1 is dense.
        weight: [H].
        dtype: of what is returned.
        windows: of all ranks, in rank order: [2 half + 8 programs W] uint8 each, at first zero.
        calls: [programs] int64, at first zero; programs must be the same on all ranks.
        rank: this one.
        half: bytes of half a window; divisible by 16.

    Returns:
        [M, H].
    """
    rows, hidden = x.shape
    out = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    programs = calls.shape[0]
    block = triton.next_power_of_2(hidden)
    tile = max(1, min(_TILE // block, rows // programs))
    tile = 1 << (tile.bit_length() - 1)
    _sum_add_norm[(programs,)](
        x,
        residual,
        weight,
        out,
        windows,
        calls,
        rows,
        start,
        start + residual.shape[0],
        x.stride(0),
        residual.stride(0),
        eps,
        half,
        RANK=rank,
        WORLD=len(windows),
        LANES=triton.next_power_of_2(len(windows)),
        H=hidden,
        BLOCK_H=block,
        ROWS=tile,
        num_warps=min(16, max(4, tile * block // 256)),
        # All there are. Left to itself the assembler saves on them, and delays loads for that: a
        # row would cost two or three journeys to the other GPUs, one after another.
        maxnreg=128,
    )
    return out


@triton.jit
def _acquire(at):  # type: ignore[no-untyped-def]
    """Loads from int64 pointers; what the flags' raisers wrote before is seen afterwards."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [at], tl.int64, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["rows", "start", "stop"])  # type: ignore[untyped-decorator]
def _sum_add_norm(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    windows,
    calls_ptr,
    rows,
    start,
    stop,
    x_stride,
    residual_stride,
    eps,
    half,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LANES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tiles of ROWS rows go round the programs."""
    wire = tl.pointer_type(x_ptr.dtype.element_ty)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK_H)[None, :]
    within = column < H
    call = tl.load(calls_ptr + program) + 1
    shift = call % 2 * half
    mine = (windows[RANK] + shift).to(wire)

    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        # Its own rows nobody else reads, unless all get all.
        wanted = (row < rows) & ((row < start) | (row >= stop) | (stop - start == rows))
        x = tl.load(x_ptr + row * x_stride + column, mask=wanted & within)
        tl.store(mine + row * H + column, x, mask=wanted & within)

    tl.debug_barrier()  # All threads have written, and have read the call's number.
    tl.store(calls_ptr + program, call)
    if program * ROWS < rows:
        flag = tl.pointer_type(tl.int64)
        flags = 2 * half.to(tl.int64) + program * WORLD * 8
        lane = tl.arange(0, LANES)
        there = windows[WORLD - 1].to(tl.int64)
        for rank in tl.static_range(WORLD - 1):
            there = tl.where(lane == rank, windows[rank].to(tl.int64), there)
        # Over NVLink an atomic without a result is as cheap as a store, which has no release here.
        tl.atomic_max((there + flags + RANK * 8).to(flag), call, sem="release", scope="sys")
        awaited = (windows[RANK] + flags).to(flag) + tl.minimum(lane, WORLD - 1)
        weight = tl.load(weight_ptr + column, mask=within, other=0.0)
        first = start // ROWS
        first += (program + programs - first % programs) % programs
        while tl.min(_acquire(awaited), 0) < call:
            pass
        tl.debug_barrier()

        for tile in range(first, tl.cdiv(stop, ROWS), programs):
            row = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
            inside = (row >= start) & (row < stop) & within
            total = tl.zeros((ROWS, BLOCK_H), tl.float32)
            for rank in tl.static_range(WORLD):
                if rank == RANK:
                    at = x_ptr + row * x_stride + column
                else:
                    at = (windows[rank] + shift).to(wire) + row * H + column
                # Past L1, which does not see what others write.
                addend = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                total += addend.to(tl.float32)
            residual_at = residual_ptr + (row - start) * residual_stride + column
            total += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
            rounded = total.to(residual_ptr.dtype.element_ty)
            tl.store(residual_at, rounded, mask=inside)
            # As in kernels/gpu/norm.py.
            total = rounded.to(tl.float32)
            scale = tl.rsqrt(tl.sum(total * total, axis=1) * (1.0 / H) + eps)
            normed = (total * scale[:, None]).to(weight.dtype).to(tl.float32)
            out = (normed * weight.to(tl.float32)).to(weight.dtype)
            out_at = out_ptr + (row - start) * H + column
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
