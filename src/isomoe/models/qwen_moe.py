"""What Qwen2-MoE and Qwen3-MoE share."""

from typing import Any

from isomoe.blocks import GatedMLP, Rope, SparseMoe
from isomoe.errors import ConfigError
from isomoe.models.causal_lm import CausalLM, HFConfig


class QwenMoe(CausalLM):
    """Grouped-query attention with full rope; softmax top-k experts; dense layers in between."""

    def prepare(self) -> None:
        if self.config.get("quantization_config"):
            raise ConfigError("config.json: quantized checkpoints are not supported yet")
        for key, default in (("hidden_act", "silu"), ("use_sliding_window", False)):
            if self.config.get(key, default) != default:
                raise ConfigError(
                    f"config.json: {key} {self.config[key]!r} is not supported; {default!r} is"
                )
        self.rope = Rope(
            head_dim(self.config),
            rope_theta(self.config),
            self.config["max_position_embeddings"],
        )

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has experts."""
        if num_experts(config) == 0 or index in (config.get("mlp_only_layers") or ()):
            return False
        step = config.get("decoder_sparse_step", 1)
        if type(step) is not int or step < 1:
            raise ConfigError(f"config.json: 'decoder_sparse_step' is {step!r}, not a count")
        return (index + 1) % step == 0

    @classmethod
    def sorts(cls, config: HFConfig) -> list[object]:
        return [cls.is_sparse(config, index) for index in range(cls.num_layers(config))]

    def attention_sizes(self) -> dict[str, Any]:
        """The sizes of every layer's attention."""
        return {
            "hidden_size": self.config["hidden_size"],
            "num_heads": self.config["num_attention_heads"],
            "num_kv_heads": self.config["num_key_value_heads"],
            "head_dim": head_dim(self.config),
            "rope": self.rope,
        }

    def experts(self, at: str) -> SparseMoe:
        """The routed experts of a layer."""
        c = self.config
        return SparseMoe(
            self.seat,
            at,
            hidden_size=c["hidden_size"],
            intermediate_size=c["moe_intermediate_size"],
            num_experts=num_experts(c),
            top_k=c["num_experts_per_tok"],
            renormalize=c.get("norm_topk_prob", False),
        )

    def dense(self, at: str) -> GatedMLP:
        """A dense FFN."""
        return GatedMLP(
            self.seat,
            at,
            hidden_size=self.config["hidden_size"],
            intermediate_size=self.config["intermediate_size"],
            axes=self.seat.mesh.ffn_tp,
        )


def num_experts(config: HFConfig) -> int:
    """Routed experts; transformers 5.2x renamed the key for Qwen3-MoE."""
    renamed = "num_experts" not in config and "num_local_experts" in config
    return int(config["num_local_experts" if renamed else "num_experts"])


def head_dim(config: HFConfig) -> int:
    """`head_dim`, or hidden size over heads where the config has none."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_theta(config: HFConfig) -> float:
    """The base of the rotary frequencies, in either spelling of the config.

    Raises:
        ConfigError: for a scaled rope, which is not built yet.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; 'default' is")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
