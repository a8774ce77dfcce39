"""LLaDA 2: Ling 2.0's network, which fills in a block of tokens at a time.

Source: LLaDA2.0 technical report (2025), and the released modeling files.
"""

from typing import Any, ClassVar

from isomoe.blocks import Span
from isomoe.models.bailing_moe import BailingMoeV2
from isomoe.models.causal_lm import BlockDiffusion, HFConfig, Supported
from isomoe.models.options import block_diffusion


class Llada2(BailingMoeV2):
    """LLaDA2.0-mini, LLaDA2.0-flash, LLaDA2.1."""

    architectures: ClassVar[tuple[str, ...]] = ("LLaDA2MoeModelLM",)
    only: ClassVar[Supported] = {**BailingMoeV2.only, "expert_capacity": (None,)}

    @classmethod
    def diffusion(cls, config: HFConfig) -> BlockDiffusion:
        return block_diffusion(config, block_size=32, mask_token_id=156895)

    def attention_options(self) -> dict[str, Any]:
        span = Span(block=self.diffusion(self.config).block_size)
        return {**super().attention_options(), "span": span}

    @classmethod
    def canonical(cls, tensor: str) -> str:
        return tensor.replace("model.language_model.", "model.", 1)
