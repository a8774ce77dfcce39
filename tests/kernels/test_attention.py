"""Paged attention against a float64 loop over rows, heads and keys."""

import pytest
import torch
from torch import Tensor

from isomoe.kernels import (
    CAUSAL,
    AttentionBatch,
    Heads,
    Span,
    allocate_kv_cache,
    paged_attention,
    write_kv,
)

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5


class Case:
    """Requests with random KV, scattered over shuffled pages; the new rows are not yet written."""

    def __init__(
        self,
        lens: list[tuple[int, int]],
        *,
        group: int = 2,
        page_size: int = 4,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        kv_heads: int = 2,
        v_dim: int = HEAD_DIM,
        span: Span = CAUSAL,
        has_sinks: bool = False,
        latent: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        most = max((-(-context // page_size) for _, context in lens), default=1)
        pages = torch.randperm(most * max(len(lens), 1) + 3)
        tables = pages[: most * len(lens)].view(len(lens), most).clone()
        self.heads = Heads(
            query=kv_heads * group,
            kv=kv_heads,
            qk_dim=HEAD_DIM,
            v_dim=v_dim,
            scale=SCALE,
            span=span,
            latent=latent,
        )
        self.sinks = 2 * torch.randn(kv_heads * group) if has_sinks else None
        self.kv_cache = allocate_kv_cache(len(pages), page_size, self.heads, dtype)
        # Unwritten and foreign slots hold large numbers: a read of one shows.
        self.kv_cache.fill_(1000.0)
        self.keys = [torch.randn(context, kv_heads, HEAD_DIM).to(dtype) for _, context in lens]
        self.values = [torch.randn(context, kv_heads, v_dim).to(dtype) for _, context in lens]
        if latent:
            self.values = [keys[..., :v_dim] for keys in self.keys]
        for index, (query, context) in enumerate(lens):
            for position in range(context - query):
                page = int(tables[index, position // page_size])
                token = [self.keys[index][position].flatten()]
                if not latent:
                    token.append(self.values[index][position].flatten())
                self.kv_cache[page, position % page_size] = torch.cat(token)
            # Entries past the request's pages are not read.
            tables[index, -(-context // page_size) :] = -1
        rows = sum(query for query, _ in lens)
        self.lens = lens
        self.q = torch.randn(rows + padding, kv_heads * group, HEAD_DIM).to(dtype)
        self.k = torch.full((rows + padding, kv_heads, HEAD_DIM), 777.0, dtype=dtype)
        self.v = torch.full((rows + padding, kv_heads, v_dim), 777.0, dtype=dtype)
        row = 0
        for index, (query, context) in enumerate(lens):
            self.k[row : row + query] = self.keys[index][context - query :]
            self.v[row : row + query] = self.values[index][context - query :]
            row += query
        self.batch = AttentionBatch(
            query_lens=tuple(query for query, _ in lens),
            context_lens=tuple(context for _, context in lens),
            block_tables=tables,
            page_size=page_size,
        )
        self.group = group

    def run(self) -> Tensor:
        write_kv(self.k, None if self.heads.latent else self.v, self.kv_cache, self.batch)
        return paged_attention(self.q, self.kv_cache, self.batch, self.heads, self.sinks)

    def expected(self) -> Tensor:
        heads = self.q.shape[1]
        out = torch.zeros(len(self.q), heads, self.heads.v_dim, dtype=torch.float64)
        row = 0
        for index, (query, context) in enumerate(self.lens):
            for new in range(query):
                place = context - query + new
                visible = [key for key in range(context) if sees(self.heads.span, place, key)]
                for head in range(heads):
                    keys = self.keys[index][visible, head // self.group].double()
                    values = self.values[index][visible, head // self.group].double()
                    scores = keys @ self.q[row, head].double() * SCALE
                    weights = torch.exp(scores)
                    total = weights.sum()
                    if self.sinks is not None:
                        total = total + torch.exp(self.sinks[head].double())
                    out[row, head] = (weights / total) @ values
                row += 1
        return out


def sees(span: Span, query: int, key: int) -> bool:
    """Whether the query at one position sees the key at another."""
    if span.block is not None:
        return key // span.block <= query // span.block
    if span.chunk is not None and key // span.chunk != query // span.chunk:
        return False
    if span.window is not None and query - key >= span.window:
        return False
    return key <= query


MIXES = {
    "one_decode": [(1, 9)],
    "first_token": [(1, 1)],
    "equal_decodes": [(1, 8), (1, 8), (1, 8)],
    "ragged_decodes": [(1, 1), (1, 13), (1, 4), (1, 5)],
    "distant_decodes": [(1, 3), (1, 1200), (1, 40), (1, 700)],
    "prefill": [(7, 7)],
    "page_exact_prefill": [(8, 8)],
    "chunk": [(3, 11)],
    "prefills": [(2, 2), (5, 5), (9, 9)],
    "mixed": [(1, 6), (5, 5), (3, 10), (1, 17), (1, 2), (4, 4)],
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("mix", MIXES)
def test_attention_is_the_reference(mix: str, group: int, padding: int) -> None:
    case = Case(MIXES[mix], group=group, padding=padding)
    out = case.run()
    assert out.shape == case.q.shape
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out.double(), case.expected(), rtol=1e-4, atol=1e-5)
    rows = case.batch.num_rows
    assert torch.equal(out[rows:], torch.zeros_like(out[rows:]))


@pytest.mark.parametrize("mix", MIXES)
def test_attention_in_bf16(mix: str) -> None:
    case = Case(MIXES[mix], dtype=torch.bfloat16, padding=1)
    out = case.run()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), case.expected(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_page_size_does_not_matter(page_size: int) -> None:
    case = Case(MIXES["mixed"], page_size=page_size)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-4, atol=1e-5)


SPANS = {
    "causal": CAUSAL,
    "window_1": Span(window=1),
    "window_4": Span(window=4),
    "window_7": Span(window=7),
    "window_100": Span(window=100),
    "chunk_4": Span(chunk=4),
    "chunk_6": Span(chunk=6),
    "block_2": Span(block=2),
    "block_8": Span(block=8),
}


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "distant_decodes"])
def test_every_span_with_and_without_sinks(mix: str, span: str, has_sinks: bool) -> None:
    case = Case(MIXES[mix], padding=1, span=SPANS[span], has_sinks=has_sinks)
    out = case.run()
    torch.testing.assert_close(out.double(), case.expected(), rtol=1e-4, atol=1e-5)
    assert torch.equal(out[-1], torch.zeros_like(out[-1]))


@pytest.mark.parametrize("span", [Span(window=40), Span(chunk=600), Span(window=900)])
def test_distant_decodes_with_a_span(span: Span) -> None:
    case = Case(MIXES["distant_decodes"], span=span, has_sinks=True, kv_heads=1)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["short_values", "long_values", "latent", "whole_latent"])
@pytest.mark.parametrize("mix", ["ragged_decodes", "prefills", "mixed"])
def test_values_of_other_dims_and_values_that_are_keys(mix: str, form: str) -> None:
    v_dim = {"short_values": 6, "long_values": 24, "latent": 10, "whole_latent": HEAD_DIM}[form]
    latent = "latent" in form
    for has_sinks in (False, True):
        case = Case(
            MIXES[mix],
            padding=2,
            group=4,
            kv_heads=1 if latent else 2,
            v_dim=v_dim,
            latent=latent,
            span=Span(window=5),
            has_sinks=has_sinks,
        )
        assert case.kv_cache.shape[2] == (HEAD_DIM if latent else 2 * (HEAD_DIM + v_dim))
        out = case.run()
        assert out.shape == (len(case.q), len(case.q[0]), v_dim)
        torch.testing.assert_close(out.double(), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", ["ragged_decodes", "equal_decodes", "prefill", "mixed"])
def test_sinks_and_a_window_in_bf16(mix: str) -> None:
    case = Case(MIXES[mix], dtype=torch.bfloat16, span=Span(window=4), has_sinks=True)
    out = case.run()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), case.expected(), rtol=0.02, atol=0.02)


def test_layers_of_several_spans_share_a_batch() -> None:
    cases = [Case(MIXES["mixed"], span=span) for span in SPANS.values()]
    for case in cases:
        case.batch = cases[0].batch  # the same requests on the same pages
        torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-4, atol=1e-5)


def test_pages_before_a_window_are_not_read() -> None:
    case = Case([(1, 14), (3, 13)], span=Span(window=5))
    expected = case.expected()
    # Keys 10 to 13 and 6 to 12 lie on the pages from 8 and from 4 on.
    for table, first in zip(case.batch.block_tables, (2, 1), strict=True):
        case.kv_cache[table[:first]] = torch.nan
    torch.testing.assert_close(case.run().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
def test_no_request(padding: int) -> None:
    case = Case([], padding=padding)
    out = case.run()
    assert out.shape == (padding, 4, HEAD_DIM)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((case.kv_cache == 1000.0).all())


def test_only_the_new_rows_slots_are_written() -> None:
    case = Case(MIXES["mixed"], padding=2)
    before = case.kv_cache.clone()
    write_kv(case.k, case.v, case.kv_cache, case.batch)
    changed = (case.kv_cache != before).any(-1).flatten().nonzero().flatten()
    assert changed.tolist() == sorted(case.batch.slots.tolist())
    assert len(changed) == case.batch.num_rows
    assert not bool((case.kv_cache == 777.0).any())


def test_strided_queries_keys_and_values_are_read_right() -> None:
    case = Case(MIXES["mixed"], padding=1)
    expected = case.run()
    qkv = torch.cat((case.q, case.k, case.v), 1)
    heads, kv_heads = case.q.shape[1], case.k.shape[1]
    case.q, case.k, case.v = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
    assert not case.q.is_contiguous()
    assert torch.equal(case.run(), expected)
    decode = Case(MIXES["ragged_decodes"])
    expected = decode.run()
    decode.q = torch.cat((decode.q, decode.q), 1)[:, : decode.q.shape[1]]
    assert torch.equal(decode.run(), expected)


def test_a_request_does_not_see_the_others() -> None:
    mixed = Case(MIXES["mixed"])
    out = mixed.run()
    row = 0
    for index, (query, context) in enumerate(mixed.lens):
        alone = AttentionBatch(
            query_lens=(query,),
            context_lens=(context,),
            block_tables=mixed.batch.block_tables[index : index + 1],
            page_size=mixed.batch.page_size,
        )
        rows = slice(row, row + query)
        single = paged_attention(mixed.q[rows], mixed.kv_cache, alone, mixed.heads)
        torch.testing.assert_close(single, out[rows], rtol=1e-5, atol=1e-6)
        row += query


def test_chunks_of_a_prompt_are_the_prompt() -> None:
    whole = Case([(11, 11)])
    expected = whole.run()
    parts = []
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        batch = AttentionBatch(
            query_lens=(end - begin,),
            context_lens=(end,),
            block_tables=whole.batch.block_tables,
            page_size=4,
        )
        parts.append(paged_attention(whole.q[begin:end], whole.kv_cache, batch, whole.heads))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)


def test_positions_are_the_last_of_each_request() -> None:
    batch = Case([(1, 6), (3, 5), (2, 2)]).batch
    assert batch.positions.tolist() == [5, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("lens", [(0, 3), (4, 3), (1, 9)])
def test_impossible_lengths_are_refused(lens: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 < query_len <= context_len"):
        AttentionBatch(
            query_lens=(lens[0],),
            context_lens=(lens[1],),
            block_tables=torch.zeros(1, 2, dtype=torch.int64),
            page_size=4,
        )
