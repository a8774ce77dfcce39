"""Gated feed-forward blocks: dense, and shared experts.  T rows, I width of this rank."""

from typing import Any

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner, rowwise_variants
from isomoe.blocks.leaf import Leaf
from isomoe.blocks.linear import Linear, Part, RowLinear
from isomoe.errors import ConfigError
from isomoe.kernels import SWIGLU, Activation, gated
from isomoe.layout import Axes, BlockSpec, Seat


class Gated(Leaf):
    """Gate and up to one: what lies between the two products."""

    def __init__(self, activation: Activation = SWIGLU) -> None:
        self.activation = activation

    def forward(self, *args: Any) -> Tensor:
        """x: [T, 2I], gate first -> [T, I]."""
        (x,) = args
        return gated(x, self.activation)


class SigmoidGate(Linear):
    """A learned scalar for each row, sigmoid(x w), which scales another block's output.

    The scale is linear in that output, so it may be applied to an addend.
    """

    def forward(self, *args: Any) -> Tensor:
        """x: [T, hidden], out: [T, hidden] -> [T, hidden]."""
        x, out = args
        gated: Tensor = out * torch.sigmoid(super().forward(x))
        return gated

    def pack(self) -> None:
        """Stays as it is: one row."""


class GatedMLP(Block):
    """Gated feed-forward, its width sharded over `axes`; rows as the plan likes.

    Source: Shazeer, GLU Variants Improve Transformer (2020).

    Args:
        axes: the mesh axes over which the width is sharded; it gives P there.
        beside: whether it may run beside the other blocks that its rows feed.
        gate: the name of a SigmoidGate on the output (Qwen2-MoE's shared expert), or None.

    Raises:
        ConfigError: if the axes do not divide the width, or there is none.
    """

    def __init__(
        self,
        seat: Seat,
        name: str,
        *,
        hidden_size: int,
        intermediate_size: int,
        axes: Axes,
        kind: str = "dense FFN",
        gate: str | None = None,
        activation: Activation = SWIGLU,
        beside: bool = False,
    ) -> None:
        if intermediate_size < 1:
            raise ConfigError(f"{name}: a {kind} of {intermediate_size} columns cannot be")
        first, stop = seat.shard(intermediate_size, axes, f"columns of the {kind}")
        self.gate_up = Linear(
            [
                Part(f"{name}.{which}_proj", intermediate_size, first, stop)
                for which in ("gate", "up")
            ],
            hidden_size,
        )
        self.activation = Gated(activation)
        self.down = RowLinear(f"{name}.down_proj", hidden_size, intermediate_size, (first, stop))
        self.gate = SigmoidGate([Part(gate, 1, 0, 1)], hidden_size) if gate else None
        self.spec = BlockSpec(
            name=name, kind=kind, variants=rowwise_variants(seat.mesh, axes), beside=beside
        )

    def __call__(self, x: Tensor, batch: Batch, inner: Inner) -> Tensor:
        out = self.down(self.activation(self.gate_up(x)))
        return out if self.gate is None else self.gate(x, out)
