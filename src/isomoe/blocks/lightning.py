"""Linear attention with a decaying state, sharded by heads.  T rows, N heads of this rank, D dims.

Source: Lightning Attention-2 (2024); Ring-linear technical report (2025).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.attention import AttentionNames, head_output, own_rows, projections
from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner
from isomoe.blocks.cache import Memory
from isomoe.blocks.leaf import WeightSlice
from isomoe.blocks.linear import Linear, Part
from isomoe.blocks.norm import RMSNorm
from isomoe.blocks.rope import Rope
from isomoe.errors import ConfigError
from isomoe.kernels import lightning_attention, rotate, split_heads
from isomoe.layout import BlockSpec, Seat


def slopes(num_heads: int) -> list[float]:
    """How fast the state of each head decays, before a layer's own factor.

    Source: Press et al., ALiBi (2021): a geometric series for powers of two; for other numbers
    that of the next smaller one, then every other member of that of the next larger one.
    """
    whole = 2 ** int(math.log2(num_heads))
    series = [2 ** (-8 * (head + 1) / whole) for head in range(whole)]
    between = [2 ** (-8 * (head + 1) / (2 * whole)) for head in range(0, 2 * whole, 2)]
    return series + between[: num_heads - whole]


class LightningCore(Memory):
    """What lies between the projections: QK norm, rope, and the recurrence, all in fp32.

    Args:
        decay: of each of this rank's heads.
    """

    def __init__(
        self,
        head_dim: int,
        rope: Rope | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        decay: Sequence[float],
    ) -> None:
        self.head_dim, self.rope = head_dim, rope
        self.q_norm: RMSNorm | None
        self.k_norm: RMSNorm | None
        self.q_norm, self.k_norm = norms or (None, None)
        self.decay = torch.tensor(decay)
        self.states: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.allocate(torch.float32, device)
        self.decay = self.decay.to(device)

    def slices(self) -> Iterator[WeightSlice]:
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.slices()

    def allocate_states(self, num_slots: int, device: torch.device) -> None:
        shape = (num_slots, len(self.decay), self.head_dim, self.head_dim)
        self.states = torch.zeros(shape, dtype=torch.float32, device=device)

    def state_bytes(self) -> int:
        return 4 * len(self.decay) * self.head_dim**2

    def forward(self, *args: Any) -> Tensor:
        """qkv: [T, 3 N D], batch -> [T, N D]."""
        qkv, batch = args
        heads = split_heads(qkv.float(), 3 * len(self.decay))
        q, k, v = heads.chunk(3, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            turns = *self.rope.at(batch), self.rope.interleaved
            q, k = rotate(q, *turns), rotate(k, *turns)
        out = lightning_attention(q, k, v, self.states, self.decay, batch.attention)
        return out.flatten(1).to(qkv.dtype)


class GatedGroupNorm(Linear):
    """RMSNorm over groups of neighbouring heads, then a gate of its own for every feature.

    Args:
        norm: the weights' name, their full number, and this rank's columns.
        groups: of this rank.
    """

    def __init__(
        self,
        gate: Part,
        hidden_size: int,
        norm: tuple[str, int, tuple[int, int]],
        groups: int,
        eps: float,
    ) -> None:
        super().__init__([gate], hidden_size)
        self.norm_from, self.groups, self.eps = norm, groups, eps
        self.norm_weight: Tensor

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        super().allocate(dtype, device)
        _, _, (first, stop) = self.norm_from
        self.norm_weight = torch.ones(stop - first, dtype=dtype, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        yield from super().slices()
        name, size, columns = self.norm_from
        yield WeightSlice(f"{name}.weight", (size,), (slice(*columns),), self.norm_weight)

    def forward(self, *args: Any) -> Tensor:
        """out: [T, N D], x: [T, hidden] -> [T, N D]."""
        out, x = args
        wide = split_heads(out.float(), self.groups)
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        gate = torch.sigmoid(super().forward(x))
        gated: Tensor = unit.flatten(1).to(out.dtype) * self.norm_weight * gate
        return gated


class LightningAttention(Block):
    """Linear attention. Needs S over attn_dp, R over attn_tp; gives P over attn_tp.

    A request has a state [heads, D, D] fp32 in place of a KV cache.

    Args:
        decay_factor: the layer's own, multiplies the slopes of the heads.
        qk_norm: RMSNorm on each q and k head before rope; None for none.
        norm_groups: groups of heads over which the output is normed, of the whole layer.

    Raises:
        ConfigError: if attn_tp does not divide both the heads and the groups of the norm.
    """

    def __init__(
        self,
        seat: Seat,
        name: str,
        *,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        rope: Rope | None,
        decay_factor: float,
        norm_groups: int,
        eps: float,
        names: AttentionNames,
        qk_norm: float | None = None,
    ) -> None:
        axes, d = seat.mesh.attn_tp, head_dim
        first, stop = seat.shard(num_heads, axes, "attention heads")
        if num_heads % norm_groups:
            raise ConfigError(f"{name}: {norm_groups} groups of {num_heads} heads cannot be")
        groups = seat.shard(norm_groups, axes, "groups of the linear attention's norm")
        here = (first, stop, d)
        self.qkv = Linear(
            projections(name, [(part, num_heads, *here) for part in (names.q, names.k, names.v)]),
            hidden_size,
        )
        norms = None
        if qk_norm is not None:
            norms = (
                RMSNorm(f"{name}.{names.q_norm}", d, qk_norm),
                RMSNorm(f"{name}.{names.k_norm}", d, qk_norm),
            )
        decay = [slope * decay_factor for slope in slopes(num_heads)[first:stop]]
        self.core = LightningCore(d, rope, norms, decay)
        columns = (first * d, stop * d)
        self.gate = GatedGroupNorm(
            Part(f"{name}.{names.gate}", num_heads * d, *columns),
            hidden_size,
            (f"{name}.g_norm", num_heads * d, columns),
            groups[1] - groups[0],
            eps,
        )
        self.output = head_output(
            seat, f"{name}.{names.output}", hidden_size, (first, stop), num_heads, d
        )
        self.spec = BlockSpec(name=name, kind="attention", variants=(own_rows(seat.mesh),))

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        return self.output(self.gate(self.core(self.qkv(x), batch), x))
