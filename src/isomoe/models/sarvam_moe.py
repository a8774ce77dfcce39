"""Sarvam: the 30B model is built like Ling 2.0, the 105B one like DeepSeek V3.

Source: the Sarvam model cards (2026), and the released configuration and modeling files.
"""

from typing import ClassVar

from isomoe.blocks import Routing
from isomoe.models.bailing_moe import BailingMoeV2
from isomoe.models.causal_lm import Supported
from isomoe.models.deepseek_v2 import DeepseekV3
from isomoe.models.fine_grained import sigmoid_routing
from isomoe.models.options import first


class SarvamMoe(BailingMoeV2):
    """sarvam-30b. Its heads turn whole."""

    architectures: ClassVar[tuple[str, ...]] = ("SarvamMoEForCausalLM",)


class SarvamMla(DeepseekV3):
    """sarvam-105b. Its groups are not in the config: eight experts each, of which two are kept."""

    architectures: ClassVar[tuple[str, ...]] = ("SarvamMLAForCausalLM",)
    only: ClassVar[Supported] = {
        **DeepseekV3.only,
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
    }

    def routing(self) -> Routing:
        c = self.config
        groups = first(c, "n_group", default=self.num_experts(c) // 8)
        kept = first(c, "topk_group", default=2)
        return sigmoid_routing({**c, "n_group": groups, "topk_group": kept})
