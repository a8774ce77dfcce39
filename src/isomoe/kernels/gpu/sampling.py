"""From logits to token ids and log-probabilities.

T: rows   V: vocabulary   C: chunks of a row, a program each

A row's chunks are met by many programs; the last to arrive merges what all have found, in an
order that does not depend on who it is. Nothing is sorted, and a draw's masses are integers,
whose sums are exact in any order, so equal inputs give equal ids.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.linear import counters

GREEDY = "greedy"
CHOSEN = "chosen_logprobs"
DRAW = "draw"

_BINS = 256
"""Of a row's histogram of logits, each _BIN wide, from _LOWEST on; the outer two take the rest."""
_FEW, _MANY = 256, 4096
"""Candidates that a draw weighs in registers: in one of two sizes."""

_NOTHING = tl.constexpr(-(1 << 63))
_LOWEST = tl.constexpr(-40.0)
_BIN = tl.constexpr(0.5)
_COLDEST = tl.constexpr(1e-5)  # colder is greedy, as in the plain twin


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, the lowest id among ties. logits: [T, V].

    Returns ids [T] int64, and [T] bool: whether the row's maximum is finite and it has no NaN.
    """
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows == 0:
        return ids, finite
    logits = _dense(logits)
    config = find(GREEDY, (vocab,), rows, _default(rows, vocab))
    chunks = triton.cdiv(vocab, config["BLOCK"])
    best = torch.empty((rows, chunks), dtype=torch.int64, device=logits.device)
    _greedy[(rows, chunks)](
        logits,
        best,
        _arrivals(rows, logits.device),
        ids,
        finite,
        logits.stride(0),
        V=vocab,
        CHUNKS=chunks,
        BLOCK_C=triton.next_power_of_2(chunks),
        **config,
    )
    return ids, finite


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log_softmax in fp32 at one token a row, [T] fp32. logits: [T, V]; ids: [T] int64."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return out
    logits = _dense(logits)
    config = find(CHOSEN, (vocab,), rows, _default(rows, vocab))
    chunks = triton.cdiv(vocab, config["BLOCK"])
    partial = torch.empty((2, rows, chunks), dtype=torch.float32, device=logits.device)
    _chosen[(rows, chunks)](
        logits,
        ids,
        partial,
        _arrivals(rows, logits.device),
        out,
        logits.stride(0),
        ids.stride(0),
        rows,
        V=vocab,
        CHUNKS=chunks,
        BLOCK_C=triton.next_power_of_2(chunks),
        **config,
    )
    return out


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    number: Tensor,
) -> Tensor:
    """One token id a row, [T] int64, as `kernels.sampling.sample` draws it. logits: [T, V].

    All others are [T]. temperature, top_p, min_p: fp32; top_k: int32, below 1 or from V on off;
    number: fp64 or fp32 in [0, 1), at which the running sum of the kept tokens' probabilities,
    in the order of their ids, is inverted. Below a temperature of 1e-5 a row is greedy.

    Where more than 4,096 tokens may be kept by top-k or top-p, one program a row goes over the
    row several times: right, but slower.
    """
    rows, vocab = logits.shape
    device = logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return ids
    logits = _dense(logits)
    parameters = [one.contiguous() for one in (temperature, top_k, top_p, min_p, number)]
    config = find(DRAW, (vocab,), rows, _default(rows, vocab))
    chunks = triton.cdiv(vocab, config["BLOCK"])
    best = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    masses = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    counts = torch.zeros((rows, _BINS), dtype=torch.int32, device=device)
    found = torch.empty((rows, 2, _MANY), dtype=torch.int32, device=device)
    # How many were found, and the bin below which none was sought.
    state = torch.zeros((rows, 2), dtype=torch.int32, device=device)
    shared = {
        "V": vocab,
        "CHUNKS": chunks,
        "BLOCK_C": triton.next_power_of_2(chunks),
        "BINS": _BINS,
        # The most likely token's mass; the sum of V such stays below 2^62.
        "ONE": 1 << (62 - vocab.bit_length()),
        "MANY": _MANY,
        **config,
    }
    _survey[(rows, chunks)](logits, *parameters, best, counts, logits.stride(0), **shared)
    _gather[(rows, chunks)](
        logits, *parameters, best, counts, masses, found, state, logits.stride(0), **shared
    )
    shared["num_warps"] = 8
    _choose[(rows,)](
        logits,
        *parameters,
        best,
        masses,
        found,
        state,
        ids,
        logits.stride(0),
        NARROW=logits.dtype == torch.bfloat16,
        FEW=_FEW,
        **shared,
    )
    return ids


def _dense(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _arrivals(rows: int, device: torch.device) -> Tensor:
    return counters(device, max(4096, triton.next_power_of_2(rows)))


def _default(rows: int, vocab: int) -> Config:
    block = 2048 if rows <= 8 else 4096
    block = min(block, max(64, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def candidates(rows: int, vocab: int) -> Iterator[Config]:
    """For the tuner, of all three."""
    for block in (1024, 2048, 4096, 8192):
        for warps in (2, 4, 8, 16):
            if block < 2 * vocab and 4 <= block // (32 * warps) <= 32:
                yield {"BLOCK": block, "num_warps": warps}


@triton.jit
def _ordered(values):  # type: ignore[no-untyped-def]
    """int32 in the order of fp32 values; zeros are equal, NaN is the largest."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(ordered):  # type: ignore[no-untyped-def]
    """Undoes `_ordered`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_best(ordered, ids):  # type: ignore[no-untyped-def]
    """One int64 for the best token, the lowest of equals: the larger is the better."""
    best = tl.max(ordered, axis=0)
    first = tl.min(tl.where(ordered == best, ids, 0x7FFFFFFF), axis=0)
    return (best.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _best_of_chunks(best_ptr, row, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `_first_best` gave for the whole row: its value as int32 in order, and its id."""
    chunk = tl.arange(0, BLOCK_C)
    each = tl.load(
        best_ptr + row * CHUNKS + chunk,
        mask=chunk < CHUNKS,
        other=_NOTHING,
        cache_modifier=".cg",
    )
    best = tl.max(each, axis=0)
    return (best >> 32).to(tl.int32), 0x7FFFFFFF - (best & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _greedy(  # type: ignore[no-untyped-def]
    logits_ptr,
    best_ptr,
    arrived_ptr,
    ids_ptr,
    finite_ptr,
    stride,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + token, mask=token < V, other=float("-inf"))
    best = _first_best(_ordered(logits.to(tl.float32)), token)
    tl.store(best_ptr + row * CHUNKS + chunk, best)
    # The store must be out before the program is counted.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu")
    if before == CHUNKS - 1:
        ordered, token_id = _best_of_chunks(best_ptr, row, CHUNKS, BLOCK_C)
        tl.store(ids_ptr + row, token_id)
        tl.store(finite_ptr + row, tl.abs(_value(ordered)) < float("inf"))
        tl.store(arrived_ptr + row, 0)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _chosen(  # type: ignore[no-untyped-def]
    logits_ptr,
    ids_ptr,
    partial_ptr,
    arrived_ptr,
    out_ptr,
    stride,
    ids_stride,
    rows,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * stride
    logits = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    top = tl.max(logits, axis=0)
    # A chunk of -inf alone adds nothing; NaN stays, in the sum.
    total = tl.sum(tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)), axis=0)
    tops_ptr = partial_ptr + row * CHUNKS
    totals_ptr = tops_ptr + rows.to(tl.int64) * CHUNKS
    tl.store(tops_ptr + chunk, top)
    tl.store(totals_ptr + chunk, total)
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu")
    if before == CHUNKS - 1:
        each = tl.arange(0, BLOCK_C)
        inside = each < CHUNKS
        tops = tl.load(tops_ptr + each, mask=inside, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(totals_ptr + each, mask=inside, other=0.0, cache_modifier=".cg")
        top = tl.max(tops, axis=0)
        total = tl.sum(totals * tl.exp(tops - top), axis=0)
        token_id = tl.load(ids_ptr + row * ids_stride)
        logit = tl.load(row_ptr + token_id).to(tl.float32)
        tl.store(out_ptr + row, logit - top - tl.log(total))
        tl.store(arrived_ptr + row, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _bin(logits, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the histogram; never falls where the logit rises."""
    place = tl.floor((logits - _LOWEST) * (1.0 / _BIN))
    # NaN, which has no place, takes the first.
    return tl.minimum(tl.where(place > 0.0, place, 0.0), BINS - 1.0).to(tl.int32)


@triton.jit
def _share(logits, top, temperature):  # type: ignore[no-untyped-def]
    """Probability as a share of the most likely token's, fp32; 0 for what is no number."""
    share = tl.exp((logits - top) / temperature)
    return tl.where(share > 0.0, share, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _mass(share, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    return (share * ONE).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _survey(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    number_ptr,
    best_ptr,
    counts_ptr,
    stride,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BINS: tl.constexpr,
    ONE: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each chunk's best token, and the row's histogram if a filter needs one."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    logits = tl.load(logits_ptr + row * stride + token, mask=inside, other=float("-inf"))
    logits = logits.to(tl.float32)
    tl.store(best_ptr + row * CHUNKS + chunk, _first_best(_ordered(logits), token))
    top_k = tl.load(top_k_ptr + row)
    warm = tl.load(temperature_ptr + row) >= _COLDEST
    if warm & (((top_k > 0) & (top_k < V)) | (tl.load(top_p_ptr + row) < 1.0)):
        counts = tl.histogram(_bin(logits, BINS), BINS, mask=inside)
        place = counts_ptr + row * BINS + tl.arange(0, BINS)
        tl.atomic_add(place, counts, mask=counts > 0, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _first_bin(counts, top, temperature, top_k, top_p, min_p, V: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A bin such that no filter keeps a token of a lower one, found from the counts alone."""
    place = tl.arange(0, BINS)
    below = tl.cumsum(counts, axis=0) - counts
    first = 0
    if (top_k > 0) & (top_k < V):
        # The k best lie in the bins that hold at least k together.
        first = tl.max(tl.where(V - below >= top_k, place, 0), axis=0)
    elif top_p < 1.0:
        lower = place * _BIN + _LOWEST
        upper = tl.where(place == BINS - 1, top, tl.minimum(lower + _BIN, top))
        least = tl.where(place == 0, 0.0, _share(tl.minimum(lower, top), top, temperature))
        least = tl.where(least >= min_p, least, 0.0) * counts
        most = _share(upper, top, temperature) * counts
        # Tokens that hold less than 1 - top_p together are none of the nucleus. The factor
        # covers the roundings.
        spare = 0.999 * (1.0 - top_p) * tl.maximum(tl.sum(least, axis=0), 1.0)
        tail = tl.cumsum(most, axis=0) - most
        first = tl.max(tl.where(tail <= spare, place, 0), axis=0)
    return first


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    number_ptr,
    best_ptr,
    counts_ptr,
    masses_ptr,
    found_ptr,
    state_ptr,
    stride,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BINS: tl.constexpr,
    ONE: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each chunk's mass after min-p; and the tokens that top-k or top-p may keep, in any order."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature >= _COLDEST:
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        logits = tl.load(logits_ptr + row * stride + token, mask=inside, other=float("-inf"))
        logits = logits.to(tl.float32)
        best, _ = _best_of_chunks(best_ptr, row, CHUNKS, BLOCK_C)
        top = _value(best)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        share = _share(logits, top, temperature)
        alive = inside & (share >= min_p)
        mass = tl.sum(tl.where(alive, _mass(share, ONE), 0), axis=0)
        tl.store(masses_ptr + row * CHUNKS + chunk, mass)
        if ((top_k > 0) & (top_k < V)) | (top_p < 1.0):
            counts = tl.load(counts_ptr + row * BINS + tl.arange(0, BINS))
            first = _first_bin(counts, top, temperature, top_k, top_p, min_p, V, BINS)
            wanted = alive & (_bin(logits, BINS) >= first)
            number = tl.sum(wanted.to(tl.int32), axis=0)
            if chunk == 0:
                tl.store(state_ptr + row * 2 + 1, first)
            if number > 0:
                start = tl.atomic_add(state_ptr + row * 2, number, sem="relaxed")
                place = start + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
                kept = wanted & (place < MANY)
                row_ptr = found_ptr + row * (2 * MANY)
                tl.store(row_ptr + place, _ordered(logits), mask=kept)
                tl.store(row_ptr + MANY + place, token, mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    number_ptr,
    best_ptr,
    masses_ptr,
    found_ptr,
    state_ptr,
    ids_ptr,
    stride,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BINS: tl.constexpr,
    ONE: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    FEW: tl.constexpr,
):
    """One program a row: the filters' thresholds, then the token."""
    row = tl.program_id(0).to(tl.int64)
    best, chosen = _best_of_chunks(best_ptr, row, CHUNKS, BLOCK_C)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature >= _COLDEST:
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        number = tl.load(number_ptr + row).to(tl.float64)
        chunk = tl.arange(0, BLOCK_C)
        masses = tl.load(masses_ptr + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0)
        count = tl.load(state_ptr + row * 2)
        first = tl.load(state_ptr + row * 2 + 1)
        limited = (top_k > 0) & (top_k < V)
        if (limited | (top_p < 1.0)) & (count <= MANY):
            if count <= FEW:
                chosen = _from_found(
                    found_ptr + row * (2 * MANY), count, best, temperature, limited, top_k,
                    top_p, number, tl.sum(masses, axis=0), V, ONE, MANY, NARROW, FEW,
                )  # fmt: skip
            else:
                chosen = _from_found(
                    found_ptr + row * (2 * MANY), count, best, temperature, limited, top_k,
                    top_p, number, tl.sum(masses, axis=0), V, ONE, MANY, NARROW, MANY,
                )  # fmt: skip
        else:
            chosen = _from_all(
                logits_ptr + row * stride, masses, best, first, temperature, limited, top_k,
                top_p, min_p, number, V, CHUNKS, BLOCK_C, ONE, NARROW, BLOCK,
            )  # fmt: skip
    tl.store(ids_ptr + row, chosen)


@triton.jit  # type: ignore[untyped-decorator]
def _search_key(ordered, NARROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of bf16 values only the upper half of the bits differs: half as many steps."""
    if NARROW:
        ordered = ordered >> 16
    return ordered


@triton.jit
def _goal(top_p, total):  # type: ignore[no-untyped-def]
    """The least mass that a nucleus holds."""
    return tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _target(number, total):  # type: ignore[no-untyped-def]
    """The drawn token is the first whose running sum is above this."""
    return tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _reach(keys, values, goal, low, high):  # type: ignore[no-untyped-def]
    """The largest key at or above which values sum to goal; low if none. int64; below high."""
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        enough = tl.sum(tl.where(keys >= middle.to(tl.int32), values, 0), axis=0) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _from_found(  # type: ignore[no-untyped-def]
    found_ptr, count, best, temperature, limited, top_k, top_p, number, total,
    V: tl.constexpr, ONE: tl.constexpr, MANY: tl.constexpr, NARROW: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The drawn token, from at most SIZE candidates in registers. total: of all tokens."""
    place = tl.arange(0, SIZE)
    inside = place < count
    ordered = tl.load(found_ptr + place, mask=inside, other=best)
    tokens = tl.load(found_ptr + MANY + place, mask=inside, other=V)
    keys = _search_key(ordered, NARROW)
    mass = _mass(_share(_value(ordered), _value(best), temperature), ONE)
    mass = tl.where(inside, mass, 0)
    low = tl.min(keys, axis=0).to(tl.int64)
    high = _search_key(best, NARROW).to(tl.int64) + 1
    if limited:
        low = _reach(keys, inside.to(tl.int32), top_k, low, high)
        mass = tl.where(keys >= low.to(tl.int32), mass, 0)
        total = tl.sum(mass, axis=0)
    if top_p < 1.0:
        low = _reach(keys, mass, _goal(top_p, total), low, high)
        mass = tl.where(keys >= low.to(tl.int32), mass, 0)
    target = _target(number, tl.sum(mass, axis=0))
    # The first token up to which the mass is above the target.
    before = -1
    token = V - 1
    while token - before > 1:
        middle = before + ((token - before) >> 1)
        enough = tl.sum(tl.where(tokens <= middle, mass, 0), axis=0) > target
        token = tl.where(enough, middle, token)
        before = tl.where(enough, before, middle)
    return token.to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _reach_in_row(  # type: ignore[no-untyped-def]
    row_ptr, top, temperature, min_p, goal, low, high,
    V: tl.constexpr, ONE: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """`_reach` over a whole row, of counts or masses: a quarter of the range is left each time."""
    while high - low > 1:
        width = high - low
        half = low + (width >> 1)
        quarter = low + (width >> 2)
        three = half + ((width + 1) >> 2)
        above_quarter = tl.zeros((BLOCK,), tl.int64)
        above_half = tl.zeros((BLOCK,), tl.int64)
        above_three = tl.zeros((BLOCK,), tl.int64)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            token = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + token, mask=token < V, other=float("-inf"))
            logits = logits.to(tl.float32)
            keys = _search_key(_ordered(logits), NARROW).to(tl.int64)
            share = _share(logits, top, temperature)
            alive = (token < V) & (share >= min_p)
            value = tl.where(alive, 1 if COUNT else _mass(share, ONE), 0).to(tl.int64)
            above_quarter += tl.where(keys >= quarter, value, 0)
            above_half += tl.where(keys >= half, value, 0)
            above_three += tl.where(keys >= three, value, 0)
        # A candidate may be low itself, known to be enough, or high, known not to be.
        fits_quarter = (quarter <= low) | (tl.sum(above_quarter, axis=0) >= goal)
        fits_half = tl.sum(above_half, axis=0) >= goal
        fits_three = (three < high) & (tl.sum(above_three, axis=0) >= goal)
        new_low = tl.where(fits_three, three, tl.where(fits_half, half, quarter))
        new_high = tl.where(fits_half, tl.where(fits_three, high, three), half)
        low = tl.where(fits_quarter, new_low, low)
        high = tl.where(fits_quarter, new_high, quarter)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _kept(  # type: ignore[no-untyped-def]
    row_ptr, start, top, temperature, min_p, low,
    V: tl.constexpr, ONE: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The masses of a chunk's tokens that min-p keeps and whose key is at least low."""
    token = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    keys = _search_key(_ordered(logits), NARROW).to(tl.int64)
    share = _share(logits, top, temperature)
    kept = (token < V) & (share >= min_p) & (keys >= low)
    return tl.where(kept, _mass(share, ONE), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _kept_by_chunk(  # type: ignore[no-untyped-def]
    row_ptr, top, temperature, min_p, low,
    V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, ONE: tl.constexpr,
    NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.arange(0, BLOCK_C)
    masses = tl.zeros((BLOCK_C,), tl.int64)
    for index in tl.range(0, CHUNKS, num_stages=3):
        mass = _kept(row_ptr, index * BLOCK, top, temperature, min_p, low, V, ONE, NARROW, BLOCK)
        masses = tl.where(chunk == index, tl.sum(mass, axis=0), masses)
    return masses


@triton.jit  # type: ignore[untyped-decorator]
def _from_all(  # type: ignore[no-untyped-def]
    row_ptr, masses, best, first, temperature, limited, top_k, top_p, min_p, number,
    V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, ONE: tl.constexpr,
    NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The drawn token, from the row's logits. masses [BLOCK_C]: of each chunk, after min-p."""
    top = _value(best)
    low = tl.full((), -0x80000000, tl.int64)
    if limited | (top_p < 1.0):
        # Below the bin from which on tokens may be kept, with room for roundings.
        floor = _ordered((first - 1) * _BIN + _LOWEST)
        low = tl.where(first > 0, _search_key(floor, NARROW).to(tl.int64), low)
        high = _search_key(best, NARROW).to(tl.int64) + 1
        if limited:
            low = _reach_in_row(
                row_ptr, top, temperature, min_p, top_k, low, high, V, ONE, NARROW, BLOCK, True
            )
            masses = _kept_by_chunk(
                row_ptr, top, temperature, min_p, low, V, CHUNKS, BLOCK_C, ONE, NARROW, BLOCK
            )
        if top_p < 1.0:
            goal = _goal(top_p, tl.sum(masses, axis=0))
            low = _reach_in_row(
                row_ptr, top, temperature, min_p, goal, low, high, V, ONE, NARROW, BLOCK, False
            )
            masses = _kept_by_chunk(
                row_ptr, top, temperature, min_p, low, V, CHUNKS, BLOCK_C, ONE, NARROW, BLOCK
            )
    target = _target(number, tl.sum(masses, axis=0))
    running = tl.cumsum(masses, axis=0)
    # The chunk whose running sum is the first above the target.
    behind = tl.arange(0, BLOCK_C) < CHUNKS
    index = tl.sum((behind & (running <= target)).to(tl.int32), axis=0)
    index = tl.minimum(index, CHUNKS - 1)
    target -= tl.sum(tl.where(tl.arange(0, BLOCK_C) < index, masses, 0), axis=0)
    mass = _kept(row_ptr, index * BLOCK, top, temperature, min_p, low, V, ONE, NARROW, BLOCK)
    place = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0)
    return tl.minimum(index * BLOCK + place, V - 1).to(tl.int64)
