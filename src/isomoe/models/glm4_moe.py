"""GLM-4.5 and 4.6: grouped-query attention that turns half of a head; fine-grained experts.

Source: GLM-4.5 technical report (2025); Glm4MoeForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import Attention
from isomoe.models.causal_lm import Layer
from isomoe.models.fine_grained import FineGrainedMoe
from isomoe.models.options import head_dim, rope, rope_options


class Glm4Moe(FineGrainedMoe):
    """GLM-4.5, GLM-4.5-Air, GLM-4.6."""

    architectures: ClassVar[tuple[str, ...]] = ("Glm4MoeForCausalLM",)

    def prepare(self) -> None:
        options = rope_options(self.config)
        dim = int(head_dim(self.config) * options["partial_rotary_factor"])
        self.rope = rope(self.config, dim, options)

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
                bias=c.get("attention_bias", False),
                qk_norm=self.eps if c.get("use_qk_norm") else None,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )
