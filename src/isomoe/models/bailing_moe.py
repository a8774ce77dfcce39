"""Ling and Ring: grouped-query attention with one fused projection; fine-grained experts.

Sources: Ling technical report (2025), Ling 2.0 (2025), and the released configuration and modeling
files.
"""

from typing import Any, ClassVar

from isomoe.blocks import Attention, AttentionNames, Block, Routing
from isomoe.models.causal_lm import HFConfig, Layer, Supported
from isomoe.models.fine_grained import FineGrainedMoe
from isomoe.models.options import first, head_dim, rope, rope_options

NAMES = AttentionNames(
    q="query_key_value",
    k="query_key_value",
    v="query_key_value",
    output="dense",
    q_norm="query_layernorm",
    k_norm="key_layernorm",
)


class BailingMoeV2(FineGrainedMoe):
    """Ling 2.0 and Ring 2.0: mini, flash, 1T. Sigmoid routing within groups."""

    architectures: ClassVar[tuple[str, ...]] = ("BailingMoeV2ForCausalLM",)
    only: ClassVar[Supported] = {
        **FineGrainedMoe.only,
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "norm_head": (False,),
        "use_bias": (False,),
        "use_sliding_window": (False,),
    }
    embedding_at = "model.word_embeddings"
    correction_at = "gate.expert_bias"

    def prepare(self) -> None:
        c, options = self.config, rope_options(self.config)
        dim = first(c, "rotary_dim", default=int(head_dim(c) * options["partial_rotary_factor"]))
        self.rope = rope(c, dim, options)

    def layer(self, index: int) -> Layer:
        at = f"{self.layers_at}.{index}"
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=self.attention(index, f"{at}.attention"),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, f"{at}.mlp"),
        )

    def attention(self, index: int, at: str) -> Block:
        """Grouped-query attention; QK norm where the config says so."""
        return Attention(self.seat, at, **self.attention_options())

    def attention_options(self) -> dict[str, Any]:
        """The arguments of `Attention`."""
        c = self.config
        return {
            "hidden_size": c["hidden_size"],
            "num_heads": c["num_attention_heads"],
            "num_kv_heads": c["num_key_value_heads"],
            "head_dim": head_dim(c),
            "rope": self.rope,
            "bias": bool(c.get("use_qkv_bias")),
            "qk_norm": self.eps if c.get("use_qk_norm") else None,
            "names": NAMES,
        }


class BailingMoe(BailingMoeV2):
    """Ling 1.x: softmax routing, every layer with experts."""

    architectures: ClassVar[tuple[str, ...]] = ("BailingMoeForCausalLM", "BailingMoEForCausalLM")
    only: ClassVar[Supported] = {
        **BailingMoeV2.only,
        "scoring_func": ("softmax",),
        "topk_method": ("greedy",),
        "score_function": ("softmax",),
        "moe_router_enable_expert_bias": (False,),
    }

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        return index >= int(config.get("first_k_dense_replace") or 0)

    def has_correction(self) -> bool:
        return False

    def routing(self) -> Routing:
        c = self.config
        return Routing(top_k=c["num_experts_per_tok"], renormalize=c.get("norm_topk_prob", True))
