"""Llama 4 (text): chunked attention with rope, full attention without; one expert a token.

Source: the Llama 4 model cards (2025); Llama4ForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import CAUSAL, Attention, Block, QueryScale, Routing, Span, Transposed
from isomoe.models.causal_lm import CausalLM, HFConfig, Layer, Supported
from isomoe.models.options import head_dim, rope


class Llama4(CausalLM):
    """Scout and Maverick. The sigmoid of a token's router logit scales what its expert takes."""

    architectures: ClassVar[tuple[str, ...]] = (
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
    )
    only: ClassVar[Supported] = {"attention_bias": (False,)}

    def prepare(self) -> None:
        self.rope = rope(self.config, head_dim(self.config), interleaved=True)

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        listed = config.get("moe_layers")
        if listed is not None:
            return index in listed
        return (index + 1) % int(config["interleave_moe_layer_step"]) == 0

    @classmethod
    def has_rope(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has rope, and sees its own chunk alone."""
        listed = config.get("no_rope_layers")  # 1 where there is rope, in spite of its name
        if listed:
            return bool(listed[index])
        return (index + 1) % int(config.get("no_rope_layer_interval") or 4) != 0

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        turns = self.has_rope(c, index)
        tuned = c.get("attn_temperature_tuning", True)
        scale = QueryScale(c.get("attn_scale", 0.1), c.get("floor_scale", 8192.0))
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                hidden_size=c["hidden_size"],
                num_heads=c["num_attention_heads"],
                num_kv_heads=c["num_key_value_heads"],
                head_dim=head_dim(c),
                rope=self.rope if turns else None,
                span=Span(chunk=c["attention_chunk_size"]) if turns else CAUSAL,
                unit_norm=self.eps if turns and c.get("use_qk_norm", True) else None,
                query_scale=scale if tuned and not turns else None,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.feed_forward"),
        )

    def ffn(self, index: int, at: str) -> tuple[Block, ...]:
        """Routed experts and a shared one, or a dense FFN of a width of its own."""
        c = self.config
        if not self.is_sparse(c, index):
            return (self.dense_ffn(at, c["intermediate_size_mlp"]),)
        routed = self.routed_experts(
            at,
            intermediate_size=c["intermediate_size"],
            num_experts=c["num_local_experts"],
            routing=Routing(top_k=c["num_experts_per_tok"], scoring="sigmoid"),
            router="router",
            names=Transposed(),
            scales_input=True,
        )
        return (routed, self.shared_expert(f"{at}.shared_expert", c["intermediate_size"]))

    @classmethod
    def canonical(cls, tensor: str) -> str:
        return tensor.removeprefix("language_model.")

    def ignores(self, tensor: str) -> bool:
        seen = ("vision_model.", "multi_modal_projector.")
        return tensor.startswith(seen) or super().ignores(tensor)
