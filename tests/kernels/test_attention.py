"""Paged attention against a float64 loop over rows, heads and keys."""

import pytest
import torch
from torch import Tensor

from isomoe.kernels import AttentionBatch, allocate_kv_cache, paged_attention, write_kv

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
    ) -> None:
        torch.manual_seed(seed)
        kv_heads = 2
        most = max((-(-context // page_size) for _, context in lens), default=1)
        pages = torch.randperm(most * max(len(lens), 1) + 3)
        tables = pages[: most * len(lens)].view(len(lens), most).clone()
        self.kv_cache = allocate_kv_cache(len(pages), page_size, kv_heads, HEAD_DIM, dtype)
        # Unwritten and foreign slots hold large numbers: a read of one shows.
        self.kv_cache.fill_(1000.0)
        self.keys = [torch.randn(context, kv_heads, HEAD_DIM).to(dtype) for _, context in lens]
        self.values = [torch.randn(context, kv_heads, HEAD_DIM).to(dtype) for _, context in lens]
        for index, (query, context) in enumerate(lens):
            for position in range(context - query):
                page = int(tables[index, position // page_size])
                both = torch.cat((self.keys[index][position], self.values[index][position]))
                self.kv_cache[page, position % page_size] = both
            # Entries past the request's pages are not read.
            tables[index, -(-context // page_size) :] = -1
        rows = sum(query for query, _ in lens)
        self.lens = lens
        self.q = torch.randn(rows + padding, kv_heads * group, HEAD_DIM).to(dtype)
        self.k = torch.full((rows + padding, kv_heads, HEAD_DIM), 777.0, dtype=dtype)
        self.v = self.k.clone()
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
        write_kv(self.k, self.v, self.kv_cache, self.batch)
        return paged_attention(self.q, self.kv_cache, self.batch, SCALE)

    def expected(self) -> Tensor:
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        row = 0
        for index, (query, context) in enumerate(self.lens):
            for new in range(query):
                visible = context - query + new + 1
                for head in range(self.q.shape[1]):
                    keys = self.keys[index][:visible, head // self.group].double()
                    values = self.values[index][:visible, head // self.group].double()
                    scores = keys @ self.q[row, head].double() * SCALE
                    weights = torch.exp(scores - scores.max())
                    out[row, head] = (weights / weights.sum()) @ values
                row += 1
        return out


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
    changed = (case.kv_cache != before).any(-1).any(-1).flatten().nonzero().flatten()
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
        single = paged_attention(mixed.q[rows], mixed.kv_cache, alone, SCALE)
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
        parts.append(paged_attention(whole.q[begin:end], whole.kv_cache, batch, SCALE))
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
