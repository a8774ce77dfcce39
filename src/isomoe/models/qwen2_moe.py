"""Qwen2-MoE: attention with biased q, k, v; routed experts beside a gated shared expert.

Source: Qwen1.5-MoE and Qwen2 Technical Report (2024); Qwen2MoeForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import Attention, Block
from isomoe.models.causal_lm import Layer
from isomoe.models.qwen_moe import QwenMoe


class Qwen2Moe(QwenMoe):
    """Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B, and checkpoints of their architecture."""

    architectures: ClassVar[tuple[str, ...]] = ("Qwen2MoeForCausalLM",)

    def layer(self, index: int) -> Layer:
        at = f"{self.layers_at}.{index}"
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                **self.attention_sizes(),
                bias=self.config.get("qkv_bias", True),
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )

    def ffn(self, index: int, at: str) -> tuple[Block, ...]:
        """Routed experts and the shared one, or a dense FFN in between."""
        if not self.is_sparse(self.config, index):
            return (self.dense_ffn(at, self.config["intermediate_size"]),)
        shared = self.shared_expert(
            f"{at}.shared_expert",
            self.config["shared_expert_intermediate_size"],
            gate=f"{at}.shared_expert_gate",
        )
        return (self.experts(at), shared)
