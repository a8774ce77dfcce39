"""Pairs of a row and one of its experts, sorted by expert into tiles of one expert each.

P: pairs, rows x K   E: local experts
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.launch import overlapped

_ONE_LAUNCH = 4096
"""Up to so many pairs each program counts all experts' pairs itself, which saves a launch."""
_CHUNK = 2048
_PARTS = 8
"""Beyond, an expert's pairs are placed by so many programs."""
_COUNTS_BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aligned:
    """Tiles of `block` slots; the tiles of an expert are adjacent, in the order of experts.

    Only the shapes are known to the host: they fit the worst case.
    """

    block: int
    max_tiles: int
    sorted_pairs: Tensor
    """[max_tiles * block] int32: the pair in each slot, in rising order within an expert; P in
    the slots that fill up a tile; anything in tiles beyond the last."""
    slots: Tensor
    """[P] int32: where each pair is; -1 for a pair without a local expert."""
    tile_experts: Tensor
    """[max_tiles] int32: -1 for the tiles beyond the last."""
    ends: Tensor
    """[E] int32: one past the last tile of each expert."""


def align(topk_ids: Tensor, num_experts: int, block: int) -> Aligned:
    """Sorts pairs without synchronising. topk_ids: [T, K] int32 or int64, contiguous, -1: absent.

    `block`: a power of two. One launch, or two for many pairs; no atomics: always the same order.
    """
    pairs, device = topk_ids.numel(), topk_ids.device
    # Each of the most experts that can be active holds a pair; the others fill whole tiles.
    active = min(pairs, num_experts)
    max_tiles = active + (pairs - active) // block
    aligned = Aligned(
        block=block,
        max_tiles=max_tiles,
        sorted_pairs=torch.empty(max_tiles * block, dtype=torch.int32, device=device),
        slots=torch.empty(pairs, dtype=torch.int32, device=device),
        tile_experts=torch.empty(max_tiles, dtype=torch.int32, device=device),
        ends=torch.empty(num_experts, dtype=torch.int32, device=device),
    )
    counted = pairs > _ONE_LAUNCH
    chunk = _CHUNK if counted else min(1024, max(128, triton.next_power_of_2(pairs)))
    chunks = triton.cdiv(pairs, chunk)
    bins = triton.next_power_of_2(max(num_experts, 2))
    counts = topk_ids
    if counted:
        counts = torch.empty((chunks, bins), dtype=torch.int32, device=device)
        _count[(chunks,)](
            topk_ids, counts, pairs, BINS=bins, CHUNK=chunk, num_warps=8, **overlapped()
        )
    part_chunks = triton.cdiv(chunks, _PARTS) if counted else chunks
    _place[(num_experts + 1, triton.cdiv(chunks, part_chunks))](
        topk_ids,
        counts,
        aligned.sorted_pairs,
        aligned.slots,
        aligned.tile_experts,
        aligned.ends,
        pairs,
        chunks,
        part_chunks,
        max_tiles,
        EXPERTS=num_experts,
        BINS=bins,
        BLOCK=block,
        CHUNK=chunk,
        COUNTED=counted,
        COUNTS_BLOCK=_COUNTS_BLOCK,
        num_warps=8 if counted else 4,
        **overlapped(),
    )
    return aligned


@triton.jit(do_not_specialize=["pairs"])  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    ids_ptr,
    counts_ptr,
    pairs,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Pairs of each expert in a chunk: [chunks, BINS]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
    counts = tl.histogram(ids, BINS, mask=ids >= 0)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["pairs", "chunks", "part_chunks", "max_tiles"])  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    ids_ptr,
    counts_ptr,
    sorted_ptr,
    slots_ptr,
    tile_experts_ptr,
    ends_ptr,
    pairs,
    chunks,
    part_chunks,
    max_tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
    COUNTS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One expert's pairs in `part_chunks` chunks; expert EXPERTS: the absent pairs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    part = tl.program_id(1)
    bins = tl.arange(0, BINS)
    within = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    chunk = part * part_chunks
    if COUNTED:
        start = 0
        while start < chunks:
            at = start + tl.arange(0, COUNTS_BLOCK)
            found = tl.load(
                counts_ptr + at[:, None] * BINS + bins[None, :],
                mask=(at < chunks)[:, None],
                other=0,
            )
            counts += tl.sum(found, axis=0)
            earlier += tl.sum(tl.where((at < chunk)[:, None], found, 0), axis=0)
            start += COUNTS_BLOCK
    else:
        start = 0
        while start < pairs:
            at = start + within
            ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
            counts += tl.histogram(ids, BINS, mask=ids >= 0)
            start += CHUNK
    tiles = (counts + (BLOCK - 1)) // BLOCK
    mine = tl.sum(tl.where(bins == expert, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(bins < expert, tiles, 0), axis=0)
    end_tile = first_tile + (mine + (BLOCK - 1)) // BLOCK
    first_slot = first_tile * BLOCK
    before = tl.sum(tl.where(bins == expert, earlier, 0), axis=0)

    end_chunk = tl.minimum(chunk + part_chunks, chunks)
    while chunk < end_chunk:
        at = chunk * CHUNK + within
        ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
        if expert == EXPERTS:
            tl.store(slots_ptr + at, tl.full((CHUNK,), -1, tl.int32), mask=(ids < 0) & (at < pairs))
        else:
            match = (ids == expert).to(tl.int32)
            slot = first_slot + before + tl.cumsum(match, axis=0) - 1
            tl.store(sorted_ptr + slot, at, mask=match != 0)
            tl.store(slots_ptr + at, slot, mask=match != 0)
            before += tl.sum(match, axis=0)
        chunk += 1

    if part == 0:
        # An expert names its tiles, the program of the absent pairs those that nobody has.
        last = expert == EXPERTS
        end_named = tl.where(last, max_tiles, end_tile)
        name = tl.where(last, -1, expert)
        named_tile = first_tile
        while named_tile < end_named:
            tile = named_tile + tl.arange(0, 256)
            named = tl.zeros((256,), tl.int32) + name
            tl.store(tile_experts_ptr + tile, named, mask=tile < end_named)
            named_tile += 256
        if expert < EXPERTS:
            tl.store(ends_ptr + expert, end_tile)
            fill = first_slot + mine + tl.arange(0, BLOCK)
            nothing = tl.zeros((BLOCK,), tl.int32) + pairs
            tl.store(sorted_ptr + fill, nothing, mask=fill < end_tile * BLOCK)
