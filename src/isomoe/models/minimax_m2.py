"""MiniMax-M2: grouped-query attention with QK norm over all heads; sigmoid-routed experts.

Source: the MiniMax-M2 model card (2025); MiniMaxM2ForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import PerExpert, Routing, WideNormAttention
from isomoe.models.causal_lm import CausalLM, Layer, Supported
from isomoe.models.options import first, head_dim, rope, rope_options


class MiniMaxM2(CausalLM):
    """MiniMax-M2, M2.1."""

    architectures: ClassVar[tuple[str, ...]] = ("MiniMaxM2ForCausalLM",)
    only: ClassVar[Supported] = {
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "shared_intermediate_size": (0,),
    }

    def prepare(self) -> None:
        c, options = self.config, rope_options(self.config)
        dim = first(c, "rotary_dim", default=int(head_dim(c) * options["partial_rotary_factor"]))
        self.rope = rope(c, dim, options)

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=WideNormAttention(
                self.seat,
                f"{at}.self_attn",
                hidden_size=c["hidden_size"],
                num_heads=c["num_attention_heads"],
                num_kv_heads=c["num_key_value_heads"],
                head_dim=head_dim(c),
                rope=self.rope,
                qk_norm=self.eps,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=(
                self.routed_experts(
                    f"{at}.block_sparse_moe",
                    intermediate_size=c["intermediate_size"],
                    num_experts=c["num_local_experts"],
                    routing=Routing(
                        top_k=c["num_experts_per_tok"], scoring="sigmoid", renormalize=True
                    ),
                    router_fp32=True,
                    correction="e_score_correction_bias",
                    names=PerExpert(gate="w1", up="w3", down="w2"),
                ),
            ),
        )
