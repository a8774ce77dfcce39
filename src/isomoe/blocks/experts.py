"""Routed experts.  T rows, E experts, L experts of this rank, K per token, I their width here."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner, rowwise_variants
from isomoe.blocks.expert_load import ExpertLoad
from isomoe.blocks.expert_names import PER_EXPERT, ExpertNames, ExpertShard
from isomoe.blocks.leaf import Fp8Part, Leaf, WeightSlice
from isomoe.blocks.linear import Router
from isomoe.blocks.ownership import Ownership
from isomoe.blocks.wire import Pack, Unpack
from isomoe.errors import ConfigError
from isomoe.kernels import (
    MIN_FP8_BLOCK,
    MIN_FP8_RUN,
    SWIGLU,
    Activation,
    BlockFp8,
    ExpertForm,
    ExpertMatrices,
    Fp8Rows,
    PackedExperts,
    Routing,
    fused_experts,
    on_gpu,
    pack_experts,
    packed_experts,
    packs,
    plain_matrices,
    route,
)
from isomoe.layout import (
    NVFP4_RUN,
    A2ABackend,
    BlockSpec,
    Bundle,
    ExpertMap,
    Letter,
    Mesh,
    Move,
    Op,
    Seat,
    Variant,
    WireFormat,
    row_sharded,
    slots_per_rank,
)


class ExpertWeights(Leaf):
    """The gated MLPs of this rank's experts, each a shard of its width.

    Args:
        names: how the checkpoint stores them.
        bias_here: whether this rank adds the bias of the down projections, if they have one. One
            rank of those that share an expert must, and only one.

    Attributes:
        held: the model's expert in each slot of this rank.
        width: [start, stop) of each expert's columns.
    """

    def __init__(
        self,
        name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        held: tuple[int, ...],
        width: tuple[int, int],
        names: ExpertNames = PER_EXPERT,
        form: ExpertForm | None = None,
        bias_here: bool = True,
    ) -> None:
        self.name = name
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.held = held
        self.width = width
        self.names = names
        self.form = form or ExpertForm()
        self.bias_here = bias_here
        self.block: int | None = None
        self.gate_up: ExpertMatrices
        self.down: ExpertMatrices
        self.packed: PackedExperts | None = None

    def lacks_for_fp8(self, block: int) -> str | None:
        """Why square blocks of such a size cannot be kept, on any rank; None if they can."""
        if block % MIN_FP8_BLOCK:
            return f"blocks of {block} x {block} are no multiples of {MIN_FP8_BLOCK}"
        width = self.width[1] - self.width[0]
        grain = self.names.grain(block, width, self.intermediate_size)
        if grain % MIN_FP8_RUN:
            return (
                f"shares of {width} of an expert's {self.intermediate_size} columns cut its blocks "
                f"into runs of {grain}, and kernels need multiples of {MIN_FP8_RUN} (a larger "
                "--ep-size cuts less)"
            )
        return None

    def pack(self) -> None:
        if isinstance(self.gate_up, BlockFp8) and on_gpu(self.gate_up.codes):
            return
        gate_up = plain_matrices(self.gate_up, self.dtype).flatten(1, -2)
        down = plain_matrices(self.down, self.dtype)
        if packs(gate_up):
            self.packed = pack_experts(gate_up, down, joined=self.form.is_plain)
            del self.gate_up, self.down
        else:
            self.gate_up, self.down = gate_up, down

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        experts, width = len(self.held), self.width[1] - self.width[0]
        hidden = self.hidden_size
        self.dtype = dtype
        if self.block is None:
            self.gate_up = torch.zeros(experts, 2 * width, hidden, dtype=dtype, device=device)
            self.down = torch.zeros(experts, hidden, width, dtype=dtype, device=device)
        else:
            grain = self.names.grain(self.block, width, self.intermediate_size)
            self.gate_up = BlockFp8.zeros(
                *(experts, 2, width, hidden),
                block=(grain, self.block),
                device=device,
                paired=True,
            )
            self.down = BlockFp8.zeros(
                *(experts, hidden, width), block=(self.block, grain), device=device
            )
        if self.names.has_bias:
            self.form = replace(
                self.form,
                gate_up_bias=torch.zeros(experts, 2 * width, dtype=dtype, device=device),
                down_bias=torch.zeros(experts, hidden, dtype=dtype, device=device),
            )

    def slices(self) -> Iterator[WeightSlice]:
        gate_up, down = self.gate_up, self.down
        if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
            assert isinstance(gate_up, Tensor)
            assert isinstance(down, Tensor)
            gate, up = gate_up.chunk(2, dim=1)
            yield from self._slices(gate, up, down, self.form)
            return
        assert self.block is not None
        (gate, up), (gate_by, up_by) = gate_up.codes.unbind(1), gate_up.scales.unbind(1)
        codes = Fp8Part(block=self.block, grain=gate_up.block[0], scales=False)
        for piece in self._slices(gate, up, down.codes, self.form):
            yield replace(piece, fp8=codes) if piece.out.dtype == gate.dtype else piece  # a bias
        for piece in self._slices(gate_by, up_by, down.scales, ExpertForm()):
            yield replace(piece, fp8=replace(codes, scales=True))

    def _slices(
        self, gate: Tensor, up: Tensor, down: Tensor, biases: ExpertForm
    ) -> Iterator[WeightSlice]:
        shard = ExpertShard(
            name=self.name,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            held=self.held,
            width=self.width,
            gate=gate,
            up=up,
            down=down,
            gate_up_bias=biases.gate_up_bias,
            down_bias=biases.down_bias,
            bias_here=self.bias_here,
        )
        return self.names.slices(shard)

    def forward(self, *args: Any) -> Tensor:
        """x: [T, hidden], local ids: [T, K] (-1: not here), weights: [T, K] -> [T, hidden].

        x may be in FP8. fp32 on a CPU, in x's dtype on a GPU.
        """
        x, local_ids, topk_weights = args
        if self.packed is not None:
            return packed_experts(x, self.packed, local_ids, topk_weights, self.form)
        return fused_experts(x, self.gate_up, self.down, local_ids, topk_weights, self.form)


class SparseMoe(Block):
    """Routed experts sharded over moe_ep, their width over moe_tp.

    There are three ways to bring rows and experts together; the layout says which are offered.

    - Gathered: needs R everywhere, gives P everywhere. Each rank routes all rows, and adds what its
      experts' shards contribute.
    - Gathered after routing: needs its own rows, packs them, and gathers them with their choice of
      experts. Gives P everywhere.
    - Exchanged: needs S over moe_ep. A row goes to the ranks of its experts alone, and what they
      make of it comes back: gives S there, and P over moe_tp.

    Where an expert has several copies, a row's number says which of them serves it, so that all
    ranks that must agree do. Padding rows are routed nowhere.

    Args:
        routing: how experts are chosen and weighed.
        router: the router's name under `name`.
        correction: the name, under `name`, of the bias that only the choice of experts sees.
        router_fp32: the router is computed in fp32, from fp32 weights.
        router_bias: whether the router has a bias.
        experts: the experts' name under `name`, empty for `name` itself.
        names: how the checkpoint stores them.
        scales_input: a row's weight multiplies what an expert takes, not what it gives.
        location: which rank holds which expert; None: in order, or the trivial placement.

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
        location: ExpertMap | None = None,
    ) -> None:
        _check(name, routing, num_experts)
        mesh = seat.mesh
        form = mesh.parallelism.moe_wire_format
        if form is WireFormat.NVFP4 and hidden_size % NVFP4_RUN:
            raise ConfigError(
                f"--moe-wire-format nvfp4: rows of {hidden_size} values do not split into runs of "
                f"{NVFP4_RUN}; fp8 would work"
            )
        self.num_experts = num_experts
        self.routing = routing
        redundant = mesh.parallelism.ep_num_redundant_experts
        if redundant:
            slots_per_rank(num_experts, redundant, mesh.parallelism.ep_size)
        self.ownership = Ownership(
            location or ExpertMap.trivial(num_experts, redundant),
            *seat.shard(num_experts + redundant, mesh.moe_ep, "experts"),
        )
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
            self.ownership.held,
            width,
            names,
            ExpertForm(activation=activation, scales_input=scales_input),
            bias_here=seat.index(mesh.moe_tp) == 0,
        )
        self.pack = Pack(form)
        self.unpack = Unpack(form)
        self.load: ExpertLoad | None = None
        self.spec = BlockSpec(
            name=self.experts.name, kind="experts", variants=_variants(mesh, routing)
        )

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        moves = inner.inner(self.name)
        logits = self.router(x)
        values: tuple[Tensor, ...] = self.pack.forward(x)
        if not moves:
            weights, slots = self.route(logits, batch)
            return self._served(values, slots, weights, x.dtype)
        weights, ids = self.choose(logits, batch, moves[0].before.row_axes)
        rows = (values, ids.int(), weights)
        values, arrived, weights = inner.spread(self.name, rows, len(self.experts.held))
        slots = self.ownership.slots(arrived.to(ids.dtype))
        return inner.unite(self.name, self._served(values, slots, weights, x.dtype))

    def record_load(self, device: torch.device) -> ExpertLoad:
        """Counts, from now on, how often each expert is chosen."""
        held, count = self.experts.held, self.num_experts
        self.load = ExpertLoad(held, count, self.experts.bias_here, device)
        return self.load

    def _served(
        self, values: tuple[Tensor, ...], slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """What this rank's experts make of rows in the wire format."""
        if self.load is not None:
            self.load.add(slots)
        return self.experts(self._experts_rows(values, dtype), slots, weights)

    def _experts_rows(self, values: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | Fp8Rows:
        """Packed rows meet packed weights as they are; others are unpacked."""
        if self.pack.form is WireFormat.FP8 and self.experts.block is not None:
            codes, scales = values
            return Fp8Rows(codes=codes, scales=scales, dtype=dtype)
        return self.unpack(values, dtype)

    def route(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of all rows of the step: weights [T, K], and slots of this rank [T, K], -1 for experts of
        other ranks and in padding rows."""
        here = self.ownership
        if here.location.is_identity:  # one kernel does it all
            real = batch.real_rows(logits.device)
            bias = self.router.correction
            return route(logits, self.routing, bias, here.first, here.stop, real)
        weights, ids = self.choose(logits, batch, row_axes=0)
        return weights, here.slots(ids)

    def choose(self, logits: Tensor, batch: Batch, row_axes: int) -> tuple[Tensor, Tensor]:
        """Of this rank's rows when `row_axes` axes are S: weights [T, K], and physical experts of
        all ranks [T, K], -1 in padding rows."""
        start, stop = batch.rows.span(batch.rank, row_axes)
        real = batch.real_rows(logits.device)
        real = real if real is None else real[start:stop]
        weights, ids = route(logits, self.routing, self.router.correction, real=real)
        return weights, self.ownership.copies_for(ids, start)


def _variants(mesh: Mesh, routing: Routing) -> tuple[Variant, ...]:
    """The ways that the layout offers; the plan takes the cheapest."""
    layout = mesh.parallelism
    groups, kept = routing.num_groups, routing.kept_groups
    bundle = Bundle(layout.moe_wire_format, routing.top_k, groups, kept if groups > 1 else 1)
    offered: list[Variant] = []
    if layout.moe_a2a_backend in (A2ABackend.NONE, A2ABackend.AUTO):
        offered += _gathered(mesh, bundle)
    if layout.exchanges:
        needs = row_sharded(len(mesh.moe_ep), len(mesh.axes))
        gives = needs.put(Letter.P, mesh.moe_tp)
        there = Move(Op.DISPATCH, mesh.moe_ep, needs, needs, bundle)
        back = Move(Op.COMBINE, mesh.moe_ep, gives, gives, bundle)
        offered.append(Variant(needs, gives, (there, back)))
    return tuple(offered)


def _gathered(mesh: Mesh, bundle: Bundle) -> Iterator[Variant]:
    (whole,) = rowwise_variants(mesh, mesh.all)
    packs = bundle.format is not WireFormat.NONE
    if not packs or not mesh.attn_dp:
        yield whole
    assert whole.needs is not None
    for prefix in range(max(1, len(mesh.attn_dp)), len(mesh.axes) + 1) if packs else ():
        own = row_sharded(prefix, len(mesh.axes))
        gather = Move(Op.ALL_GATHER, tuple(range(prefix)), own, whole.needs, bundle)
        yield Variant(own, whole.gives, (gather,))


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
