"""Step-3.5-Flash: sliding and full layers of other head counts, head gates, zero-centred norms.

Source: the Step-3.5-Flash model card (2026); Step3p7TextModel of transformers.
"""

from typing import ClassVar

from isomoe.blocks import (
    CAUSAL,
    SWIGLU,
    Attention,
    Block,
    RMSNorm,
    Rope,
    Routing,
    Span,
    Stacked,
    SwiGlu,
)
from isomoe.models.causal_lm import CausalLM, HFConfig, Layer, Supported
from isomoe.models.options import first, rope, rope_options


class Step3p5(CausalLM):
    """Step-3.5-Flash. Lists with an entry for each layer have more for prediction layers behind."""

    architectures: ClassVar[tuple[str, ...]] = ("Step3p5ForCausalLM",)
    only: ClassVar[Supported] = {
        "moe_router_activation": ("sigmoid",),
        "use_moe_router_bias": (True,),
        "use_head_wise_attn_gate": (True,),
        "use_qk_norm": (True,),
        "zero_centered": (True,),
        "norm_expert_weight": (True,),
    }

    def prepare(self) -> None:
        self.ropes: dict[tuple[str, float, float], Rope] = {}

    @property
    def eps(self) -> float:
        return float(first(self.config, "rms_norm_eps", default=1e-5))

    @classmethod
    def is_sliding(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has a window."""
        types = config.get("layer_types") or ()
        return index < len(types) and bool(types[index] == "sliding_attention")

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        types, listed = config.get("mlp_layer_types"), config.get("moe_layers_enum")
        if types is not None:
            return bool(types[index] == "sparse")
        if listed is None:
            return index >= 3
        names = listed.split(",") if isinstance(listed, str) else listed
        return index in {int(name) for name in names}

    @classmethod
    def attention_sort(cls, config: HFConfig, index: int) -> object:
        return cls.heads(config, index)

    @classmethod
    def heads(cls, config: HFConfig, index: int) -> tuple[int, int]:
        """Query and KV heads of layer `index`."""
        other = config.get("attention_other_setting") or {}
        source = {**config, **other} if cls.is_sliding(config, index) else config
        kv = first(source, "num_attention_groups", "num_key_value_heads")
        return int(source["num_attention_heads"]), int(kv)

    @classmethod
    def kv_heads(cls, config: HFConfig) -> tuple[int, ...]:
        layers = range(cls.num_layers(config))
        return tuple(sorted({cls.heads(config, index)[1] for index in layers}))

    def rms_norm(self, name: str) -> RMSNorm:
        return RMSNorm(name, self.config["hidden_size"], self.eps, zero_centred=True)

    def layer(self, index: int) -> Layer:
        c, at = self.config, f"{self.layers_at}.{index}"
        num_heads, num_kv_heads = self.heads(c, index)
        return Layer(
            attn_norm=self.rms_norm(f"{at}.input_layernorm"),
            attn=Attention(
                self.seat,
                f"{at}.self_attn",
                hidden_size=c["hidden_size"],
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=c["head_dim"],
                rope=self.rope_of(index),
                span=Span(window=c["sliding_window"]) if self.is_sliding(c, index) else CAUSAL,
                qk_norm=self.eps,
                zero_centred=True,
                has_gate=True,
            ),
            ffn_norm=self.rms_norm(f"{at}.post_attention_layernorm"),
            ffn=self.ffn(index, at),
        )

    def rope_of(self, index: int) -> Rope:
        """Each kind of layer has its theta and turning dims; only full layers are scaled."""
        c = self.config
        kind = "sliding_attention" if self.is_sliding(c, index) else "full_attention"
        options = rope_options(c, kind)
        for key, listed in (
            ("rope_theta", "rope_theta"),
            ("partial_rotary_factor", "partial_rotary_factors"),
        ):
            if isinstance(c.get(listed), list):
                options[key] = c[listed][index]
        scaled = c.get("yarn_only_types")
        if scaled is not None and kind not in scaled:
            options["rope_type"] = "default"
        sort = kind, options["rope_theta"], options["partial_rotary_factor"]
        if sort not in self.ropes:
            dim = int(c["head_dim"] * options["partial_rotary_factor"])
            self.ropes[sort] = rope(c, dim, options)
        return self.ropes[sort]

    def ffn(self, index: int, at: str) -> tuple[Block, ...]:
        """Routed experts and, their sibling in the layer, a shared one; or a dense FFN."""
        c = self.config
        routed, shared = (
            self.limit(key, index) for key in ("swiglu_limits", "swiglu_limits_shared")
        )
        if not self.is_sparse(c, index):
            return (self.dense_ffn(f"{at}.mlp", c["intermediate_size"], activation=shared),)
        experts = self.routed_experts(
            f"{at}.moe",
            intermediate_size=c["moe_intermediate_size"],
            num_experts=first(c, "moe_num_experts", "n_routed_experts"),
            routing=Routing(
                top_k=first(c, "moe_top_k", "num_experts_per_tok"),
                scoring="sigmoid",
                renormalize=True,
                scale=float(first(c, "moe_router_scaling_factor", default=1.0)),
            ),
            router_fp32=True,
            correction="router_bias",
            experts="",
            names=Stacked(),
            activation=routed,
        )
        width = first(c, "share_expert_dim", "share_expert_dims")
        beside = self.shared_expert(f"{at}.share_expert", width, activation=shared)
        return (experts, beside)

    def limit(self, key: str, index: int) -> SwiGlu:
        """SwiGLU with the layer's limit; 0 and null mean none."""
        limits = self.config.get(key)
        return SwiGlu(float(limits[index])) if limits and limits[index] else SWIGLU
