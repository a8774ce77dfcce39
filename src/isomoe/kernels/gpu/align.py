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
"""Up to so many pairs each program counts all experts' pairs itself, which saves launches."""
_MATRIX = 16384
"""Elements of the matrix (pairs of a chunk) x experts that a program of `_place_chunk` holds."""


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

    `block`: a power of two. One launch, or three for many pairs; no atomics: always the same
    order.
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
    bins = triton.next_power_of_2(max(num_experts, 2))
    if pairs > _ONE_LAUNCH:
        _place_many(topk_ids, aligned, num_experts, bins)
        return aligned
    _place[(num_experts + 1,)](
        topk_ids,
        aligned.sorted_pairs,
        aligned.slots,
        aligned.tile_experts,
        aligned.ends,
        pairs,
        max_tiles,
        EXPERTS=num_experts,
        BINS=bins,
        BLOCK=block,
        CHUNK=min(1024, max(128, triton.next_power_of_2(pairs))),
        num_warps=4,
        **overlapped(),
    )
    return aligned


def _place_many(topk_ids: Tensor, aligned: Aligned, num_experts: int, bins: int) -> None:
    """Chunks count their experts, experts add up the chunks before each, chunks place."""
    pairs, device = topk_ids.numel(), topk_ids.device
    chunk = max(16, _MATRIX // bins)
    chunks = triton.cdiv(pairs, chunk)
    counts = torch.empty((bins, chunks), dtype=torch.int32, device=device)
    totals = torch.empty(bins, dtype=torch.int32, device=device)
    launch = overlapped()
    _count[(chunks,)](topk_ids, counts, pairs, chunks, BINS=bins, CHUNK=chunk, **launch)
    _add_up[(bins,)](counts, totals, chunks, STEP=1024, **launch)
    _place_chunk[(max(chunks, num_experts + 1),)](
        topk_ids,
        counts,
        totals,
        aligned.sorted_pairs,
        aligned.slots,
        aligned.tile_experts,
        aligned.ends,
        pairs,
        chunks,
        aligned.max_tiles,
        EXPERTS=num_experts,
        BINS=bins,
        BLOCK=aligned.block,
        CHUNK=chunk,
        num_warps=8,
        **launch,
    )


@triton.jit(do_not_specialize=["pairs", "chunks"])  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    ids_ptr,
    counts_ptr,
    pairs,
    chunks,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts [BINS, chunks]: pairs of each expert in each chunk."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
    counts = tl.histogram(ids, BINS, mask=ids >= 0)
    tl.store(counts_ptr + tl.arange(0, BINS) * chunks + chunk, counts)


@triton.jit(do_not_specialize=["chunks"])  # type: ignore[untyped-decorator]
def _add_up(  # type: ignore[no-untyped-def]
    counts_ptr, totals_ptr, chunks, STEP: tl.constexpr, PDL: tl.constexpr
):
    """One expert: its counts become those of all chunks before; and their total."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    start = 0
    while start < chunks:
        at = start + tl.arange(0, STEP)
        place = counts_ptr + expert * chunks + at
        found = tl.load(place, mask=at < chunks, other=0)
        tl.store(place, total + tl.cumsum(found, axis=0) - found, mask=at < chunks)
        total += tl.sum(found, axis=0)
        start += STEP
    tl.store(totals_ptr + expert, total)


@triton.jit(do_not_specialize=["pairs", "chunks", "max_tiles"])  # type: ignore[untyped-decorator]
def _place_chunk(  # type: ignore[no-untyped-def]
    ids_ptr,
    earlier_ptr,
    totals_ptr,
    sorted_ptr,
    slots_ptr,
    tile_experts_ptr,
    ends_ptr,
    pairs,
    chunks,
    max_tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A chunk's pairs: each after those of its expert in earlier chunks, and earlier in this."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    tiles = (totals + (BLOCK - 1)) // BLOCK
    if program < chunks:
        first_slots = (tl.cumsum(tiles, axis=0) - tiles) * BLOCK
        first_slots += tl.load(earlier_ptr + bins * chunks + program)
        at = program * CHUNK + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
        # The column of a pair's expert: how many of the chunk's pairs up to it are the expert's.
        match = (ids[:, None] == bins[None, :]).to(tl.int32)
        slot = tl.sum(match * (tl.cumsum(match, axis=0) - 1 + first_slots[None, :]), axis=1)
        here = ids >= 0
        tl.store(sorted_ptr + slot, at, mask=here)
        tl.store(slots_ptr + at, tl.where(here, slot, -1), mask=at < pairs)
    if program <= EXPERTS:
        mine = tl.sum(tl.where(bins == program, totals, 0), axis=0)
        first_tile = tl.sum(tl.where(bins < program, tiles, 0), axis=0)
        _name_tiles(
            tile_experts_ptr,
            ends_ptr,
            sorted_ptr,
            program,
            mine,
            first_tile,
            pairs,
            max_tiles,
            EXPERTS,
            BLOCK,
        )


@triton.jit(do_not_specialize=["pairs", "max_tiles"])  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    ids_ptr,
    sorted_ptr,
    slots_ptr,
    tile_experts_ptr,
    ends_ptr,
    pairs,
    max_tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One expert's pairs; expert EXPERTS: the absent pairs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    within = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    start = 0
    while start < pairs:
        at = start + within
        ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
        counts += tl.histogram(ids, BINS, mask=ids >= 0)
        start += CHUNK
    tiles = (counts + (BLOCK - 1)) // BLOCK
    mine = tl.sum(tl.where(bins == expert, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(bins < expert, tiles, 0), axis=0)
    slots = first_tile * BLOCK
    start = 0
    while start < pairs:
        at = start + within
        ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1).to(tl.int32)
        if expert == EXPERTS:
            tl.store(slots_ptr + at, tl.full((CHUNK,), -1, tl.int32), mask=(ids < 0) & (at < pairs))
        else:
            match = (ids == expert).to(tl.int32)
            slot = slots + tl.cumsum(match, axis=0) - 1
            tl.store(sorted_ptr + slot, at, mask=match != 0)
            tl.store(slots_ptr + at, slot, mask=match != 0)
            slots += tl.sum(match, axis=0)
        start += CHUNK
    _name_tiles(
        tile_experts_ptr,
        ends_ptr,
        sorted_ptr,
        expert,
        mine,
        first_tile,
        pairs,
        max_tiles,
        EXPERTS,
        BLOCK,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _name_tiles(  # type: ignore[no-untyped-def]
    tile_experts_ptr,
    ends_ptr,
    sorted_ptr,
    expert,
    mine,
    first_tile,
    pairs,
    max_tiles,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An expert names its tiles and fills up its last; EXPERTS names those that nobody has."""
    end_tile = first_tile + (mine + (BLOCK - 1)) // BLOCK
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
        fill = first_tile * BLOCK + mine + tl.arange(0, BLOCK)
        nothing = tl.zeros((BLOCK,), tl.int32) + pairs
        tl.store(sorted_ptr + fill, nothing, mask=fill < end_tile * BLOCK)
