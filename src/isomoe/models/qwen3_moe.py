"""Qwen3-MoE: grouped-query attention with QK norm, softmax-routed experts, no shared expert.

Source: Qwen3 Technical Report (2025); Qwen3MoeForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import Attention, Block
from isomoe.models.causal_lm import Layer
from isomoe.models.qwen_moe import QwenMoe


class Qwen3Moe(QwenMoe):
    """Qwen3-30B-A3B, Qwen3-235B-A22B, and checkpoints of their architecture."""

    architectures: ClassVar[tuple[str, ...]] = ("Qwen3MoeForCausalLM",)

    def layer(self, index: int) -> Layer:
        at = f"{self.layers_at}.{index}"
        bias = self.config.get("attention_bias", False)
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                **self.attention_sizes(),
                bias=bias,
                output_bias=bias,
                qk_norm=self.eps,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )

    def ffn(self, index: int, at: str) -> tuple[Block, ...]:
        """Routed experts, or a dense FFN in between."""
        if self.is_sparse(self.config, index):
            return (self.experts(at),)
        return (self.dense_ffn(at, self.config["intermediate_size"]),)
