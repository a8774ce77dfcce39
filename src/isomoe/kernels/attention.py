"""Attention over a paged KV cache.

T: rows, padding included   R: rows of requests   d: head dim   kv: KV heads
group: query heads a KV head   L: keys, padding included

The cache is [pages, page, kv, d]: a page is one run of memory that holds whole tokens, so that a
step's new rows and a request's pages are each moved by one indexed copy of long runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# Decode requests share an SDPA call, padded to the longest. A request starts a call of its own
# size when it is under half as long and the longest has more keys than this.
_SHORTEST_SPLIT = 512


def allocate_kv_cache(
    num_pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The cache of one layer, zeros [pages, page, 2 kv, d]: a token's keys, then its values.

    Keys and values lie together, so that one gather fetches both.
    """
    shape = (num_pages, page_size, 2 * kv_heads, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decode:
    """Requests of one new row each that share an SDPA call."""

    rows: Tensor
    """[requests] int64, the row of each."""
    pages: Tensor
    """[requests * pages each] int64; short tables are filled up with their first page."""
    keys: int
    """Keys of each request, padding included, up to a whole page; exact without a mask."""
    mask: Tensor | None
    """[requests, 1, 1, L] fp32, 0 or -inf; None if no key is padding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prefill:
    """One request of several new rows."""

    begin: int
    end: int
    pages: Tensor
    """[pages] int64."""
    keys: int
    mask: Tensor | None
    """[new rows, keys] fp32, 0 or -inf; None if every key is new, where SDPA's is_causal does."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBatch:
    """One DP rank's rows in a step, request by request; built once a step, used by all layers."""

    query_lens: tuple[int, ...]
    """New rows of each request, in row order; 1 is decode."""
    context_lens: tuple[int, ...]
    """Keys visible to each request's last row: cached and new."""
    block_tables: Tensor
    """[requests, max pages] int64, page ids; entries past a request's pages are not read."""
    page_size: int
    num_rows: int = field(init=False)
    """R: rows that belong to requests; later rows are padding."""
    slots: Tensor = field(init=False)
    """[R] int64: page id * page size + offset of each new row."""
    positions: Tensor = field(init=False)
    """[R] int64: each new row's position in its request."""
    _decodes: tuple[_Decode, ...] = field(init=False)
    _prefills: tuple[_Prefill, ...] = field(init=False)

    def __post_init__(self) -> None:
        requests = len(self.query_lens)
        if len(self.context_lens) != requests or self.block_tables.shape[0] != requests:
            raise ValueError(
                f"{requests} query_lens, {len(self.context_lens)} context_lens and "
                f"{self.block_tables.shape[0]} block tables: one of each a request"
            )
        capacity = self.block_tables.shape[1] * self.page_size if requests else 0
        for query_len, context_len in zip(self.query_lens, self.context_lens, strict=True):
            if not 0 < query_len <= context_len <= capacity:
                raise ValueError(
                    f"query_len {query_len}, context_len {context_len}, room for {capacity} keys: "
                    "need 0 < query_len <= context_len <= pages * page_size"
                )
        positions, slots = _slots(
            self.query_lens, self.context_lens, self.block_tables, self.page_size
        )
        decodes, prefills = _split(
            self.query_lens, self.context_lens, self.block_tables, self.page_size
        )
        object.__setattr__(self, "num_rows", sum(self.query_lens))
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "_decodes", decodes)
        object.__setattr__(self, "_prefills", prefills)


def write_kv(k: Tensor, v: Tensor, kv_cache: Tensor, batch: AttentionBatch) -> None:
    """Writes the new rows' keys and values into their pages.

    k, v: [T or R, kv, d] in the cache's dtype; rows after R are not written.
    kv_cache: [pages, page, 2 kv, d], mutated.
    """
    rows = batch.num_rows
    if rows:
        kv_cache.flatten(0, 1).index_copy_(0, batch.slots, torch.cat((k[:rows], v[:rows]), 1))


def paged_attention(q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Causal attention of the new rows over their requests' pages, [T, heads, d] in q's dtype.

    q: [T, heads, d], T >= R; rows after R give zeros. kv_cache: [pages, page, 2 kv, d]; the new
    rows are already written. Scores and softmax are fp32 inside SDPA. A request's result does not
    depend on the other requests, but for the rounding of a padded row's longer sum.
    """
    decodes = batch._decodes
    if len(decodes) == 1 and not batch._prefills and q.shape[0] == batch.num_rows:
        return _decode(q, kv_cache, decodes[0], scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out[batch.num_rows :].zero_()
    for prefill in batch._prefills:
        rows = slice(prefill.begin, prefill.end)
        out[rows] = _prefill(q[rows], kv_cache, prefill, scale)
    for decode in decodes:
        result = _decode(q.index_select(0, decode.rows), kv_cache, decode, scale)
        out.index_copy_(0, decode.rows, result)
    return out


def _decode(q: Tensor, kv_cache: Tensor, decode: _Decode, scale: float) -> Tensor:
    """q: [requests, heads, d]. A KV head's group of query heads are the rows of one SDPA call."""
    requests, heads, head_dim = q.shape
    k, v = _gather(kv_cache, decode.pages, requests, decode.keys)
    packed = q.view(requests, k.shape[1], -1, head_dim)
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=decode.mask, scale=scale)
    return out.reshape(requests, heads, head_dim)


def _prefill(q: Tensor, kv_cache: Tensor, prefill: _Prefill, scale: float) -> Tensor:
    """q: [new rows, heads, d]."""
    k, v = _gather(kv_cache, prefill.pages, 1, prefill.keys)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=prefill.mask,
        is_causal=prefill.mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _gather(kv_cache: Tensor, pages: Tensor, requests: int, keys: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each [requests, kv, L, d], views of a copy of the requests' pages."""
    _, _, both, head_dim = kv_cache.shape
    tokens = kv_cache.index_select(0, pages).view(requests, -1, both, head_dim)
    k, v = tokens[:, :keys].transpose(1, 2).chunk(2, dim=1)
    return k, v


def _slots(
    query_lens: Sequence[int], context_lens: Sequence[int], block_tables: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """(positions, slots) of the new rows, each [R] int64."""
    requests: list[int] = []
    positions: list[int] = []
    for index, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        requests += [index] * query_len
        positions += range(context_len - query_len, context_len)
    device = block_tables.device
    position = torch.tensor(positions, dtype=torch.int64, device=device)
    if not requests:
        return position, position
    request = torch.tensor(requests, dtype=torch.int64, device=device)
    page = block_tables[request, position.div(page_size, rounding_mode="floor")]
    return position, page * page_size + position % page_size


def _split(
    query_lens: Sequence[int], context_lens: Sequence[int], block_tables: Tensor, page_size: int
) -> tuple[tuple[_Decode, ...], tuple[_Prefill, ...]]:
    """Sorts the requests into decodes of like length and prefills."""
    prefills: list[_Prefill] = []
    decodes: list[tuple[int, int, int]] = []  # keys, request, row
    row = 0
    for request, (query_len, keys) in enumerate(zip(query_lens, context_lens, strict=True)):
        if query_len == 1:
            decodes.append((keys, request, row))
        else:
            pages = block_tables[request, : -(-keys // page_size)]
            mask = None if query_len == keys else _causal_mask(query_len, keys, pages.device)
            prefills.append(
                _Prefill(begin=row, end=row + query_len, pages=pages, keys=keys, mask=mask)
            )
        row += query_len
    buckets: list[list[tuple[int, int, int]]] = []
    if decodes and max(decodes)[0] <= _SHORTEST_SPLIT:
        buckets.append(decodes)  # in row order, so that no row need be moved
    else:
        for member in sorted(decodes, reverse=True):
            longest = buckets[-1][0][0] if buckets else 0
            if not buckets or (longest > _SHORTEST_SPLIT and 2 * member[0] < longest):
                buckets.append([])
            buckets[-1].append(member)
        if len(buckets) == 1:
            buckets = [decodes]
    return tuple(_bucket(bucket, block_tables, page_size) for bucket in buckets), tuple(prefills)


def _bucket(members: list[tuple[int, int, int]], block_tables: Tensor, page_size: int) -> _Decode:
    device = block_tables.device
    lengths, requests, rows = zip(*members, strict=True)
    longest = max(lengths)
    num_pages = -(-longest // page_size)
    tables = block_tables[torch.tensor(requests, device=device), :num_pages]
    if min(lengths) == longest:
        keys, mask = longest, None
    else:
        keys = longest
        length = torch.tensor(lengths, device=device).unsqueeze(1)
        first = torch.arange(num_pages, device=device) * page_size
        tables = torch.where(first < length, tables, tables[:, :1])
        unseen = torch.arange(keys, device=device) >= length
        mask = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)
        mask = mask[:, None, None, :]
    row = torch.tensor(rows, dtype=torch.int64, device=device)
    return _Decode(rows=row, pages=tables.flatten(), keys=keys, mask=mask)


def _causal_mask(query_len: int, keys: int, device: torch.device) -> Tensor:
    mask = torch.full((query_len, keys), -torch.inf, device=device)
    return mask.triu_(keys - query_len + 1)
