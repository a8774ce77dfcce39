"""MiMo-V2-Flash: sliding layers with sinks and more KV heads, full layers in between.

Source: MiMo-V2-Flash technical report (2026); MiMoV2FlashForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import CAUSAL, Attention, AttentionNames, Span
from isomoe.models.causal_lm import HFConfig, Layer, Supported
from isomoe.models.fine_grained import FineGrainedMoe
from isomoe.models.options import first, rope, rope_options


class MiMoV2Flash(FineGrainedMoe):
    """MiMo-V2-Flash. Values have dims of their own and are scaled before they are cached."""

    architectures: ClassVar[tuple[str, ...]] = ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM")
    only: ClassVar[Supported] = {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "add_full_attention_sink_bias": (False,),
        "add_swa_attention_sink_bias": (True,),
    }

    def prepare(self) -> None:
        c = self.config
        self.ropes = {}
        for sliding, layer_type in ((False, "full_attention"), (True, "sliding_attention")):
            options = rope_options(c, layer_type)
            if sliding and c.get("swa_rope_theta"):
                options["rope_theta"] = c["swa_rope_theta"]
            dim = int(c["head_dim"] * options["partial_rotary_factor"])
            self.ropes[sliding] = rope(c, dim, options)

    @property
    def eps(self) -> float:
        return float(first(self.config, "layernorm_epsilon", "rms_norm_eps"))

    @classmethod
    def is_sliding(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has a window."""
        if config.get("hybrid_layer_pattern") is not None:
            return bool(config["hybrid_layer_pattern"][index])
        return bool(config["layer_types"][index] == "sliding_attention")

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        released = config.get("moe_layer_freq")  # a list, in spite of its name
        return super().is_sparse(config, index) if released is None else bool(released[index])

    @classmethod
    def attention_sort(cls, config: HFConfig, index: int) -> object:
        return cls.is_sliding(config, index)

    @classmethod
    def kv_heads(cls, config: HFConfig) -> tuple[int, ...]:
        (full,) = super().kv_heads(config)
        return full, first(config, "swa_num_key_value_heads", default=2 * full)

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        sliding = self.is_sliding(c, index)
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                hidden_size=c["hidden_size"],
                num_heads=c["num_attention_heads"],
                num_kv_heads=self.kv_heads(c)[sliding],
                head_dim=c["head_dim"],
                v_head_dim=c["v_head_dim"],
                rope=self.ropes[sliding],
                span=Span(window=self.window()) if sliding else CAUSAL,
                value_scale=float(first(c, "attention_value_scale", default=1.0)),
                has_sinks=sliding,
                bias=c.get("attention_bias", False),
                names=AttentionNames(sinks="attention_sink_bias"),
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )

    def window(self) -> int:
        """Keys that a query of a sliding layer sees; `sliding_window_size` leaves out its own."""
        others = self.config.get("sliding_window_size")
        return int(self.config["sliding_window"] if others is None else others + 1)
