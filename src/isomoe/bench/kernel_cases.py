"""One case for each GPU kernel of a model: its inputs, its plain-torch twin, what it must move.

T: rows   H: hidden size   N: query heads   K: KV heads   d: head dim   E: experts   V: vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from isomoe.bench import expert_cases
from isomoe.bench.kernel_setting import Prepared, Run, Setting, Sizes
from isomoe.errors import ConfigError
from isomoe.kernels import (
    AttentionBatch,
    Heads,
    rms_norm,
    rope_table,
    rotate,
    route,
    split_heads,
)
from isomoe.kernels import attention as plain_attention
from isomoe.kernels import norm as plain_norm
from isomoe.kernels import routing as plain_routing
from isomoe.kernels import sampling as plain_sampling
from isomoe.kernels.paged_rows import PagedRows
from isomoe.kernels.sampling import RowSampling, uniform

_EPS = 1e-6
_PAGE = 16
_PROMPT = 4096
"""Prefills are of prompts of at most so many tokens."""
_SAMPLED_ROWS = 512
"""Kernels of rows that get logits, and of decode, are not run on more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """A kernel in one role.

    Attributes:
        name: as `isomoe bench kernel` takes it.
        prepare: makes its inputs.
        most_rows: with more than so many it is never called; None is no bound.
        least_rows: with fewer it is never called.
        is_variant: another way to the same result, or to nearly the same; only its full name asks
            for it.
    """

    name: str
    prepare: Callable[[Setting], Prepared] = field(repr=False)
    most_rows: int | None = None
    least_rows: int = 1
    is_variant: bool = False

    def takes(self, rows: int) -> bool:
        """Whether it is ever called with so many rows."""
        return self.least_rows <= rows and (self.most_rows is None or rows <= self.most_rows)


def find_cases(names: Sequence[str] | None = None) -> list[KernelCase]:
    """The cases that the names ask for; a kernel's name asks for all its roles.

    Raises:
        ConfigError: if a name is not known; lists those that are.
    """
    own = [case for case in CASES if not case.is_variant]
    if names is None:
        return own
    found: list[KernelCase] = []
    for name in names:
        mine = [case for case in CASES if case.name == name]
        mine = mine or [case for case in own if case.name.split("-")[0] == name]
        if not mine:
            known = ", ".join(case.name for case in CASES)
            raise ConfigError(f"kernel {name}: must be among {known}")
        found += [case for case in mine if case not in found]
    return found


def _add_rms_norm(at: Setting) -> Prepared:
    from isomoe.kernels.gpu.norm import add_rms_norm

    rows, hidden = at.rows, at.sizes.hidden
    inputs = [
        (at.normal(rows, hidden), at.normal(rows, hidden), at.normal(hidden), _EPS)
        for _ in range(at.copies)
    ]
    return Prepared(
        inputs=inputs,
        run=add_rms_norm,
        twin=plain_norm.add_rms_norm,
        num_bytes=(4 * rows + 1) * hidden * at.dtype.itemsize,
    )


def _linear(outputs: Callable[[Sizes], int], inputs: Callable[[Sizes], int]) -> Any:
    def prepare(at: Setting) -> Prepared:
        from isomoe.kernels.gpu.linear import linear

        rows, n, k = at.rows, outputs(at.sizes), inputs(at.sizes)
        return Prepared(
            inputs=[(at.normal(rows, k), at.matrix(n, k)) for _ in range(at.copies)],
            run=linear,
            twin=torch.nn.functional.linear,
            num_bytes=(n * k + rows * (n + k)) * at.dtype.itemsize,
            flops=2.0 * rows * n * k,
        )

    return prepare


def _route(at: Setting) -> Prepared:
    sizes = at.sizes
    inputs = [(at.normal(at.rows, sizes.experts), sizes.routing) for _ in range(at.copies)]
    return Prepared(
        inputs=inputs,
        run=route,
        twin=plain_routing.route,
        num_bytes=at.rows * (sizes.experts * at.dtype.itemsize + 8 * sizes.routing.top_k),
    )


def _prepare_heads(at: Setting) -> Prepared:
    from isomoe.kernels.gpu.attention import prepare_heads

    heads, row = at.sizes.heads, at.sizes.qkv
    dim = heads.qk_dim
    cos, sin = rope_table(max(at.context, at.rows) + 1, dim, 1e6, at.device)
    norms = (at.normal(dim), at.normal(dim), _EPS)
    inputs: list[tuple[Any, ...]] = []
    for _ in range(at.copies):
        if at.rows <= _SAMPLED_ROWS:
            paged, cache = _decode_rows(at).paged, _cache(at, at.rows)
        else:  # so many rows are prompts
            paged = _prefill_rows(at).paged
            longest = max(length for length, _ in paged.prefill_lens)
            cache = _cache(at, len(paged.prefill_lens), longest)
        inputs.append((at.normal(at.rows, row), heads, norms, cos, sin, cache, paged))
    return Prepared(
        inputs=inputs,
        run=_heads_with_cache(prepare_heads),
        twin=_heads_with_cache(_heads_twin),
        num_bytes=at.rows * (2 * row * at.dtype.itemsize + 8 * dim),
    )


def _heads_with_cache(heads: Run) -> Run:
    """What was written counts as an output, too."""

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        return heads(*args), args[5]

    return run


def _heads_twin(
    qkv: Tensor,
    heads: Heads,
    norms: tuple[Tensor, Tensor, float],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    rows: PagedRows,
) -> Tensor:
    q_weight, k_weight, eps = norms
    split = split_heads(qkv, heads.query + 2 * heads.kv)
    q, k, value = torch.split(split, [heads.query, heads.kv, heads.kv], dim=1)
    positions = rows.positions.long()
    table = cos[positions], sin[positions]
    q = rotate(rms_norm(q, q_weight, eps), *table)
    k = rotate(rms_norm(k, k_weight, eps), *table)
    pages = rows.block_tables[rows.table_rows.long(), positions // rows.page_size].long()
    slots = pages * rows.page_size + positions % rows.page_size
    cache.flatten(0, 1).index_copy_(0, slots, torch.cat((k, value), 1).flatten(1))
    return q


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """The same rows as the kernels take them, and as the twin does."""

    paged: PagedRows
    plain: AttentionBatch


def _decode_rows(at: Setting) -> _Rows:
    """One row a request, each request with `context` keys on pages of its own, in random order."""
    tables = _tables(at, at.rows, at.context)
    paged = PagedRows(
        table_rows=torch.arange(at.rows, dtype=torch.int32, device=at.device),
        positions=torch.full((at.rows,), at.context - 1, dtype=torch.int32, device=at.device),
        block_tables=tables,
        page_size=_PAGE,
        num_decodes=at.rows,
        max_context=at.context,
    )
    plain = AttentionBatch(
        query_lens=(1,) * at.rows,
        context_lens=(at.context,) * at.rows,
        block_tables=tables.long(),
        page_size=_PAGE,
    )
    return _Rows(paged=paged, plain=plain)


def _prefill_rows(at: Setting) -> _Rows:
    """Whole prompts, of `_PROMPT` tokens but for the last."""
    lengths = [min(_PROMPT, at.rows - begin) for begin in range(0, at.rows, _PROMPT)]
    tables = _tables(at, len(lengths), max(lengths))
    requests = torch.tensor(
        [index for index, length in enumerate(lengths) for _ in range(length)],
        dtype=torch.int32,
        device=at.device,
    )
    positions = [position for length in lengths for position in range(length)]
    paged = PagedRows(
        table_rows=requests,
        positions=torch.tensor(positions, dtype=torch.int32, device=at.device),
        block_tables=tables,
        page_size=_PAGE,
        num_decodes=0,
        max_context=1,
        prefill_lens=tuple((length, length) for length in lengths),
        prefill_starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=at.device),
    )
    plain = AttentionBatch(
        query_lens=tuple(lengths),
        context_lens=tuple(lengths),
        block_tables=tables.long(),
        page_size=_PAGE,
    )
    return _Rows(paged=paged, plain=plain)


def _tables(at: Setting, requests: int, tokens: int) -> Tensor:
    pages = -(-tokens // _PAGE)
    order = list(range(requests * pages))
    Random(0).shuffle(order)
    return torch.tensor(order, dtype=torch.int32, device=at.device).view(requests, pages)


def _cache(at: Setting, requests: int, tokens: int | None = None) -> Tensor:
    pages = requests * -(-(at.context if tokens is None else tokens) // _PAGE)
    return at.normal(pages, _PAGE, at.sizes.heads.token_width)


def _paged_attention(
    at: Setting, rows: _Rows, caches: Sequence[Tensor], keys: int, pairs: float
) -> Prepared:
    from isomoe.kernels.gpu.attention import paged_attention

    heads = at.sizes.heads
    queries = at.rows * at.sizes.attended
    return Prepared(
        inputs=[
            (at.normal(at.rows, heads.query, heads.qk_dim), cache, rows, heads) for cache in caches
        ],
        run=lambda q, cache, rows, heads: paged_attention(q, cache, rows.paged, heads),
        twin=lambda q, cache, rows, heads: plain_attention.paged_attention(
            q, cache, rows.plain, heads
        ),
        num_bytes=(keys * heads.token_width + 2 * queries) * at.dtype.itemsize,
        flops=4.0 * pairs * at.sizes.attended,
    )


def _decode_attention(at: Setting) -> Prepared:
    keys = at.rows * at.context
    caches = [_cache(at, at.rows) for _ in range(at.copies)]
    return _paged_attention(at, _decode_rows(at), caches, keys, keys)


def _prefill_attention(at: Setting) -> Prepared:
    rows = _prefill_rows(at)
    lengths = [new for new, _ in rows.paged.prefill_lens]
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    caches = [_cache(at, len(lengths), max(lengths)) for _ in range(at.copies)]
    return _paged_attention(at, rows, caches, at.rows, pairs)


def _library_prefill(at: Setting) -> Prepared:
    """torch's own attention on the rows' own keys and values, which need not be in the cache."""
    from isomoe.kernels.gpu.attention import paged_attention

    ours = _prefill_attention(at)
    rows: _Rows = ours.inputs[0][2]
    inputs = []
    for q, cache, _, heads in ours.inputs:
        tokens = cache.flatten(0, 1)[rows.plain.slots]
        new = split_heads(tokens, 2 * heads.kv).chunk(2, dim=1)
        inputs.append((q, cache, rows, heads, new))
    return replace(
        ours,
        inputs=inputs,
        run=lambda q, cache, rows, heads, new: paged_attention(
            q, cache, rows.paged, heads, new=new
        ),
        twin=lambda q, cache, rows, heads, _: ours.twin(q, cache, rows, heads),
    )


def _greedy(at: Setting) -> Prepared:
    from isomoe.kernels.gpu.sampling import greedy

    return Prepared(
        inputs=[(at.normal(at.rows, at.sizes.vocab, std=4.0),) for _ in range(at.copies)],
        run=greedy,
        twin=plain_sampling.greedy,
        num_bytes=at.rows * at.sizes.vocab * at.dtype.itemsize,
        exact=True,
    )


def _draw(at: Setting) -> Prepared:
    from isomoe.kernels.gpu.sampling import draw

    rows = [RowSampling(temperature=0.7, top_k=20, top_p=0.9, seed=seed) for seed in range(at.rows)]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=at.device)

    columns = (
        column([row.temperature for row in rows], torch.float32),
        column([row.top_k for row in rows], torch.int32),
        column([row.top_p for row in rows], torch.float32),
        column([row.min_p for row in rows], torch.float32),
        column([uniform(row.seed, row.position) for row in rows], torch.float64),
    )
    return Prepared(
        inputs=[(at.normal(at.rows, at.sizes.vocab, std=4.0), *columns) for _ in range(at.copies)],
        run=draw,
        twin=lambda logits, *_: plain_sampling.sample(logits, rows),
        num_bytes=at.rows * at.sizes.vocab * at.dtype.itemsize,
        exact=True,
    )


def _chosen_logprobs(at: Setting) -> Prepared:
    from isomoe.kernels.gpu.sampling import chosen_logprobs

    vocab = at.sizes.vocab
    return Prepared(
        inputs=[
            (
                at.normal(at.rows, vocab, std=4.0),
                torch.randint(vocab, (at.rows,), device=at.device),
            )
            for _ in range(at.copies)
        ],
        run=chosen_logprobs,
        twin=plain_sampling.chosen_logprobs,
        num_bytes=at.rows * vocab * at.dtype.itemsize,
    )


CASES: tuple[KernelCase, ...] = (
    KernelCase(name="add_rms_norm", prepare=_add_rms_norm),
    KernelCase(name="linear-qkv", prepare=_linear(lambda s: s.qkv, lambda s: s.hidden)),
    KernelCase(name="prepare_heads", prepare=_prepare_heads),
    KernelCase(name="paged_attention-decode", prepare=_decode_attention, most_rows=_SAMPLED_ROWS),
    KernelCase(name="paged_attention-prefill", prepare=_prefill_attention, least_rows=16),
    KernelCase(
        name="paged_attention-sdpa", prepare=_library_prefill, least_rows=16, is_variant=True
    ),
    KernelCase(name="linear-o_proj", prepare=_linear(lambda s: s.hidden, lambda s: s.attended)),
    KernelCase(name="linear-router", prepare=_linear(lambda s: s.experts, lambda s: s.hidden)),
    KernelCase(name="route", prepare=_route),
    KernelCase(name="fused_experts", prepare=expert_cases.fused_experts),
    KernelCase(name="fused_experts-fp8", prepare=expert_cases.fp8_weights, is_variant=True),
    KernelCase(
        name="fused_experts-fp8_rows", prepare=expert_cases.fp8_weights_and_rows, is_variant=True
    ),
    KernelCase(name="fused_experts-grouped_mm", prepare=expert_cases.grouped_mm, is_variant=True),
    KernelCase(
        name="linear-lm_head",
        prepare=_linear(lambda s: s.vocab, lambda s: s.hidden),
        most_rows=_SAMPLED_ROWS,
    ),
    KernelCase(name="greedy", prepare=_greedy, most_rows=_SAMPLED_ROWS),
    KernelCase(name="draw", prepare=_draw, most_rows=_SAMPLED_ROWS),
    KernelCase(name="chosen_logprobs", prepare=_chosen_logprobs, most_rows=_SAMPLED_ROWS),
)
"""In the order of a layer, then of what follows the last."""
