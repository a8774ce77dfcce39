"""Routed experts.  T rows, E experts, L experts of this rank, K per token, I their width here."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, rowwise_variants
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Router
from isomoe.errors import ConfigError
from isomoe.kernels import (
    PackedExperts,
    fused_experts,
    pack_experts,
    packed_experts,
    packs,
    route,
)
from isomoe.layout import BlockSpec, Seat


class ExpertWeights(Leaf):
    """The gated MLPs of this rank's experts, each a shard of its width.

    Attributes:
        owned: [start, stop) of the experts.
        width: [start, stop) of each expert's columns.
    """

    def __init__(
        self,
        name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        owned: tuple[int, int],
        width: tuple[int, int],
    ) -> None:
        self.name = name
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.owned = owned
        self.width = width
        self.gate_up: Tensor
        self.down: Tensor
        self.packed: PackedExperts | None = None

    def pack(self) -> None:
        if packs(self.gate_up):
            self.packed = pack_experts(self.gate_up, self.down)
            del self.gate_up, self.down

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        experts, width = self.owned[1] - self.owned[0], self.width[1] - self.width[0]
        hidden = self.hidden_size
        self.gate_up = torch.zeros(experts, 2 * width, hidden, dtype=dtype, device=device)
        self.down = torch.zeros(experts, hidden, width, dtype=dtype, device=device)

    def slices(self) -> Iterator[WeightSlice]:
        mine, full = slice(*self.width), (self.intermediate_size, self.hidden_size)
        everything = slice(None)
        for expert in range(self.num_experts):
            here = self.owned[0] <= expert < self.owned[1]
            local = expert - self.owned[0] if here else 0
            gate, up = self.gate_up[local].chunk(2)
            for which, shape, index, out in (
                ("gate", full, (mine, everything), gate),
                ("up", full, (mine, everything), up),
                ("down", full[::-1], (everything, mine), self.down[local]),
            ):
                name = f"{self.name}.{expert}.{which}_proj.weight"
                kept = WeightSlice(name, shape, index, out)
                yield kept if here else kept.nothing()

    def forward(self, *args: Any) -> Tensor:
        """x: [T, hidden], local ids: [T, K] (-1: not here), weights: [T, K] -> [T, hidden].

        fp32 on a CPU, in x's dtype on a GPU.
        """
        x, local_ids, topk_weights = args
        if self.packed is not None:
            return packed_experts(x, self.packed, local_ids, topk_weights)
        return fused_experts(x, self.gate_up, self.down, local_ids, topk_weights)


class SparseMoe(Block):
    """Softmax top-k routing over experts sharded over moe_ep, their width over moe_tp.

    Needs R everywhere, gives P everywhere: each rank adds what its experts' shards contribute.
    Padding rows are routed nowhere.

    Args:
        renormalize: divide the k weights by their sum (`norm_topk_prob`).

    Raises:
        ConfigError: if ep_size does not divide the experts, or moe_tp their width.
    """

    def __init__(
        self,
        seat: Seat,
        name: str,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"{name}: {top_k} experts a token of {num_experts} cannot be")
        mesh = seat.mesh
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.owned = seat.shard(num_experts, mesh.moe_ep, "experts")
        width = seat.shard(intermediate_size, mesh.moe_tp, "columns of an expert")
        self.router = Router(f"{name}.gate", num_experts, hidden_size)
        self.experts = ExpertWeights(
            f"{name}.experts", num_experts, hidden_size, intermediate_size, self.owned, width
        )
        self.spec = BlockSpec(
            name=f"{name}.experts", kind="experts", variants=rowwise_variants(mesh, mesh.all)
        )

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        topk_weights, local_ids = self.route(self.router(x), batch)
        return self.experts(x, local_ids, topk_weights)

    def route(self, router_logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weights, and ids among this rank's experts: -1 for other ranks' and for padding rows."""
        real = batch.real_rows(router_logits.device)
        return route(router_logits, self.top_k, self.renormalize, *self.owned, real)
