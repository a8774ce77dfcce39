"""DeepSeek V2, V3, R1 and Kimi K2: multi-head latent attention; fine-grained experts.

Sources: DeepSeek-V2 (2024), DeepSeek-V3 (2024), Kimi K2 (2025); DeepseekV2ForCausalLM and
DeepseekV3ForCausalLM of transformers.
"""

from typing import ClassVar

from isomoe.blocks import LatentAttention, Rope, Routing
from isomoe.layout import Seat
from isomoe.models.causal_lm import HFConfig, Layer, Supported
from isomoe.models.fine_grained import FineGrainedMoe
from isomoe.models.options import first, rope, rope_options, yarn_mscale

LATENT_EPS = 1e-6
"""Of the norms of the latents, whatever the config says of the others: so in the released code."""


class DeepseekV3(FineGrainedMoe):
    """DeepSeek-V3, R1, Kimi-K2: sigmoid routing with a correction bias."""

    architectures: ClassVar[tuple[str, ...]] = ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM")
    only: ClassVar[Supported] = {
        **FineGrainedMoe.only,
        "attention_bias": (False,),
    }

    def prepare(self) -> None:
        self.rope = latent_rope(self.config)

    @classmethod
    def kv_heads(cls, config: HFConfig) -> tuple[int, ...]:
        return ()  # all heads share one latent, which every rank holds

    def layer(self, index: int) -> Layer:
        at = f"{self.layers_at}.{index}"
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=latent_attention(self.seat, f"{at}.self_attn", self.config, self.rope),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )


class DeepseekV2(DeepseekV3):
    """DeepSeek-V2, V2-Lite, Coder-V2: softmax routing, within the groups of the best experts."""

    architectures: ClassVar[tuple[str, ...]] = ("DeepseekV2ForCausalLM",)
    only: ClassVar[Supported] = {
        **DeepseekV3.only,
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax",),
        "rope_interleave": (True,),
    }

    def has_correction(self) -> bool:
        return False

    def routing(self) -> Routing:
        """Never renormalised, whatever `norm_topk_prob` says: so in the released code."""
        c = self.config
        grouped = c.get("topk_method") == "group_limited_greedy"
        return Routing(
            top_k=c["num_experts_per_tok"],
            scale=float(c.get("routed_scaling_factor") or 1.0),
            num_groups=c["n_group"] if grouped else 1,
            kept_groups=c["topk_group"] if grouped else 1,
            group_score="max",
        )


def latent_rope(config: HFConfig) -> Rope:
    """For the dims of a head that turn: neighbours in the weights turn together, as published."""
    interleaved = first(config, "rope_interleave", default=True)
    return rope(config, config["qk_rope_head_dim"], interleaved=interleaved)


def latent_attention(
    seat: Seat, at: str, config: HFConfig, turns: Rope, output: str = "o_proj"
) -> LatentAttention:
    """MLA. YaRN's stretch of the softmax counts twice in its scale: for queries, for keys."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    options = rope_options(config)
    if options["rope_type"] != "default" and options.get("mscale_all_dim"):
        scale *= yarn_mscale(float(options["factor"]), float(options["mscale_all_dim"])) ** 2
    return LatentAttention(
        seat,
        at,
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        q_latent=config.get("q_lora_rank"),
        kv_latent=config["kv_lora_rank"],
        head_dim=config["qk_nope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope=turns,
        eps=LATENT_EPS,
        scale=scale,
        output=output,
    )
