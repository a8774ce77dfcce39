"""What a model keeps in a rank's memory."""

from dataclasses import dataclass

import torch

from isomoe.blocks import SparseMoe
from isomoe.models.causal_lm import CausalLM
from isomoe.models.options import dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What a model keeps on the rank that keeps most of it: the first, with the biases.

    Attributes:
        dtype: of the config.json; bfloat16 where it names none. Quantised weights are kept in it.
        fp8_experts: whether experts are kept in FP8 all the same.
        weight_bytes: of all weights; some, such as a router's, may be fp32.
        kv_bytes_per_token: in the caches of all layers, of one of its attention group's tokens.
        state_bytes_per_request: in all layers with linear attention.
    """

    dtype: str
    fp8_experts: bool
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes_per_request: int

    @classmethod
    def of(cls, model: CausalLM) -> "RankMemory":
        """That of a model on rank 0; its weights become meta tensors.

        Raises:
            ConfigError: if it is not run in the config's dtype.
        """
        name = dtype_name(model.config)
        dtype: torch.dtype = getattr(torch, name)
        for leaf in model.leaves():
            leaf.allocate(dtype, torch.device("meta"))
        memories = model.memories()
        return cls(
            dtype=name,
            fp8_experts=any(
                block.experts.block is not None
                for block in model.blocks()
                if isinstance(block, SparseMoe)
            ),
            weight_bytes=sum(kept.out.nbytes for kept in model.weight_slices()),
            kv_bytes_per_token=sum(memory.cache_bytes_per_token(dtype) for memory in memories),
            state_bytes_per_request=sum(memory.state_bytes() for memory in memories),
        )
