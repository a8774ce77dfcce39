"""Ring-linear, Ling 2.5 and 2.6: linear attention in most layers, softmax attention in some.

Sources: Ring-linear technical report (2025), and the released modeling files.
"""

from typing import ClassVar

from isomoe.blocks import Attention, Block, LightningAttention
from isomoe.models.bailing_moe import NAMES, BailingMoeV2
from isomoe.models.causal_lm import HFConfig, Supported
from isomoe.models.deepseek_v2 import latent_attention, latent_rope
from isomoe.models.options import head_dim


class BailingMoeLinearV2(BailingMoeV2):
    """Ring-mini-linear-2.0, Ring-flash-linear-2.0: softmax layers are grouped-query attention."""

    architectures: ClassVar[tuple[str, ...]] = ("BailingMoeLinearV2ForCausalLM",)
    only: ClassVar[Supported] = {
        **BailingMoeV2.only,
        "linear_silu": (False,),
        "use_linear_silu": (False,),
        "linear_rope": (True,),
        "rope_interleave": (True,),
        "use_qkv_bias": (False,),
    }

    @classmethod
    def is_linear(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has linear attention: all but the last of each group, and but
        those of an incomplete last group."""
        group = int(config["layer_group_size"])
        whole = cls.num_layers(config) // group * group
        return index < whole and (index + 1) % group != 0

    @classmethod
    def attention_sort(cls, config: HFConfig, index: int) -> object:
        return cls.is_linear(config, index)

    def attention(self, index: int, at: str) -> Block:
        if self.is_linear(self.config, index):
            return self.linear_attention(index, at)
        return self.softmax_attention(at)

    def softmax_attention(self, at: str) -> Block:
        """That of the layers that see every token."""
        return Attention(self.seat, at, **self.attention_options())

    def linear_attention(self, index: int, at: str) -> LightningAttention:
        """That of the others: as many KV heads as query heads."""
        c = self.config
        return LightningAttention(
            self.seat,
            at,
            hidden_size=c["hidden_size"],
            num_heads=c["num_attention_heads"],
            head_dim=head_dim(c),
            rope=self.rope,
            decay_factor=decay_factor(index, self.num_layers(c)),
            norm_groups=c["group_norm_size"],
            eps=self.eps,
            qk_norm=self.eps if c.get("use_qk_norm") else None,
            names=NAMES,
        )

    def ignores(self, tensor: str) -> bool:
        return tensor.endswith(".attention.slope") or super().ignores(tensor)


class BailingMoeV25(BailingMoeLinearV2):
    """Ling-2.5, Ring-2.5, Ling-2.6: softmax layers are multi-head latent attention."""

    architectures: ClassVar[tuple[str, ...]] = ("BailingMoeV2_5ForCausalLM",)

    def prepare(self) -> None:
        super().prepare()
        self.latent_rope = latent_rope(self.config)

    @classmethod
    def kv_heads(cls, config: HFConfig) -> tuple[int, ...]:
        return ()  # all heads share one latent, which every rank holds

    def softmax_attention(self, at: str) -> Block:
        return latent_attention(self.seat, at, self.config, self.latent_rope, output="dense")


def decay_factor(index: int, layers: int) -> float:
    """How much a layer's states decay, beside a head's slope: less in later layers.

    As in the released modeling files, which count from one here: the first layer's is above 1.
    SGLang and vLLM have `index` for `index - 1`.
    """
    return 1 - (index - 1) / (layers - 1) + 1e-5
