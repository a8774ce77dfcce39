"""K-EXAONE: three layers with a sliding window, then one that sees all and has no rope.

Source: K-EXAONE technical report (2026); ExaoneMoeForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import CAUSAL, Attention, Span
from isomoe.models.causal_lm import HFConfig, Layer
from isomoe.models.fine_grained import FineGrainedMoe
from isomoe.models.options import head_dim, rope


class ExaoneMoe(FineGrainedMoe):
    """K-EXAONE-236B-A23B."""

    architectures: ClassVar[tuple[str, ...]] = ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM")
    correction_at = "e_score_correction_bias"

    def prepare(self) -> None:
        self.rope = rope(self.config, head_dim(self.config))

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        released = config.get("is_moe_layer")
        return super().is_sparse(config, index) if released is None else bool(released[index])

    @classmethod
    def is_sliding(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has a window."""
        types = config.get("layer_types")
        if types is not None:
            return bool(types[index] == "sliding_attention")
        pattern = config.get("sliding_window_pattern")
        if not config.get("sliding_window") or not pattern:
            return False
        if isinstance(pattern, str):
            last = index == cls.num_layers(config) - 1
            return pattern[index % len(pattern)] == "L" and not last
        return (index + 1) % int(pattern) != 0

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        sliding = self.is_sliding(c, index)
        any_sliding = any(self.is_sliding(c, other) for other in range(self.num_layers(c)))
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                hidden_size=c["hidden_size"],
                num_heads=c["num_attention_heads"],
                num_kv_heads=c["num_key_value_heads"],
                head_dim=head_dim(c),
                rope=self.rope if sliding or not any_sliding else None,
                span=Span(window=c["sliding_window"]) if sliding else CAUSAL,
                qk_norm=self.eps,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )
