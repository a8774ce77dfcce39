"""Routed experts.  T rows, E experts, L experts of this rank, K per token, I their width here."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner, rowwise_variants
from isomoe.blocks.expert_names import PER_EXPERT, ExpertNames, ExpertShard
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Router
from isomoe.errors import ConfigError
from isomoe.kernels import (
    SWIGLU,
    Activation,
    ExpertForm,
    PackedExperts,
    Routing,
    fused_experts,
    pack_experts,
    packed_experts,
    packs,
    route,
)
from isomoe.layout import BlockSpec, Seat


class ExpertWeights(Leaf):
    """The gated MLPs of this rank's experts, each a shard of its width.

    Args:
        names: how the checkpoint stores them.
        bias_here: whether this rank adds the bias of the down projections, if they have one. One
            rank of those that share an expert must, and only one.

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
        names: ExpertNames = PER_EXPERT,
        form: ExpertForm | None = None,
        bias_here: bool = True,
    ) -> None:
        self.name = name
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.owned = owned
        self.width = width
        self.names = names
        self.form = form or ExpertForm()
        self.bias_here = bias_here
        self.gate_up: Tensor
        self.down: Tensor
        self.packed: PackedExperts | None = None

    def pack(self) -> None:
        if packs(self.gate_up):
            self.packed = pack_experts(self.gate_up, self.down, joined=self.form.is_plain)
            del self.gate_up, self.down

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        experts, width = self.owned[1] - self.owned[0], self.width[1] - self.width[0]
        hidden = self.hidden_size
        self.gate_up = torch.zeros(experts, 2 * width, hidden, dtype=dtype, device=device)
        self.down = torch.zeros(experts, hidden, width, dtype=dtype, device=device)
        if self.names.has_bias:
            self.form = replace(
                self.form,
                gate_up_bias=torch.zeros(experts, 2 * width, dtype=dtype, device=device),
                down_bias=torch.zeros(experts, hidden, dtype=dtype, device=device),
            )

    def slices(self) -> Iterator[WeightSlice]:
        shard = ExpertShard(
            name=self.name,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            owned=self.owned,
            width=self.width,
            gate_up=self.gate_up,
            down=self.down,
            gate_up_bias=self.form.gate_up_bias,
            down_bias=self.form.down_bias,
            bias_here=self.bias_here,
        )
        return self.names.slices(shard)

    def forward(self, *args: Any) -> Tensor:
        """x: [T, hidden], local ids: [T, K] (-1: not here), weights: [T, K] -> [T, hidden].

        fp32 on a CPU, in x's dtype on a GPU.
        """
        x, local_ids, topk_weights = args
        if self.packed is not None:
            return packed_experts(x, self.packed, local_ids, topk_weights, self.form)
        return fused_experts(x, self.gate_up, self.down, local_ids, topk_weights, self.form)


class SparseMoe(Block):
    """Routed experts sharded over moe_ep, their width over moe_tp.

    Needs R everywhere, gives P everywhere: each rank adds what its experts' shards contribute.
    Padding rows are routed nowhere.

    Args:
        routing: how experts are chosen and weighed.
        router: the router's name under `name`.
        correction: the name, under `name`, of the bias that only the choice of experts sees.
        router_fp32: the router is computed in fp32, from fp32 weights.
        router_bias: whether the router has a bias.
        experts: the experts' name under `name`, empty for `name` itself.
        names: how the checkpoint stores them.
        scales_input: a row's weight multiplies what an expert takes, not what it gives.

    Raises:
        ConfigError: if ep_size does not divide the experts, or moe_tp their width; or if so many
            experts cannot be chosen so.
    """

    def __init__(
        self,
        seat: Seat,
        name: str,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        routing: Routing,
        router: str = "gate",
        correction: str | None = None,
        router_fp32: bool = False,
        router_bias: bool = False,
        experts: str = "experts",
        names: ExpertNames = PER_EXPERT,
        activation: Activation = SWIGLU,
        scales_input: bool = False,
    ) -> None:
        _check(name, routing, num_experts)
        mesh = seat.mesh
        self.num_experts = num_experts
        self.routing = routing
        self.owned = seat.shard(num_experts, mesh.moe_ep, "experts")
        width = seat.shard(intermediate_size, mesh.moe_tp, "columns of an expert")
        self.router = Router(
            f"{name}.{router}",
            num_experts,
            hidden_size,
            fp32=router_fp32,
            bias=router_bias,
            correction=correction and f"{name}.{correction}",
        )
        self.experts = ExpertWeights(
            f"{name}.{experts}".removesuffix("."),
            num_experts,
            hidden_size,
            intermediate_size,
            self.owned,
            width,
            names,
            ExpertForm(activation=activation, scales_input=scales_input),
            bias_here=seat.index(mesh.moe_tp) == 0,
        )
        self.spec = BlockSpec(
            name=self.experts.name, kind="experts", variants=rowwise_variants(mesh, mesh.all)
        )

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        topk_weights, local_ids = self.route(self.router(x), batch)
        return self.experts(x, local_ids, topk_weights)

    def route(self, router_logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weights, and ids among this rank's experts: -1 for other ranks' and for padding rows."""
        real = batch.real_rows(router_logits.device)
        return route(router_logits, self.routing, self.router.correction, *self.owned, real)


def _check(name: str, routing: Routing, num_experts: int) -> None:
    """Raises ConfigError if `routing` cannot be."""
    top_k, groups, kept = routing.top_k, routing.num_groups, routing.kept_groups
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"{name}: {top_k} experts a token of {num_experts} cannot be")
    if groups < 1 or num_experts % groups:
        raise ConfigError(f"{name}: {num_experts} experts in {groups} equal groups cannot be")
    size = num_experts // groups
    if groups > 1 and not (1 <= kept <= groups and top_k <= kept * size):
        raise ConfigError(
            f"{name}: {top_k} experts a token of the best {kept} of {groups} groups of {size} "
            "cannot be"
        )
    if groups > 1 and size == 1 and routing.group_score == "top2":
        raise ConfigError(f"{name}: a group of one expert has no two best")
