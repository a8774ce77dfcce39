"""SDAR: Qwen3-MoE's network, which fills in a block of tokens at a time.

Source: Cheng et al., SDAR (2025), and the released modeling file.
"""

from typing import Any, ClassVar

from isomoe.blocks import Span
from isomoe.models.causal_lm import BlockDiffusion, HFConfig
from isomoe.models.options import block_diffusion
from isomoe.models.qwen3_moe import Qwen3Moe


class SdarMoe(Qwen3Moe):
    """SDAR-30B-A3B-Chat and its siblings of other block sizes."""

    architectures: ClassVar[tuple[str, ...]] = ("SDARMoeForCausalLM",)

    @classmethod
    def diffusion(cls, config: HFConfig) -> BlockDiffusion:
        return block_diffusion(config, block_size=4, mask_token_id=151669)

    def attention_sizes(self) -> dict[str, Any]:
        span = Span(block=self.diffusion(self.config).block_size)
        return {**super().attention_sizes(), "span": span}

    @classmethod
    def canonical(cls, tensor: str) -> str:
        if tensor.startswith(("model.", "lm_head.")):
            return tensor
        return f"model.{tensor}"
