"""Mixtral: grouped-query attention, softmax-routed experts and nothing else.

Source: Jiang et al., Mixtral of Experts (2024); MixtralForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import CAUSAL, Attention, PerExpert, Routing, Span
from isomoe.models.causal_lm import CausalLM, Layer
from isomoe.models.options import head_dim, rope


class Mixtral(CausalLM):
    """Mixtral-8x7B, 8x22B, and checkpoints of their architecture."""

    architectures: ClassVar[tuple[str, ...]] = ("MixtralForCausalLM",)

    def prepare(self) -> None:
        self.rope = rope(self.config, head_dim(self.config))

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        window = c.get("sliding_window")
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                hidden_size=c["hidden_size"],
                num_heads=c["num_attention_heads"],
                num_kv_heads=c["num_key_value_heads"],
                head_dim=head_dim(c),
                rope=self.rope,
                span=Span(window=window) if window else CAUSAL,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=(
                self.routed_experts(
                    f"{at}.block_sparse_moe",
                    intermediate_size=c["intermediate_size"],
                    num_experts=c["num_local_experts"],
                    routing=Routing(top_k=c["num_experts_per_tok"], renormalize=True),
                    names=PerExpert(gate="w1", up="w3", down="w2"),
                ),
            ),
        )
