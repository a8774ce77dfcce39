"""Attention whose QK norm runs over all heads at once, which spans the ranks that share them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.attention import NAMES, Attention, AttentionCore, AttentionNames, kv_shard
from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Inner
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Part
from isomoe.blocks.rope import Rope
from isomoe.kernels import Heads, split_heads
from isomoe.layout import Letter, Move, Op, Seat, row_sharded


class SquareSums(Leaf):
    """What this rank's heads add to the squares of a row's queries, and of its keys.

    Args:
        parts: which of the norms' weights are this rank's.
    """

    def __init__(self, heads: Heads, parts: tuple[Part, Part]) -> None:
        self.heads, self.parts = heads, parts

    def forward(self, *args: Any) -> Tensor:
        """qkv: [T, N D + K D + K Dv] -> [T, 2] fp32: of queries, of keys."""
        (qkv,) = args
        heads = self.heads
        sizes = [heads.query * heads.qk_dim, heads.kv * heads.qk_dim]
        q, k, _ = torch.split(qkv.float(), [*sizes, qkv.shape[1] - sum(sizes)], dim=1)
        return torch.stack((q.square().sum(-1), k.square().sum(-1)), -1)


class WideNormCore(AttentionCore):
    """`AttentionCore` with RMSNorm over the whole width of queries, and of keys.

    Args:
        parts: the weights of queries and of keys, and which are this rank's.
        copies: neighbouring ranks that hold the same KV heads.
    """

    def __init__(
        self,
        core: AttentionCore,
        parts: tuple[Part, Part],
        eps: float,
        copies: int,
    ) -> None:
        super().__init__(core.heads, core.rope)
        self.parts = parts
        self.eps = eps
        self.copies = copies
        self.weights: tuple[Tensor, Tensor]

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        q, k = (torch.ones(part.rows, dtype=dtype, device=device) for part in self.parts)
        self.weights = q, k

    def slices(self) -> Iterator[WeightSlice]:
        for part, weight in zip(self.parts, self.weights, strict=True):
            here = (slice(part.start, part.stop),)
            yield WeightSlice(f"{part.source}.weight", (part.size,), here, weight)

    def normed(self, qk: Tensor, *extra: Any) -> Tensor:
        """qk: [T, N + K, D]; then what `SquareSums` gave on every rank: [T, ranks * 2]."""
        (gathered,) = extra
        split = zip(
            torch.split(qk.flatten(1), [part.rows for part in self.parts], dim=1),
            self.totals(gathered).unbind(-1),
            self.parts,
            self.weights,
            strict=True,
        )
        rows = [
            (x * torch.rsqrt(total / part.size + self.eps).unsqueeze(1)).to(x.dtype) * weight
            for x, total, part, weight in split
        ]
        return torch.cat(rows, 1).view(qk.shape)

    def totals(self, gathered: Tensor) -> Tensor:
        """The sums over all heads: [T, ranks * 2f] -> [T, 2f]. Copies of a KV head count once."""
        ranks = self.parts[0].size // self.parts[0].rows
        each = split_heads(gathered, ranks)
        q, k = each.chunk(2, dim=-1)
        return torch.cat((q.sum(1), k[:, :: self.copies].sum(1)), -1)

    def _fits_one_launch(self) -> bool:
        return False


class WideNormAttention(Attention):
    """Grouped-query attention with QK norm over the whole width, before rope.

    Its one sum inside: each rank's squares are gathered over attn_tp and added in rank order, so
    that all ranks have the same bits.

    Source: MiniMax-M2 (2025).

    Args:
        qk_norm: eps of the norm.
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
        qk_norm: float,
        names: AttentionNames = NAMES,
    ) -> None:
        super().__init__(
            seat,
            name,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            names=names,
        )
        mesh, d = seat.mesh, head_dim
        first, stop = seat.shard(num_heads, mesh.attn_tp, "attention heads")
        kv_first, kv_stop = kv_shard(seat, num_kv_heads)
        parts = (
            Part(f"{name}.{names.q_norm}", num_heads * d, first * d, stop * d),
            Part(f"{name}.{names.k_norm}", num_kv_heads * d, kv_first * d, kv_stop * d),
        )
        self.squares = SquareSums(self.core.heads, parts)
        copies = max(1, mesh.size_of(mesh.attn_tp) // num_kv_heads)
        self.core: AttentionCore = WideNormCore(self.core, parts, qk_norm, copies)
        if mesh.attn_tp:
            here = row_sharded(len(mesh.attn_dp), len(mesh.axes))
            shared = here.put(Letter.C, mesh.attn_tp)
            gather = Move(Op.ALL_GATHER, mesh.attn_tp, shared, here)
            variants = tuple(replace(one, inner=(gather,)) for one in self.spec.variants)
            self.spec = replace(self.spec, variants=variants)

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        qkv = self.qkv(x)
        parts = inner.collect(self.name, self.squares(qkv))
        return self.output(self.core(qkv, batch, parts))
