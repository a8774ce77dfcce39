"""The attention kernels against float64, over caches whose unread places hold NaN."""

from dataclasses import replace
from math import nan
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_interpreter  # noqa: F401
from gpu_support import BOUND, DEVICE, ON_GPU, relative_error
from isomoe.kernels import CAUSAL, Heads, Span
from isomoe.kernels import attention as twin
from isomoe.kernels.gpu import attention_decode, attention_prefill, heads, mla
from isomoe.kernels.gpu.attention import PagedRows, fresh_prefill, paged_attention, prepare_heads
from isomoe.kernels.gpu.configs import Config, trying
from isomoe.kernels.gpu.mla import latent_attention
from isomoe.kernels.gpu.write_kv import write_kv
from isomoe.kernels.mla import latent_attention as twin_latent_attention
from isomoe.kernels.norm import rms_norm
from isomoe.kernels.rope import rope_table, rotate

DTYPES = [torch.bfloat16, torch.float32]


class Case:
    """Requests over shuffled pages. decodes: keys of each, None for padding."""

    def __init__(
        self,
        decodes: list[int | None],
        prefills: list[tuple[int, int]] | None = None,
        *,
        padding: int = 0,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        v_dim: int | None = None,
        span: Span = CAUSAL,
        sinks: bool = False,
        latent: bool = False,
        page_size: int = 4,
        dtype: torch.dtype = torch.float32,
        spare_context: int = 0,
    ) -> None:
        prefills = prefills or []
        torch.manual_seed(len(decodes) + 7 * len(prefills) + dim)
        self.num_heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.heads = Heads(
            query=heads,
            kv=kv_heads,
            qk_dim=dim,
            v_dim=v_dim or dim,
            scale=dim**-0.5,
            span=span,
            latent=latent,
        )
        self.sinks = torch.randn(heads).to(DEVICE) if sinks else None
        lens = [(1, keys) for keys in decodes if keys] + prefills
        most = max((-(-keys // page_size) for _, keys in lens), default=1) + 1
        requests = max(len(lens), 1)
        pages = torch.randperm(most * requests + 3)
        self.tables = pages[: most * requests].view(requests, most).int()
        table_rows: list[int] = []
        positions: list[int] = []
        request = 0
        for keys in decodes:
            # The place of a row of padding is whatever it was.
            table_rows.append(request if keys else -1)
            positions.append(keys - 1 if keys else 10**6)
            request += bool(keys)
        starts = [len(decodes)]
        for new, keys in prefills:
            table_rows += [request] * new
            positions += range(keys - new, keys)
            starts.append(starts[-1] + new)
            request += 1
        table_rows += [-1] * padding
        positions += [-5] * padding
        self.kv_cache = torch.full(
            (len(pages), page_size, self.heads.token_width), nan, dtype=dtype, device=DEVICE
        )
        self.real = torch.tensor(table_rows) >= 0
        self.table_rows, self.positions = table_rows, positions
        used = self.tables.clone()
        for index, (_, keys) in enumerate(lens):
            # Far outside of the cache: no entry past a request's pages may be followed.
            used[index, -(-keys // page_size) :] = 2**30
        self.lens = lens
        self.rows = PagedRows(
            table_rows=torch.tensor(table_rows, dtype=torch.int32, device=DEVICE),
            positions=torch.tensor(positions, dtype=torch.int32, device=DEVICE),
            block_tables=used.to(DEVICE),
            page_size=page_size,
            num_decodes=len(decodes),
            prefill_lens=tuple(prefills),
            prefill_starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE)
            if prefills
            else None,
            max_context=max((keys for keys in decodes if keys), default=1) + spare_context,
        )

    def slot(self, row: int, position: int) -> tuple[int, int]:
        page = int(self.tables[self.table_rows[row], position // self.rows.page_size])
        return page, position % self.rows.page_size

    def fill(self, *, all_keys: bool = True) -> None:
        """Random keys and values where requests have some; all but the new rows' if not all."""
        for index, (new, keys) in enumerate(self.lens):
            row = self.table_rows.index(index)
            for position in range(keys if all_keys else keys - new):
                token = torch.randn(self.heads.token_width)
                self.kv_cache[self.slot(row, position)] = token.to(self.dtype).to(DEVICE)

    def queries(self) -> Tensor:
        q = torch.randn(len(self.table_rows), self.num_heads, self.dim).to(self.dtype)
        q[~self.real] = nan
        return q.to(DEVICE)

    def attend(self, q: Tensor) -> Tensor:
        return paged_attention(q, self.kv_cache, self.rows, self.heads, self.sinks)

    def expected(self, q: Tensor) -> Tensor:
        heads = self.heads
        out = torch.zeros(*q.shape[:2], heads.v_dim, dtype=torch.float64)
        cache = self.kv_cache.cpu().double()
        width = heads.kv * heads.qk_dim
        for index in range(len(self.lens)):
            rows = [row for row, of in enumerate(self.table_rows) if of == index]
            position = torch.tensor([self.positions[row] for row in rows])[:, None]
            keys = int(position[-1]) + 1
            tokens = cache[self.tables[index].long()].flatten(0, 1)[:keys]
            k = tokens[:, :width].view(keys, heads.kv, heads.qk_dim)
            v = k[..., : heads.v_dim]
            if not heads.latent:
                v = tokens[:, width:].view(keys, heads.kv, heads.v_dim)
            k, v = (x.repeat_interleave(heads.query // heads.kv, 1) for x in (k, v))
            scores = torch.einsum("thd,khd->htk", q[rows].cpu().double(), k) * heads.scale
            key, span = torch.arange(keys)[None, :], heads.span
            last = position
            if span.block is not None and len(rows) > 1:
                last = position // span.block * span.block + span.block - 1
            unseen = key > last
            if span.window is not None:
                unseen |= key <= position - span.window
            if span.chunk is not None:
                unseen |= key // span.chunk != position // span.chunk
            scores = scores.masked_fill(unseen, -torch.inf)
            if self.sinks is not None:
                sinks = self.sinks.cpu().double().view(-1, 1, 1).expand(-1, len(rows), 1)
                scores = torch.cat((scores, sinks), -1)
            weights = scores.softmax(-1)[..., :keys]
            out[rows] = torch.einsum("htk,khd->thd", weights, v)
        return out

    def check(self, out: Tensor, q: Tensor) -> None:
        assert out.shape == (*q.shape[:2], self.heads.v_dim)
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        assert relative_error(out, self.expected(q)) < BOUND[self.dtype]
        assert not out[~self.real].any()


SHAPES = {  # query heads, KV heads, head dim
    "small": (4, 2, 16),
    "one_kv": (3, 1, 24),
    "no_group": (2, 2, 32),
    "wide": (12, 2, 80),
}
if ON_GPU:
    SHAPES["main"] = (32, 4, 128)
    SHAPES["large_dim"] = (16, 2, 256)
    SHAPES["large_group"] = (24, 1, 64)
LONG = 4000 if ON_GPU else 90


@pytest.mark.parametrize("norm", ["", "own dtype", "fp32"])
@pytest.mark.parametrize(
    ("shape", "turned"), [*((shape, None) for shape in SHAPES), ("small", 8), ("wide", 20)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_heads_is_norm_rope_and_write(
    dtype: torch.dtype, shape: str, turned: int | None, norm: str
) -> None:
    n, k, d = SHAPES[shape]
    case = Case(
        [5, None, 1, 9],
        [(3, 3), (2, 10)],
        padding=2,
        heads=n,
        kv_heads=k,
        dim=d,
        dtype=dtype,
        page_size=3,
    )
    num_rows = len(case.table_rows)
    cos, sin = rope_table(16, turned or d, 10000.0)
    whole = torch.randn(num_rows, (n + 2 * k) * d + 8).to(dtype)
    whole[~case.real] = nan
    qkv = whole[:, :-8]  # strided rows
    kept = torch.float32 if norm == "fp32" else dtype
    weights = (torch.rand(d).add(0.5).to(kept), torch.rand(d).add(0.5).to(kept))
    given = whole.to(DEVICE)[:, :-8]
    keys = torch.full((num_rows, k, d), nan, dtype=dtype, device=DEVICE)
    norms = (weights[0].to(DEVICE), weights[1].to(DEVICE), 1e-5) if norm else None
    tables = cos.to(DEVICE), sin.to(DEVICE)
    q = prepare_heads(given, case.heads, norms, *tables, case.kv_cache, case.rows, keys=keys)

    real = case.real.nonzero().flatten()
    at = torch.tensor(case.positions)[real]
    parts = qkv[real].reshape(len(real), n + 2 * k, d)
    both = parts[:, : n + k]
    if norm:
        every = torch.cat((weights[0].expand(n, d), weights[1].expand(k, d)))
        both = rms_norm(both, every, 1e-5).to(dtype)
    both = rotate(both, cos[at], sin[at])
    close = 2e-3 if dtype == torch.bfloat16 else 1e-6  # few roundings of bf16 fall the other way
    assert q.shape == (num_rows, n, d)
    assert q.dtype == dtype
    assert relative_error(q[real.to(DEVICE)], both[:, :n]) < close
    assert relative_error(keys[real.to(DEVICE)], both[:, n:]) < close
    assert bool(keys[~case.real].isnan().all())
    cache = case.kv_cache.cpu()
    written = torch.stack([cache[case.slot(row, case.positions[row])] for row in real.tolist()])
    written = written.view(len(real), 2 * k, d)
    assert relative_error(written[:, :k], both[:, n:]) < close
    assert torch.equal(written[:, k:], parts[:, n + k :])
    assert int((~cache.isnan()).any(-1).sum()) == len(real)


def test_prepare_heads_keeps_keys_in_place() -> None:
    case = Case([5, None, 3], [(4, 4)], dim=32)
    n, k, d = case.num_heads, case.kv_heads, case.dim
    cos, sin = (table.to(DEVICE) for table in rope_table(16, d, 10000.0))
    qkv = torch.randn(len(case.table_rows), (n + 2 * k) * d, device=DEVICE)
    arguments = (cos, sin, case.kv_cache, case.rows)
    keys = torch.zeros(len(case.table_rows), k, d, device=DEVICE)
    q = prepare_heads(qkv, case.heads, None, *arguments, keys=keys)
    before = case.kv_cache.clone()
    own = qkv.view(-1, n + 2 * k, d)[:, n : n + k]
    again = prepare_heads(qkv, case.heads, None, *arguments, keys=own)
    assert torch.equal(q[case.real], again[case.real])
    assert torch.equal(own[case.real], keys[case.real])
    assert torch.equal(before.nan_to_num(9.0), case.kv_cache.nan_to_num(9.0))


@pytest.mark.parametrize("config", [*heads.candidates(8)][:: 1 if ON_GPU else 4])
def test_prepare_heads_in_every_configuration(config: Config) -> None:
    case = Case([5, None, 3, 2, 1])
    n, k, d = case.num_heads, case.kv_heads, case.dim
    tables = tuple(table.to(DEVICE) for table in rope_table(16, d, 10000.0))
    qkv = torch.randn(len(case.table_rows), (n + 2 * k) * d, device=DEVICE)
    expected = prepare_heads(qkv, case.heads, None, *tables, case.kv_cache.clone(), case.rows)
    with trying("prepare_heads", config):
        q = prepare_heads(qkv, case.heads, None, *tables, case.kv_cache, case.rows)
    assert relative_error(q[case.real], expected[case.real]) < 1e-6


MIXES: dict[str, tuple[list[int | None], list[tuple[int, int]]]] = {
    "first_token": ([1], []),
    "one_decode": ([LONG], []),
    "decodes": ([1, 13, None, 4, LONG, 16, 17, None], []),
    "prefill": ([], [(7, 7)]),
    "long_prefill": ([], [(LONG, LONG)]),
    "chunk": ([], [(5, LONG)]),
    "prefills": ([], [(2, 2), (33, 40), (1, 9), (16, 16), (40, 70)]),
    "mixed": ([6, None, 21], [(5, 5), (3, 30), (20, 20)]),
}


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_reference(dtype: torch.dtype, mix: str, padding: int) -> None:
    case = Case(*MIXES[mix], padding=padding, dtype=dtype)
    case.fill()
    q = case.queries()
    case.check(case.attend(q), q)


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_other_shapes(dtype: torch.dtype, shape: str, page_size: int) -> None:
    n, k, d = SHAPES[shape]
    decodes: list[int | None] = [18, None, LONG]
    prefills = [(7, 12), (LONG, LONG)] if ON_GPU else [(7, 12), (34, 34)]
    case = Case(decodes, prefills, heads=n, kv_heads=k, dim=d, page_size=page_size, dtype=dtype)
    case.fill()
    q = case.queries()
    case.check(case.attend(q), q)


FORMS: dict[str, dict[str, Any]] = {
    "window": {"span": Span(window=7), "dim": 32},
    "window of one": {"span": Span(window=1)},
    "long window": {"span": Span(window=40)},
    "chunk": {"span": Span(chunk=16)},
    "block": {"span": Span(block=8)},
    "sinks": {"sinks": True},
    "window, sinks": {"span": Span(window=9), "sinks": True, "heads": 6},
    "values of fewer dims": {"dim": 24, "v_dim": 16},
    "values of fewer dims, sinks": {
        "dim": 192,
        "v_dim": 128,
        "sinks": True,
        "span": Span(window=20),
    },
    "latent": {"heads": 5, "kv_heads": 1, "dim": 28, "v_dim": 20, "latent": True},
    "wide latent": {"heads": 18, "kv_heads": 1, "dim": 576, "v_dim": 512, "latent": True},
}
FORM_MIX: tuple[list[int | None], list[tuple[int, int]]] = (
    [6, None, 21, 1, LONG, 70, 16, 17],
    [(5, 5), (3, 30), (20, 20), (33, 60), (1, 18)],
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_other_forms(dtype: torch.dtype, form: str) -> None:
    case = Case(*FORM_MIX, padding=2, dtype=dtype, **FORMS[form])
    case.fill()
    q = case.queries()
    case.check(case.attend(q), q)


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_in_pieces(form: str) -> None:
    """A row's keys split over several programs, a prompt's over several tiles."""
    case = Case([5, None, 90, 21], [(40, 90)], dtype=torch.bfloat16, **FORMS[form])
    case.fill()
    q = case.queries()
    decode = {"BLOCK_N": 16, "PER_SM": 16, "num_warps": 1}
    prefill = {"BLOCK_M": 16, "BLOCK_N": 16}
    with trying("decode_attention", decode), trying("prefill_attention", prefill):
        case.check(case.attend(q), q)
    assert not attention_decode._counters(q.device).any()


@pytest.mark.parametrize("spare", [0, 1000])
@pytest.mark.parametrize(
    "config",
    [*attention_decode.candidates(8)]
    if ON_GPU
    else [
        {"BLOCK_N": 16, "PER_SM": 1, "num_warps": 4},
        {"BLOCK_N": 16, "PER_SM": 16, "num_warps": 1},
        {"BLOCK_N": 32, "PER_SM": 3, "num_warps": 4},
    ],
)
def test_decode_in_every_configuration(config: Config, spare: int) -> None:
    case = Case([1, 90, None, 17, 33], dtype=torch.bfloat16, spare_context=spare)
    case.fill()
    q = case.queries()
    with trying("decode_attention", config):
        out = case.attend(q)
        case.check(out, q)
        # The counters are as they were, and the order of arrival does not show.
        for _ in range(20 if ON_GPU else 1):
            again = case.attend(q)
            assert torch.equal(out, again)
    assert not attention_decode._counters(q.device).any()


@pytest.mark.parametrize(
    "config",
    [*attention_prefill.candidates(64)]
    if ON_GPU
    else [
        {"BLOCK_M": 16, "BLOCK_N": 16},
        {"BLOCK_M": 32, "BLOCK_N": 64},
        {"BLOCK_M": 128, "BLOCK_N": 32},
    ],
)
def test_prefill_in_every_configuration(config: Config) -> None:
    prefills = [(1, 1), (16, 16), (33, 50), (5, 64), (64, 64), (1, 70)]
    case = Case([], prefills, heads=6, dtype=torch.bfloat16)
    case.fill()
    q = case.queries()
    with trying("prefill_attention", config):
        case.check(case.attend(q), q)


def test_many_prefills() -> None:
    case = Case([], [(1 + index % 5, 1 + index % 5 + index % 3) for index in range(37)], dim=8)
    case.fill()
    q = case.queries()
    case.check(case.attend(q), q)


def test_strided_queries_are_read_right() -> None:
    case = Case([6, 21], [(5, 8)], dtype=torch.bfloat16)
    case.fill()
    q = case.queries()
    wide = torch.cat((q, q), 2)[:, :, : case.dim]
    assert not wide.is_contiguous()
    expected = case.attend(q)
    assert torch.equal(case.attend(wide), expected)


@pytest.mark.parametrize("padding", [0, 3])
def test_no_request(padding: int) -> None:
    case = Case([], padding=padding)
    q = case.queries()
    out = case.attend(q)
    assert torch.equal(out, torch.zeros(padding, case.num_heads, case.dim, device=DEVICE))
    n, k, d = case.num_heads, case.kv_heads, case.dim
    tables = tuple(table.to(DEVICE) for table in rope_table(4, d, 10000.0))
    qkv = torch.full((padding, (n + 2 * k) * d), nan, device=DEVICE)
    assert (
        prepare_heads(qkv, case.heads, None, *tables, case.kv_cache, case.rows).shape[0] == padding
    )
    assert bool(case.kv_cache.isnan().all())


def test_only_padding_decodes() -> None:
    case = Case([None, None, None], spare_context=500)
    out = case.attend(case.queries())
    assert torch.equal(out, torch.zeros_like(out))


def test_a_decode_is_a_prefill_of_one_row() -> None:
    case = Case([50], dtype=torch.bfloat16)
    case.fill()
    q = case.queries()
    starts = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    rows = replace(case.rows, num_decodes=0, prefill_lens=((1, 50),), prefill_starts=starts)
    case.check(paged_attention(q, case.kv_cache, rows, case.heads), q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_from_its_projection_to_its_attention(dtype: torch.dtype) -> None:
    """All the kernels in their order, against their twins in theirs; also by torch's attention."""
    case = Case([], [(19, 19), (6, 6)], padding=1, dtype=dtype, heads=8, dim=32)
    n, k, d = case.num_heads, case.kv_heads, case.dim
    cos, sin = rope_table(32, d, 10000.0)
    qkv = torch.randn(26, (n + 2 * k) * d).to(dtype)
    weight = torch.rand(d).add(0.5).to(dtype)
    given = qkv.clone().to(DEVICE)
    norms = (weight.to(DEVICE), weight.to(DEVICE), 1e-6)
    keys = given.view(26, n + 2 * k, d)[:, n : n + k]
    values = given.view(26, n + 2 * k, d)[:, n + k :]
    tables = cos.to(DEVICE), sin.to(DEVICE)
    q = prepare_heads(given, case.heads, norms, *tables, case.kv_cache, case.rows, keys=keys)
    out = case.attend(q)
    fresh = paged_attention(q, case.kv_cache, case.rows, case.heads, new=(keys, values))
    alone = fresh_prefill(q, keys, values, case.rows, case.heads.scale)

    batch = twin.AttentionBatch(
        query_lens=(19, 6),
        context_lens=(19, 6),
        block_tables=case.tables.long(),
        page_size=case.rows.page_size,
    )
    parts = qkv[:25].view(25, n + 2 * k, d)
    both = rms_norm(parts[:, : n + k], weight, 1e-6)
    both = rotate(both, cos[batch.positions], sin[batch.positions])
    cache = torch.zeros(case.kv_cache.shape, dtype=dtype)
    twin.write_kv(both[:, n:], parts[:, n + k :], cache, batch)
    expected = twin.paged_attention(both[:, :n].contiguous(), cache, batch, case.heads)
    for result in (out, fresh):
        assert relative_error(result[:25], expected) < BOUND[dtype]
        assert not result[25:].any()
    assert torch.equal(alone, fresh[:25])


def test_prompts_of_equal_length_share_a_call() -> None:
    lens = ((5, 5), (5, 5), (3, 3), (5, 5))
    assert attention_prefill.equal_runs(lens) == [(2, 5), (1, 3), (1, 5)]
    case = Case([], list(lens))
    q = torch.randn(18, 4, 16, device=DEVICE)
    k, v = torch.randn(2, 18, 2, 16, device=DEVICE)
    found = fresh_prefill(q, k, v, case.rows, case.heads.scale)
    begin = 0
    for length, _ in lens:
        span = slice(begin, begin + length)
        keys, values = (x[span].repeat_interleave(2, 1).double() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[span].double(), keys) * case.heads.scale
        unseen = torch.ones(length, length, device=DEVICE).triu(1).bool()
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        assert relative_error(found[span], expected) < BOUND[q.dtype]
        begin += length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "v_dim"), [(2, 24), (3, 16), (1, None)])
def test_keys_and_values_are_written_where_they_belong(
    kv_heads: int, v_dim: int | None, dtype: torch.dtype
) -> None:
    latent = v_dim is None
    case = Case(
        [5, None, 1],
        [(3, 3), (2, 10)],
        padding=1,
        heads=kv_heads,
        kv_heads=kv_heads,
        dim=24,
        v_dim=v_dim,
        latent=latent,
        page_size=3,
        dtype=dtype,
    )
    k = torch.randn(len(case.table_rows), kv_heads, 40).to(dtype)[..., 8:32]
    v = None if v_dim is None else torch.randn(len(case.table_rows), kv_heads, v_dim).to(dtype)
    k[~case.real] = 1e9
    given = (k.to(DEVICE), None if v is None else v.to(DEVICE))
    write_kv(*given, case.kv_cache, case.rows)
    cache = case.kv_cache.cpu()
    for row in case.real.nonzero().flatten().tolist():
        both = k[row].flatten()
        if v is not None:
            both = torch.cat((both, v[row].flatten()))
        assert torch.equal(cache[case.slot(row, case.positions[row])], both)
    assert int((~cache.isnan()).any(-1).sum()) == int(case.real.sum())


def latents(dtype: torch.dtype) -> tuple[Case, Tensor, Tensor, Heads]:
    """A case over latents of 20 dims, queries and up-projections; four heads of 12 + 8 dims."""
    case = Case(
        [6, None],
        [(18, 18), (5, 5)],
        padding=1,
        heads=4,
        kv_heads=1,
        dim=28,
        v_dim=20,
        latent=True,
        dtype=dtype,
    )
    case.fill()
    q = torch.randn(len(case.table_rows), 4, 20).to(dtype)
    up = (torch.randn(4, 12 + 16, 20) * 0.3).to(dtype)
    heads = Heads(query=4, kv=4, qk_dim=20, v_dim=16, scale=0.2)
    return case, q, up, heads


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention_is_its_twin(
    dtype: torch.dtype, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, q, up, heads = latents(dtype)
    if library:  # which takes no fp32, and only long prompts
        monkeypatch.setattr(mla, "for_library", lambda *_: True)
    out = latent_attention(q.to(DEVICE), case.kv_cache, case.rows, up.to(DEVICE), heads)
    batch = twin.AttentionBatch(
        query_lens=(1, 18, 5),
        context_lens=(6, 18, 5),
        block_tables=case.tables.long(),
        page_size=case.rows.page_size,
    )
    wide = [x.double() for x in (q[case.real], case.kv_cache.cpu().nan_to_num(), up)]
    expected = twin_latent_attention(wide[0], wide[1], batch, wide[2], heads)
    assert relative_error(out[case.real.to(DEVICE)], expected) < BOUND[dtype]
    assert not out[~case.real.to(DEVICE)].any()
