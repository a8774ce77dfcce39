"""What the cases of kernels are made from: a model's sizes, where they run, and what comes out.

T: rows
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isomoe.blocks import Attention, SparseMoe
from isomoe.errors import ConfigError
from isomoe.kernels import CAUSAL, Heads, Routing
from isomoe.layout import Parallelism
from isomoe.models import HFConfig, build

_STD = 0.02

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a model that its kernels see on one rank of one."""

    hidden: int
    heads: Heads
    experts: int
    routing: Routing
    width: int
    vocab: int

    @classmethod
    def of(cls, config: HFConfig) -> "Sizes":
        """Of a checkpoint with experts.

        Raises:
            ConfigError: if no family runs it, or its kernels are none of the cases.
        """
        model = build(config, Parallelism())
        kinds = {
            layer.attn.core.heads if isinstance(layer.attn, Attention) else None
            for layer in model.layers
        }
        heads = kinds.pop()
        plain = heads and heads.qk_dim == heads.v_dim and heads.span == CAUSAL
        if not heads or kinds or not plain:
            raise ConfigError(
                "kernels are measured on models with the same grouped-query attention over all "
                "keys in every layer, and values of as many dims as keys"
            )
        blocks = [block for layer in model.layers for block in layer.ffn]
        moe = next((block for block in blocks if isinstance(block, SparseMoe)), None)
        if moe is None:
            raise ConfigError("config.json: the model has no experts; kernels are measured on MoEs")
        if moe.router.correction_from is not None or moe.routing.num_groups > 1:
            raise ConfigError("kernels are not measured on routers with groups or correction bias")
        if not moe.experts.form.is_plain:
            raise ConfigError("kernels are measured on SwiGLU experts without biases")
        return cls(
            hidden=config["hidden_size"],
            heads=heads,
            experts=moe.num_experts,
            routing=moe.routing,
            width=moe.experts.intermediate_size,
            vocab=config["vocab_size"],
        )

    @property
    def qkv(self) -> int:
        """Columns of queries, keys and values."""
        return (self.heads.query + 2 * self.heads.kv) * self.heads.qk_dim

    @property
    def attended(self) -> int:
        """Columns of what attention gives."""
        return self.heads.query * self.heads.v_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and on what a case runs.

    Attributes:
        rows: T.
        context: keys that each row of decode sees.
        copies: sets of inputs to take in turn, so that the last one's are out of the cache.
    """

    sizes: Sizes
    rows: int
    context: int
    device: torch.device
    dtype: torch.dtype
    copies: int = 1

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Random values. The seed is the caller's: `torch.manual_seed`."""
        full = torch.randn(shape, dtype=torch.float32, device=self.device) * std
        return full.to(self.dtype)

    def matrix(self, *shape: int) -> Tensor:
        """A weight, drawn in its own dtype: an fp32 draw of all experts would take gigabytes."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0.0, _STD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case that can be run.

    Attributes:
        inputs: one tuple of arguments for each copy.
        run: the kernel.
        twin: the same in plain torch.
        num_bytes: that one call must read and write.
        flops: that one call must compute.
        exact: outputs are ids, which must be equal; else they may differ by rounding.
    """

    inputs: Sequence[tuple[Any, ...]]
    run: Run
    twin: Run
    num_bytes: float
    flops: float = 0.0
    exact: bool = False
