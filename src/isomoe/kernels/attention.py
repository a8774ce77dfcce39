"""Attention over a paged KV cache.

T: rows, padding included   R: rows of requests   kv: KV heads   L: keys, padding included

The cache is [pages, page, token width]: a page is one run of memory that holds whole tokens, so
that a step's new rows and a request's pages are each moved by one indexed copy of long runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from isomoe.kernels.span import CAUSAL, Span

# Decode requests share an SDPA call, padded to the longest. A request starts a call of its own
# size when it is under half as long and the longest has more keys than this.
_SHORTEST_SPLIT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """One rank's heads in a layer, and how they attend.

    Attributes:
        query, kv: heads of this rank.
        qk_dim, v_dim: dims of a query or key, and of a value.
        scale: multiplies the scores.
        span: the keys that a query sees.
        latent: keys and values are one: a value is the first `v_dim` dims of its key, as in MLA.
    """

    query: int
    kv: int
    qk_dim: int
    v_dim: int
    scale: float
    span: Span = CAUSAL
    latent: bool = False

    @property
    def token_width(self) -> int:
        """Numbers that a token has in the cache."""
        return self.kv * (self.qk_dim if self.latent else self.qk_dim + self.v_dim)


def allocate_kv_cache(
    num_pages: int,
    page_size: int,
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The cache of one layer, zeros [pages, page, token width]: a token's keys, then its values.

    Keys and values lie together, so that one gather fetches both.
    """
    return torch.zeros((num_pages, page_size, heads.token_width), dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decode:
    """Requests of one new row each that share an SDPA call."""

    rows: Tensor
    """[requests] int64, the row of each."""
    pages: Tensor
    """[requests * pages each] int64; short tables are filled up with their first page."""
    keys: int
    """Keys of each request, padding included, up to a whole page; exact without a mask."""
    mask: Tensor | None
    """[requests, 1, 1, L] fp32, 0 or -inf; None if every key is seen."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """One request of several new rows."""

    begin: int
    end: int
    pages: Tensor
    """[pages] int64."""
    keys: int
    mask: Tensor | None
    """[new rows, keys] fp32, 0 or -inf; None where `causal` says it, or every key is seen."""
    causal: bool
    """Whether every key is new and a row sees those up to its own, which SDPA's is_causal does."""


Split = tuple[tuple[Decode, ...], tuple[Prefill, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBatch:
    """One DP rank's rows in a step, request by request; built once a step, used by all layers."""

    query_lens: tuple[int, ...]
    """New rows of each request, in row order; 1 is decode."""
    context_lens: tuple[int, ...]
    """Keys that each request has with its last row: cached and new."""
    block_tables: Tensor
    """[requests, max pages] int64, page ids; entries past a request's pages are not read."""
    page_size: int
    state_slots: tuple[int, ...] | None = None
    """Where each request's recurrent states lie; None if the model has none."""
    num_rows: int = field(init=False)
    """R: rows that belong to requests; later rows are padding."""
    slots: Tensor = field(init=False)
    """[R] int64: page id * page size + offset of each new row."""
    positions: Tensor = field(init=False)
    """[R] int64: each new row's position in its request."""
    _splits: dict[Span, Split] = field(init=False, default_factory=dict)

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
        object.__setattr__(self, "num_rows", sum(self.query_lens))
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "slots", slots)

    def split(self, span: Span) -> Split:
        """The requests as SDPA calls for layers of that span; made once a step."""
        if span not in self._splits:
            self._splits[span] = _split(self, span)
        return self._splits[span]


def write_kv(k: Tensor, v: Tensor | None, kv_cache: Tensor, batch: AttentionBatch) -> None:
    """Writes the new rows' keys and values into their pages.

    k: [T or R, kv, qk dim], v: [T or R, kv, v dim], in the cache's dtype; rows after R are not
    written. v is None where keys and values are one. kv_cache: [pages, page, width], mutated.
    """
    rows = batch.num_rows
    if rows:
        tokens = k[:rows].flatten(1)
        if v is not None:
            tokens = torch.cat((tokens, v[:rows].flatten(1)), 1)
        kv_cache.flatten(0, 1).index_copy_(0, batch.slots, tokens)


def paged_attention(
    q: Tensor, kv_cache: Tensor, batch: AttentionBatch, heads: Heads, sinks: Tensor | None = None
) -> Tensor:
    """Attention of the new rows over their requests' pages, [T, heads, v dim] in q's dtype.

    q: [T, heads, qk dim], T >= R; rows after R give zeros. kv_cache: [pages, page, width]; the new
    rows are already written. sinks: [heads] fp32, a score of each head that takes part in the
    softmax and has no value (gpt-oss). Scores and softmax are fp32 inside SDPA. A request's result
    does not depend on the other requests, but for the rounding of a padded row's longer sum.
    """
    decodes, prefills = batch.split(heads.span)
    if len(decodes) == 1 and not prefills and q.shape[0] == batch.num_rows:
        return decode_attention(q, kv_cache, decodes[0], heads, sinks)
    out = q.new_empty((*q.shape[:2], heads.v_dim))
    out[batch.num_rows :].zero_()
    for prefill in prefills:
        rows = slice(prefill.begin, prefill.end)
        k, v = gather(kv_cache, prefill.pages, 1, prefill.keys, heads)
        out[rows] = prefill_attention(q[rows], k, v, prefill, heads, sinks)
    for decode in decodes:
        result = decode_attention(q.index_select(0, decode.rows), kv_cache, decode, heads, sinks)
        out.index_copy_(0, decode.rows, result)
    return out


def decode_attention(
    q: Tensor, kv_cache: Tensor, decode: Decode, heads: Heads, sinks: Tensor | None = None
) -> Tensor:
    """q: [requests, heads, qk dim]. A KV head's query heads are the rows of one SDPA call."""
    requests, num_heads, qk_dim = q.shape
    k, v = gather(kv_cache, decode.pages, requests, decode.keys, heads)
    packed = q.view(requests, heads.kv, -1, qk_dim)
    mask = decode.mask
    if sinks is not None:
        k, v, mask = _with_sinks(k, v, mask, sinks.view(1, heads.kv, -1, 1))
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=heads.scale)
    return out.reshape(requests, num_heads, heads.v_dim)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefill: Prefill,
    heads: Heads,
    sinks: Tensor | None = None,
) -> Tensor:
    """q: [new rows, heads, qk dim]; k, v: [1, kv, keys, dim]."""
    mask = prefill.mask
    if sinks is not None:
        if prefill.causal:
            mask = _seen(range(len(q)), prefill.keys, 0, heads.span, q.device)
        k, v, mask = _with_sinks(k, v, mask, sinks.view(1, -1, 1, 1))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=mask,
        is_causal=prefill.causal and mask is None,
        scale=heads.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def gather(
    kv_cache: Tensor, pages: Tensor, requests: int, keys: int, heads: Heads
) -> tuple[Tensor, Tensor]:
    """Keys and values, each [requests, kv, L, dim], views of a copy of the requests' pages."""
    tokens = kv_cache.index_select(0, pages).view(requests, -1, heads.token_width)[:, :keys]
    width = heads.kv * heads.qk_dim
    k = split_heads(tokens[..., :width], heads.kv).transpose(1, 2)
    if heads.latent:
        return k, k[..., : heads.v_dim]
    v = split_heads(tokens[..., width:], heads.kv).transpose(1, 2)
    return k, v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., heads * d] -> [..., heads, d], a view."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def _with_sinks(
    k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One more key for SDPA: its product is 0 and its mask the sink; its value is 0.

    sinks: broadcasts over [requests, heads, rows, 1].
    """
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    seen = sinks.new_zeros(1, 1, 1, k.shape[2] - 1) if mask is None else mask
    seen = seen + torch.zeros_like(sinks)
    return k, v, torch.cat((seen, sinks.expand(*seen.shape[:-1], 1)), -1)


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


@dataclass(frozen=True, slots=True)
class _OneRow:
    """A request that decodes: it sees the keys `start` to `keys`, on pages from `first_page`."""

    keys: int
    start: int
    request: int
    row: int
    page_size: int

    @property
    def first_page(self) -> int:
        return self.start // self.page_size

    @property
    def length(self) -> int:
        """Keys that are gathered."""
        return self.keys - self.first_page * self.page_size


def _split(batch: AttentionBatch, span: Span) -> Split:
    """Sorts the requests into decodes of like length and prefills."""
    prefills: list[Prefill] = []
    decodes: list[_OneRow] = []
    row, page_size = 0, batch.page_size
    for request, (new, keys) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        start = span.start(keys - new)
        if new == 1:
            decodes.append(_OneRow(keys, start, request, row, page_size))
        else:
            first_page = start // page_size
            base = first_page * page_size
            pages = batch.block_tables[request, first_page : -(-keys // page_size)]
            causal = new == keys and span.block is None and span.start(keys - 1) == 0
            mask = None
            if not causal:
                mask = _seen(range(keys - new, keys), keys, base, span, pages.device)
            prefills.append(
                Prefill(
                    begin=row,
                    end=row + new,
                    pages=pages,
                    keys=keys - base,
                    mask=mask,
                    causal=causal,
                )
            )
        row += new
    buckets = [_bucket(bucket, batch.block_tables, page_size) for bucket in _alike(decodes)]
    return tuple(buckets), tuple(prefills)


def _alike(decodes: list[_OneRow]) -> list[list[_OneRow]]:
    """The decodes in groups of like length."""
    if not decodes:
        return []
    if max(one.length for one in decodes) <= _SHORTEST_SPLIT:
        return [decodes]  # in row order, so that no row need be moved
    buckets: list[list[_OneRow]] = []
    for one in sorted(decodes, key=lambda one: -one.length):
        longest = buckets[-1][0].length if buckets else 0
        if not buckets or (longest > _SHORTEST_SPLIT and 2 * one.length < longest):
            buckets.append([])
        buckets[-1].append(one)
    return [decodes] if len(buckets) == 1 else buckets


def _bucket(members: list[_OneRow], block_tables: Tensor, page_size: int) -> Decode:
    device = block_tables.device
    longest = max(one.length for one in members)
    num_pages = -(-longest // page_size)
    chosen = torch.tensor([one.request for one in members], device=device)
    mask = None
    if all(one.start == 0 and one.keys == longest for one in members):
        tables = block_tables[chosen, :num_pages]
    else:
        first = torch.tensor([one.first_page for one in members], device=device).unsqueeze(1)
        length = torch.tensor([one.length for one in members], device=device).unsqueeze(1)
        hidden = torch.tensor([one.start for one in members], device=device).unsqueeze(1)
        page = torch.arange(num_pages, device=device)
        page = torch.where(page * page_size < length, page, 0)
        tables = block_tables[chosen.unsqueeze(1), first + page]
        key = torch.arange(longest, device=device)
        unseen = (key >= length) | (key < hidden - first * page_size)
        if bool(unseen.any()):
            mask = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)
            mask = mask[:, None, None, :]
    row = torch.tensor([one.row for one in members], dtype=torch.int64, device=device)
    return Decode(rows=row, pages=tables.flatten(), keys=longest, mask=mask)


def _seen(
    positions: range, keys: int, base: int, span: Span, device: torch.device
) -> Tensor | None:
    """[rows, keys from `base` on] fp32: 0 where the row at a position sees a key, else -inf; None
    if all are seen."""
    starts = torch.tensor([span.start(p) for p in positions], device=device).unsqueeze(1)
    stops = torch.tensor([span.stop(p, keys) for p in positions], device=device).unsqueeze(1)
    key = torch.arange(base, keys, device=device)
    unseen = (key < starts) | (key >= stops)
    if not bool(unseen.any()):
        return None
    return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)
