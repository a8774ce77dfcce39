"""Attention, sharded by heads.  T rows, N heads and K KV heads of this rank, D head dim."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Linear, Part, RowLinear
from isomoe.blocks.norm import RMSNorm
from isomoe.errors import ConfigError
from isomoe.kernels import (
    AttentionBatch,
    PagedRows,
    allocate_kv_cache,
    attend,
    paged_attention,
    rms_norm,
    rope_table,
    rotate,
    write_kv,
)
from isomoe.layout import BlockSpec, Letter, Mesh, Seat, Variant, row_sharded


class Rope:
    """Rotary position embedding on whole heads, half style; one table for all layers.

    Source: Su et al., RoFormer (2021), in the layout of GPT-NeoX.
    """

    def __init__(self, head_dim: int, theta: float, max_positions: int) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.max_positions = max_positions
        self._tables: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Batch, tuple[Tensor, Tensor]] | None = None

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions, each [positions, head dim] fp32; made once."""
        if self._tables is None:
            self._tables = rope_table(self.max_positions, self.head_dim, self.theta, device)
        return self._tables

    def at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin of the batch's positions, looked up once a step."""
        if self._last is None or self._last[0] is not batch:
            cos, sin = self.tables(batch.positions.device)
            self._last = (batch, (cos[batch.positions], sin[batch.positions]))
        return self._last[1]


class AttentionCore(Leaf):
    """What lies between the two projections: QK norm, rope, KV write, attention.

    Args:
        norm_names: the QK norms' names in the checkpoint, or None for a model without.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Rope,
        qk_norm: tuple[str, str, float] | None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope = rope
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            q_name, k_name, eps = qk_norm
            self.q_norm = RMSNorm(q_name, head_dim, eps)
            self.k_norm = RMSNorm(k_name, head_dim, eps)
        self._qk_weight: Tensor | None = None  # one norm call for the heads of q and k
        self.kv_cache: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.allocate(dtype, device)

    def slices(self) -> Iterator[WeightSlice]:
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.slices()

    def allocate_cache(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Makes this layer's KV cache."""
        self.kv_cache = allocate_kv_cache(
            num_pages, page_size, self.num_kv_heads, self.head_dim, dtype, device
        )

    def cache_bytes_per_page(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page of K and V."""
        return 2 * page_size * self.num_kv_heads * self.head_dim * dtype.itemsize

    def forward(self, *args: Any) -> Tensor:
        """qkv: [T, (N + 2K) D], batch -> [T, N D]."""
        qkv, batch = args
        if isinstance(batch.attention, PagedRows):
            out = self._attend(qkv, batch.attention)
        else:
            q = self._prepare(qkv, batch)
            out = paged_attention(q, self.kv_cache, batch.attention, self.head_dim**-0.5)
        return out.view(qkv.shape[0], self.num_heads * self.head_dim)

    def _prepare(self, qkv: Tensor, batch: Batch) -> Tensor:
        """Norms and turns queries and keys, and writes keys and values; the queries [T, N, D]."""
        assert isinstance(batch.attention, AttentionBatch)
        n, k, d = self.num_heads, self.num_kv_heads, self.head_dim
        heads = qkv.view(qkv.shape[0], n + 2 * k, d)
        qk, value = heads[:, : n + k], heads[:, n + k :]
        if self.q_norm is not None and self.k_norm is not None:
            if self._qk_weight is None:
                parts = (self.q_norm.weight.expand(n, d), self.k_norm.weight.expand(k, d))
                self._qk_weight = torch.cat(parts)
            qk = rms_norm(qk, self._qk_weight, self.q_norm.eps)
        q, key = torch.split(rotate(qk, *self.rope.at(batch)), [n, k], dim=1)
        write_kv(key, value, self.kv_cache, batch.attention)
        return q

    def _attend(self, qkv: Tensor, rows: PagedRows) -> Tensor:
        """All of it, by the kernels of a GPU."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        cos, sin = self.rope.tables(qkv.device)
        n, k, scale = self.num_heads, self.num_kv_heads, self.head_dim**-0.5
        return attend(qkv, n, k, norms, cos, sin, self.kv_cache, rows, scale)


class Attention(Block):
    """Grouped-query attention. Needs S over attn_dp, R over attn_tp; gives P over attn_tp.

    Query heads are sharded over attn_tp. So are KV heads; where attn_tp exceeds their number,
    neighbouring ranks hold copies of one.

    Args:
        bias: a bias on q, k and v.
        output_bias: a bias on the output projection; held by one rank of the group.
        qk_norm: RMSNorm on each q and k head before rope, with this eps; None for none.

    Raises:
        ConfigError: if attn_tp fits neither the heads nor the KV heads.
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
        rope: Rope,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm: float | None = None,
    ) -> None:
        mesh = seat.mesh
        first, stop = seat.shard(num_heads, mesh.attn_tp, "attention heads")
        kv_first, kv_stop = kv_shard(seat, num_kv_heads)
        d = head_dim
        self.qkv = Linear(
            [
                Part(f"{name}.q_proj", num_heads * d, first * d, stop * d),
                Part(f"{name}.k_proj", num_kv_heads * d, kv_first * d, kv_stop * d),
                Part(f"{name}.v_proj", num_kv_heads * d, kv_first * d, kv_stop * d),
            ],
            hidden_size,
            bias=bias,
        )
        norms = None if qk_norm is None else (f"{name}.q_norm", f"{name}.k_norm", qk_norm)
        self.core = AttentionCore(stop - first, kv_stop - kv_first, d, rope, norms)
        self.output = RowLinear(
            f"{name}.o_proj",
            hidden_size,
            num_heads * d,
            columns=(first * d, stop * d),
            bias=output_bias,
            bias_here=seat.index(mesh.attn_tp) == 0,
        )
        self.spec = BlockSpec(name=name, kind="attention", variants=(_own_rows(mesh),))

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        return self.output(self.core(self.qkv(x), batch))


def _own_rows(mesh: Mesh) -> Variant:
    needs = row_sharded(len(mesh.attn_dp), len(mesh.axes))
    return Variant(needs, needs.put(Letter.P, mesh.attn_tp))


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
