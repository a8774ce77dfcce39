"""gpt-oss: sliding and full layers in turn, all with sinks; biases; a clamped SwiGLU.

Source: gpt-oss model card (2025); GptOssForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import CAUSAL, Attention, ClampedSwiGlu, Routing, Span, Transposed
from isomoe.models.causal_lm import CausalLM, HFConfig, Layer
from isomoe.models.options import first, head_dim, rope


class GptOss(CausalLM):
    """gpt-oss-120b, gpt-oss-20b."""

    architectures: ClassVar[tuple[str, ...]] = ("GptOssForCausalLM",)

    def prepare(self) -> None:
        self.rope = rope(self.config, head_dim(self.config))

    @classmethod
    def is_sliding(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has a window."""
        types = config.get("layer_types")
        return index % 2 == 0 if types is None else bool(types[index] == "sliding_attention")

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        sliding, bias = self.is_sliding(c, index), c.get("attention_bias", True)
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
                span=Span(window=c["sliding_window"]) if sliding else CAUSAL,
                bias=bias,
                output_bias=bias,
                has_sinks=True,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=(
                self.routed_experts(
                    f"{at}.mlp",
                    intermediate_size=c["intermediate_size"],
                    num_experts=c["num_local_experts"],
                    routing=Routing(
                        top_k=first(c, "num_experts_per_tok", "experts_per_token"),
                        renormalize=True,
                    ),
                    router="router",
                    router_bias=True,
                    names=Transposed(interleaved=True, has_bias=True),
                    activation=ClampedSwiGlu(limit=float(c.get("swiglu_limit") or 7.0)),
                ),
            ),
        )
