"""Attention, sharded by heads.  T rows, N heads and K KV heads of this rank, D head dim."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner
from isomoe.blocks.cache import Memory
from isomoe.blocks.leaf import WeightSlice
from isomoe.blocks.linear import Linear, Part, RowLinear
from isomoe.blocks.norm import RMSNorm, unit_norm
from isomoe.blocks.rope import Rope
from isomoe.errors import ConfigError
from isomoe.kernels import (
    CAUSAL,
    Heads,
    PagedRows,
    Span,
    allocate_kv_cache,
    attend,
    paged_attention,
    rms_norm,
    rotate,
    split_heads,
    write_kv,
)
from isomoe.layout import BlockSpec, Letter, Mesh, Seat, Variant, row_sharded


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNames:
    """What a checkpoint calls the parts of an attention block.

    A model with one fused projection has one name for `q`, `k` and `v`; its rows are all queries,
    then all keys, then all values.
    """

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    output: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    sinks: str = "sinks"
    gate: str = "g_proj"


NAMES = AttentionNames()


@dataclass(frozen=True, slots=True)
class QueryScale:
    """Multiplies a query at position p by 1 + strength * ln(1 + floor((p + 1) / floor_scale)).

    Source: Llama 4 (2025), for layers without position embedding.
    """

    strength: float
    floor_scale: float

    def at(self, positions: Tensor) -> Tensor:
        """positions: [T] -> [T, 1, 1] fp32."""
        steps = torch.floor((positions + 1.0) / self.floor_scale)
        return (1 + self.strength * torch.log1p(steps)).view(-1, 1, 1)


class AttentionCore(Memory):
    """What lies between the two projections: QK norm, rope, KV write, attention.

    Args:
        norms: of each query head and key head before rope, or None.
        unit_norm: eps of a norm without weights behind rope, or None.
        value_scale: multiplies values before they are cached.
        sinks: the name of the sinks in the checkpoint, of how many heads, and this rank's first.
    """

    def __init__(
        self,
        heads: Heads,
        rope: Rope | None,
        *,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        unit_norm: float | None = None,
        query_scale: QueryScale | None = None,
        value_scale: float = 1.0,
        sinks: tuple[str, int, int] | None = None,
    ) -> None:
        self.heads = heads
        self.rope = rope
        self.q_norm: RMSNorm | None
        self.k_norm: RMSNorm | None
        self.q_norm, self.k_norm = norms or (None, None)
        self.unit_norm = unit_norm
        self.query_scale = query_scale
        self.value_scale = value_scale
        self.sinks_from = sinks
        self.sinks: Tensor | None = None
        self._qk_weight: Tensor | None = None  # one norm call for the heads of q and k
        self.kv_cache: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.allocate(dtype, device)
        if self.sinks_from is not None:
            self.sinks = torch.zeros(self.heads.query, dtype=torch.float32, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.slices()
        if self.sinks_from is not None and self.sinks is not None:
            name, count, first = self.sinks_from
            yield WeightSlice(name, (count,), (slice(first, first + self.heads.query),), self.sinks)

    def allocate_cache(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv_cache = allocate_kv_cache(num_pages, page_size, self.heads, dtype, device)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.heads.token_width * dtype.itemsize

    def pair_flops(self) -> int:
        return 2 * self.heads.query * (self.heads.qk_dim + self.heads.v_dim)

    def forward(self, *args: Any) -> Tensor:
        """qkv: [T, N D + K D + K Dv], batch -> [T, N Dv]."""
        qkv, batch, *extra = args
        if isinstance(batch.attention, PagedRows) and self._fits_one_launch():
            return self._attend(qkv, batch.attention)
        heads = self.heads
        n, k, d = heads.query, heads.kv, heads.qk_dim
        qk = split_heads(qkv[:, : (n + k) * d], n + k)
        value = split_heads(qkv[:, (n + k) * d :], k)
        qk = self.normed(qk, *extra)
        if self.rope is not None:
            qk = rotate(qk, *self.rope.at(batch), self.rope.interleaved)
        if self.unit_norm is not None:
            qk = unit_norm(qk, self.unit_norm)
        q, key = torch.split(qk, [n, k], dim=1)
        if self.query_scale is not None:
            q = (q * self.query_scale.at(batch.positions)).to(qkv.dtype)
        if self.value_scale != 1.0:
            value = value * self.value_scale
        write_kv(key, value, self.kv_cache, batch.attention)
        out = paged_attention(q, self.kv_cache, batch.attention, heads, self.sinks)
        return out.flatten(1)

    def normed(self, qk: Tensor, *extra: Any) -> Tensor:
        """Norms queries and keys. qk: [T, N + K, D]; extra: what `forward` was given behind."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        if self._qk_weight is None:
            n, k, d = self.heads.query, self.heads.kv, self.heads.qk_dim
            parts = (self.q_norm.weight.expand(n, d), self.k_norm.weight.expand(k, d))
            self._qk_weight = torch.cat(parts)
        return rms_norm(qk, self._qk_weight, self.q_norm.eps).to(qk.dtype)

    def _fits_one_launch(self) -> bool:
        """Whether the fused kernels of a GPU do all that this layer asks for."""
        heads, rope = self.heads, self.rope
        return (
            rope is not None
            and not rope.interleaved
            and heads.qk_dim == heads.v_dim
            and self.value_scale == 1.0
            and self.unit_norm is None
            and self.query_scale is None
        )

    def _attend(self, qkv: Tensor, rows: PagedRows) -> Tensor:
        """All of it, by the fused kernels of a GPU."""
        assert self.rope is not None
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        longest = rows.block_tables.shape[1] * rows.page_size
        turns = self.rope.tables(longest, qkv.device)
        out = attend(qkv, self.heads, norms, turns, self.kv_cache, rows, self.sinks)
        return out.flatten(1)


class HeadGate(Linear):
    """Scales each head's output by a number of its own, sigmoid(x w).

    Source: Step-3.5 (2026).
    """

    def forward(self, *args: Any) -> Tensor:
        """out: [T, N D], x: [T, hidden] -> [T, N D]."""
        out, x = args
        gate = torch.sigmoid(super().forward(x)).unsqueeze(-1)
        gated = split_heads(out, gate.shape[1]) * gate
        return gated.flatten(1)


class Attention(Block):
    """Grouped-query attention. Needs S over attn_dp, R over attn_tp; gives P over attn_tp.

    Query heads are sharded over attn_tp. So are KV heads; where attn_tp exceeds their number,
    neighbouring ranks hold copies of one.

    Args:
        rope: None for a layer without position embedding.
        v_head_dim: dims of a value; those of a key by default.
        span: the keys that a query sees.
        bias: a bias on q, k and v.
        output_bias: a bias on the output projection; held by one rank of the group.
        qk_norm: RMSNorm on each q and k head before rope, with this eps; None for none.
        zero_centred: whether the checkpoint holds those norms' weights less one.
        unit_norm: a norm without weights on each q and k head behind rope, with this eps.
        query_scale, value_scale, has_sinks: as of `AttentionCore`.
        has_gate: scales each head's output by a number that a projection of the input gives.

    Raises:
        ConfigError: if attn_tp does not fit the heads and the KV heads, or the latter do not divide
            the former.
    """

    def __init__(
        self,
        seat: Seat,
        name: str,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Rope | None,
        v_head_dim: int | None = None,
        span: Span = CAUSAL,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm: float | None = None,
        zero_centred: bool = False,
        unit_norm: float | None = None,
        query_scale: QueryScale | None = None,
        value_scale: float = 1.0,
        has_sinks: bool = False,
        has_gate: bool = False,
        names: AttentionNames = NAMES,
    ) -> None:
        mesh = seat.mesh
        first, stop = seat.shard(num_heads, mesh.attn_tp, "attention heads")
        kv_first, kv_stop = kv_shard(seat, num_kv_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(f"{name}: {num_heads} heads on {num_kv_heads} KV heads cannot be")
        v_dim = v_head_dim or head_dim
        heads = Heads(
            query=stop - first,
            kv=kv_stop - kv_first,
            qk_dim=head_dim,
            v_dim=v_dim,
            scale=head_dim**-0.5,
            span=span,
        )
        parts = [
            (names.q, num_heads, first, stop, head_dim),
            (names.k, num_kv_heads, kv_first, kv_stop, head_dim),
            (names.v, num_kv_heads, kv_first, kv_stop, v_dim),
        ]
        self.qkv = Linear(projections(name, parts), hidden_size, bias=bias)
        norms = None
        if qk_norm is not None:
            q_norm, k_norm = (
                RMSNorm(f"{name}.{which}", head_dim, qk_norm, zero_centred)
                for which in (names.q_norm, names.k_norm)
            )
            norms = q_norm, k_norm
        self.core = AttentionCore(
            heads,
            rope,
            norms=norms,
            unit_norm=unit_norm,
            query_scale=query_scale,
            value_scale=value_scale,
            sinks=(f"{name}.{names.sinks}", num_heads, first) if has_sinks else None,
        )
        gate = Part(f"{name}.{names.gate}", num_heads, first, stop)
        self.gate = HeadGate([gate], hidden_size) if has_gate else None
        self.output = head_output(
            seat,
            f"{name}.{names.output}",
            hidden_size,
            (first, stop),
            num_heads,
            v_dim,
            output_bias,
        )
        self.spec = BlockSpec(name=name, kind="attention", variants=(own_rows(mesh),))

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        out = self.core(self.qkv(x), batch)
        return self.output(out if self.gate is None else self.gate(out, x))


def own_rows(mesh: Mesh) -> Variant:
    """How attention runs: each group on its own requests' rows, heads sharded within it."""
    needs = row_sharded(len(mesh.attn_dp), len(mesh.axes))
    return Variant(needs, needs.put(Letter.P, mesh.attn_tp))


def projections(block: str, parts: list[tuple[str, int, int, int, int]]) -> list[Part]:
    """The parts of a projection to heads.

    parts: of each kind of head its name in the checkpoint, how many there are, the first and the
    last but one of this rank, and the dims of one. Neighbours of one name are one matrix.
    """
    sizes: dict[str, int] = {}
    for name, count, _, _, dim in parts:
        sizes[name] = sizes.get(name, 0) + count * dim
    found, at = [], dict.fromkeys(sizes, 0)
    for name, count, first, stop, dim in parts:
        begin = at[name]
        found.append(Part(f"{block}.{name}", sizes[name], begin + first * dim, begin + stop * dim))
        at[name] += count * dim
    return found


def head_output(
    seat: Seat,
    name: str,
    hidden_size: int,
    heads: tuple[int, int],
    num_heads: int,
    dim: int,
    bias: bool = False,
) -> RowLinear:
    """The output projection of this rank's heads [first, stop), an addend over attn_tp."""
    return RowLinear(
        name,
        hidden_size,
        num_heads * dim,
        columns=(heads[0] * dim, heads[1] * dim),
        bias=bias,
        bias_here=seat.index(seat.mesh.attn_tp) == 0,
    )


def kv_shard(seat: Seat, num_kv_heads: int) -> tuple[int, int]:
    """This rank's [start, stop) of the KV heads; copies where attn_tp exceeds their number.

    Raises:
        ConfigError: if neither divides the other.
    """
    ways = seat.mesh.size_of(seat.mesh.attn_tp)
    if ways <= num_kv_heads:
        return seat.shard(num_kv_heads, seat.mesh.attn_tp, "KV heads")
    if ways % num_kv_heads:
        flags = seat.mesh.parallelism.flags
        raise ConfigError(f"{flags}: attn_tp={ways} is no multiple of {num_kv_heads} KV heads")
    head = seat.index(seat.mesh.attn_tp) // (ways // num_kv_heads)
    return head, head + 1
