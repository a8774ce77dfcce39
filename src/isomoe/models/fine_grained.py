"""Fine-grained experts as of DeepSeekMoE: many small routed experts, shared ones, dense first
layers.

Source: Dai et al., DeepSeekMoE (2024); DeepSeek-V3 (2024) for sigmoid scores and the correction
bias.
"""

from typing import ClassVar

from isomoe.blocks import Block, Routing
from isomoe.models.causal_lm import CausalLM, HFConfig, Supported
from isomoe.models.options import first


class FineGrainedMoe(CausalLM):
    """The FFNs of many families; their attention differs."""

    only: ClassVar[Supported] = {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    }
    router_at: ClassVar[str] = "gate"
    correction_at: ClassVar[str] = "gate.e_score_correction_bias"
    shared_at: ClassVar[str] = "shared_experts"
    """What the checkpoint calls these parts under a layer's `mlp`."""

    @classmethod
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        types = config.get("mlp_layer_types")
        if types is not None:
            return bool(types[index] == "sparse")
        dense = first(config, "first_k_dense_replace", default=0)
        return index >= int(dense)

    def routing(self) -> Routing:
        """How experts are chosen."""
        return sigmoid_routing(self.config)

    def ffn(self, index: int, at: str) -> tuple[Block, ...]:
        """Routed and shared experts, or a dense FFN."""
        c = self.config
        if not self.is_sparse(c, index):
            return (self.dense_ffn(at, c["intermediate_size"]),)
        routed = self.routed_experts(
            at,
            intermediate_size=c["moe_intermediate_size"],
            num_experts=self.num_experts(c),
            routing=self.routing(),
            router=self.router_at,
            router_fp32=True,
            correction=self.correction_at if self.has_correction() else None,
        )
        width = self.shared_width(c)
        if not width:
            return (routed,)
        return (routed, self.shared_expert(f"{at}.{self.shared_at}", width))

    @staticmethod
    def num_experts(config: HFConfig) -> int:
        """Routed experts of a layer."""
        found = first(config, "n_routed_experts", "num_experts", "num_local_experts")
        if found is None:
            raise KeyError("n_routed_experts")
        return int(found)

    @staticmethod
    def shared_width(config: HFConfig) -> int:
        """The width of all shared experts, which are one MLP; 0 for none."""
        count = first(config, "n_shared_experts", "num_shared_experts", default=0)
        each = first(config, "moe_shared_expert_intermediate_size", "moe_intermediate_size")
        return int(count) * int(each)

    def has_correction(self) -> bool:
        """Whether a bias takes part in the choice of experts."""
        return True


def sigmoid_routing(config: HFConfig) -> Routing:
    """Sigmoid scores; a bias takes part in the choice; groups where there are several."""
    return Routing(
        top_k=config["num_experts_per_tok"],
        scoring="sigmoid",
        renormalize=config.get("norm_topk_prob", True),
        scale=float(first(config, "routed_scaling_factor", default=1.0)),
        num_groups=first(config, "n_group", default=1),
        kept_groups=first(config, "topk_group", default=1),
    )
