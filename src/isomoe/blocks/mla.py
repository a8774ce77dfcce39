"""Multi-head latent attention, sharded by heads.

T rows, N heads of this rank, n, r and v dims of a head that do not turn, that turn, and of a
value, c and l dims of the latents of keys and values, and of queries
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.attention import head_output, own_rows
from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner
from isomoe.blocks.cache import Memory
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Linear, Part
from isomoe.blocks.norm import RMSNorm
from isomoe.blocks.rope import Rope
from isomoe.kernels import Heads, latent_attention, rotate, split_heads, write_kv
from isomoe.layout import BlockSpec, Seat


class LowRankQuery(Leaf):
    """Queries of this rank's heads, by way of a normed latent.

    Args:
        latent: columns of the input that hold the latent.
    """

    def __init__(self, norm: RMSNorm, up: Linear, latent: int) -> None:
        self.norm, self.up, self.latent = norm, up, latent

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.norm.allocate(dtype, device)
        self.up.allocate(dtype, device)

    def slices(self) -> Iterator[WeightSlice]:
        yield from self.norm.slices()
        yield from self.up.slices()

    def pack(self) -> None:
        self.up.pack()

    def forward(self, *args: Any) -> Tensor:
        """low: [T, l + c + r] -> [T, N (n + r)]."""
        (low,) = args
        return self.up(self.norm(low[:, : self.latent]))


class LatentCore(Memory):
    """What lies between the projections: norm, rope, cache write, attention on latents.

    Args:
        heads: those of the expanded form: N query and KV heads of n + r and v dims.
        norm: of the latent.
        up: the name of the up-projection to keys and values, how many heads it has, and this
            rank's first.
        skip: columns of the low-rank input before the latent.
    """

    def __init__(
        self, heads: Heads, rope: Rope, norm: RMSNorm, up: tuple[str, int, int], skip: int
    ) -> None:
        self.heads, self.rope, self.norm = heads, rope, norm
        self.up_from, self.skip = up, skip
        self.up: Tensor
        self.kv_cache: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.norm.allocate(dtype, device)
        width = self._plain_dim + self.heads.v_dim
        self.up = torch.zeros(self.heads.kv, width, self.norm.size, dtype=dtype, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        yield from self.norm.slices()
        name, count, first = self.up_from
        _, width, latent = self.up.shape
        rows = slice(first * width, (first + self.heads.kv) * width)
        yield WeightSlice(
            f"{name}.weight", (count * width, latent), (rows, slice(None)), self.up.flatten(0, 1)
        )

    def allocate_cache(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages, page_size, self.norm.size + self.rope.dim)
        self.kv_cache = torch.zeros(shape, dtype=dtype, device=device)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return (self.norm.size + self.rope.dim) * dtype.itemsize

    def pair_flops(self) -> int:
        return 2 * self.heads.query * (2 * self.norm.size + self.rope.dim)

    def forward(self, *args: Any) -> Tensor:
        """q: [T, N (n + r)], low: [T, l + c + r], batch -> [T, N v]."""
        q, low, batch = args
        heads, plain = self.heads, self._plain_dim
        q = split_heads(q, heads.query)
        latent = self.norm(low[:, self.skip : self.skip + self.norm.size])
        turned = low[:, self.skip + self.norm.size :].unsqueeze(1)
        turns = *self.rope.at(batch), self.rope.interleaved
        q = torch.cat((q[..., :plain], rotate(q[..., plain:], *turns)), -1)
        key = torch.cat((latent, rotate(turned, *turns)[:, 0]), -1)
        write_kv(key.unsqueeze(1), None, self.kv_cache, batch.attention)
        return latent_attention(q, self.kv_cache, batch.attention, self.up, heads).flatten(1)

    @property
    def _plain_dim(self) -> int:
        return self.heads.qk_dim - self.rope.dim


class LatentAttention(Block):
    """Multi-head latent attention. Needs S over attn_dp, R over attn_tp; gives P over attn_tp.

    Heads are sharded over attn_tp; the down-projections and the cache, which holds latents, are
    the same on all ranks of the group.

    Source: DeepSeek-V2 (2024), section 2.1.

    Args:
        q_latent: dims of the queries' latent; None where queries are projected directly.
        kv_latent: dims of the latent of keys and values.
        head_dim: dims of a head that do not turn; `rope` has those that do.
        scale: multiplies the scores; (head_dim + rope.dim) ** -0.5 by default.
        eps: of the norms of both latents.
        output: the output projection's name.

    Raises:
        ConfigError: if attn_tp does not divide the heads.
    """

    def __init__(
        self,
        seat: Seat,
        name: str,
        *,
        hidden_size: int,
        num_heads: int,
        q_latent: int | None,
        kv_latent: int,
        head_dim: int,
        v_head_dim: int,
        rope: Rope,
        eps: float,
        scale: float | None = None,
        output: str = "o_proj",
    ) -> None:
        first, stop = seat.shard(num_heads, seat.mesh.attn_tp, "attention heads")
        width = head_dim + rope.dim
        low = [Part(f"{name}.kv_a_proj_with_mqa", size := kv_latent + rope.dim, 0, size)]
        if q_latent:
            low.insert(0, Part(f"{name}.q_a_proj", q_latent, 0, q_latent))
        self.low = Linear(low, hidden_size)
        query = f"{name}.q_b_proj" if q_latent else f"{name}.q_proj"
        up = Linear(
            [Part(query, num_heads * width, first * width, stop * width)], q_latent or hidden_size
        )
        self.query: Leaf = up
        if q_latent:
            self.query = LowRankQuery(RMSNorm(f"{name}.q_a_layernorm", q_latent, eps), up, q_latent)
        heads = Heads(
            query=stop - first,
            kv=stop - first,
            qk_dim=width,
            v_dim=v_head_dim,
            scale=width**-0.5 if scale is None else scale,
        )
        norm = RMSNorm(f"{name}.kv_a_layernorm", kv_latent, eps)
        self.core = LatentCore(
            heads, rope, norm, (f"{name}.kv_b_proj", num_heads, first), q_latent or 0
        )
        self.output = head_output(
            seat, f"{name}.{output}", hidden_size, (first, stop), num_heads, v_head_dim
        )
        self.spec = BlockSpec(name=name, kind="attention", variants=(own_rows(seat.mesh),))

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        low = self.low(x)
        q = self.query(low if isinstance(self.query, LowRankQuery) else x)
        return self.output(self.core(q, low, batch))
