"""What Qwen2-MoE and Qwen3-MoE share."""

from typing import Any, ClassVar

from isomoe.blocks import Routing, SparseMoe
from isomoe.errors import ConfigError
from isomoe.models.causal_lm import CausalLM, HFConfig, Supported
from isomoe.models.options import first, head_dim, rope


class QwenMoe(CausalLM):
    """Grouped-query attention with full rope; softmax top-k experts; dense layers in between."""

    only: ClassVar[Supported] = {"use_sliding_window": (False,)}

    def prepare(self) -> None:
        self.rope = rope(self.config, head_dim(self.config))

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        if num_experts(config) == 0 or index in (config.get("mlp_only_layers") or ()):
            return False
        step = config.get("decoder_sparse_step", 1)
        if type(step) is not int or step < 1:
            raise ConfigError(f"config.json: 'decoder_sparse_step' is {step!r}, not a count")
        return (index + 1) % step == 0

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
        return self.routed_experts(
            at,
            intermediate_size=c["moe_intermediate_size"],
            num_experts=num_experts(c),
            routing=Routing(
                top_k=c["num_experts_per_tok"], renormalize=c.get("norm_topk_prob", False)
            ),
        )


def num_experts(config: HFConfig) -> int:
    """Routed experts; transformers 5.2x renamed the key for Qwen3-MoE."""
    found = first(config, "num_experts", "num_local_experts")
    if found is None:
        raise KeyError("num_experts")
    return int(found)
