"""Hunyuan 3: grouped-query attention with QK norm; fine-grained experts.

Source: the Hy3 model card (2026); HYV3ForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import Attention, Routing
from isomoe.models.causal_lm import HFConfig, Layer, Supported
from isomoe.models.fine_grained import FineGrainedMoe
from isomoe.models.options import head_dim, rope


class HunyuanV3(FineGrainedMoe):
    """Hy3-preview."""

    architectures: ClassVar[tuple[str, ...]] = ("HYV3ForCausalLM",)
    only: ClassVar[Supported] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "qk_norm": (True,),
        "moe_router_use_sigmoid": (True,),
        "moe_router_enable_expert_bias": (True,),
        "moe_layer_freq": (1,),
        "route_norm": (True,),
        "norm_topk_prob": (True,),
    }
    router_at = "router.gate"
    correction_at = "expert_bias"
    shared_at = "shared_mlp"

    def prepare(self) -> None:
        self.rope = rope(self.config, head_dim(self.config))

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        if config.get("mlp_layer_types") or config.get("first_k_dense_replace") is not None:
            return super().is_sparse(config, index)
        return index > 0

    @staticmethod
    def shared_width(config: HFConfig) -> int:
        return int(config.get("num_shared_experts") or 0) * int(config["moe_intermediate_size"])

    def routing(self) -> Routing:
        c = self.config
        return Routing(
            top_k=c["num_experts_per_tok"],
            scoring="sigmoid",
            renormalize=True,
            scale=float(c["router_scaling_factor"]),
        )

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
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
                qk_norm=self.eps,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )
