"""The degrees of parallelism of one replica, as the flags name them."""

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from isomoe.errors import ConfigError
from isomoe.layout.wire import WireFormat

MAX_RANKS = 1024
_SHORTHAND = re.compile(r"(tp|dp|ep|dense|red)(\d+)$")


class A2ABackend(StrEnum):
    """What takes rows to the ranks of their experts, and brings them back."""

    NONE = "none"
    """Nothing: rows are gathered, and each rank adds what its experts make of them."""
    TORCH = "torch"
    """all_to_all_single, over Gloo or NCCL."""
    AUTO = "auto"
    """Either of these, as the plan finds it cheaper for so many rows."""
    DEEPEP = "deepep"
    """The DeepEP package, where it is installed."""


_WORDS: dict[str, tuple[str, object]] = {
    "dplm": ("enable_dp_lm_head", True),
    "a2a": ("moe_a2a_backend", A2ABackend.TORCH),
    "a2aauto": ("moe_a2a_backend", A2ABackend.AUTO),
    "deepep": ("moe_a2a_backend", A2ABackend.DEEPEP),
    "fp8": ("moe_wire_format", WireFormat.FP8),
    "nvfp4": ("moe_wire_format", WireFormat.NVFP4),
}
"""Parts of the shorthand without a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How many ways each kind of block is split over the `tp_size` ranks of a replica.

    Attributes:
        tp_size: all ranks of the replica (SGLang's meaning of the flag).
        attn_dp_size: groups of ranks that run attention on their own requests.
        ep_size: groups of ranks that each own a share of the experts.
        moe_dense_tp_size: ranks that share one dense FFN; None means `tp_size`.
        enable_dp_lm_head: shard the lm_head over an attention group instead of over all ranks.
        moe_a2a_backend: send each row to the ranks of its experts alone, by all-to-all.
        moe_wire_format: how hidden states travel to routed experts; each row is rounded to it,
            on any layout.
        ep_num_redundant_experts: further copies of experts in each layer, to balance ranks.

    Raises:
        ConfigError: if a degree does not divide `tp_size`, the message lists those that do; or if
            there are no groups of experts to exchange rows between, or to balance.
    """

    tp_size: int = 1
    attn_dp_size: int = 1
    ep_size: int = 1
    moe_dense_tp_size: int | None = None
    enable_dp_lm_head: bool = False
    moe_a2a_backend: A2ABackend = A2ABackend.NONE
    moe_wire_format: WireFormat = WireFormat.NONE
    ep_num_redundant_experts: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.tp_size <= MAX_RANKS:
            raise ConfigError(f"--tp-size {self.tp_size}: must be from 1 to {MAX_RANKS}")
        for flag, size in (
            ("--attn-dp-size", self.attn_dp_size),
            ("--ep-size", self.ep_size),
            ("--moe-dense-tp-size", self.ffn_tp),
        ):
            if size < 1 or self.tp_size % size:
                raise ConfigError(
                    f"{flag} {size} does not divide --tp-size {self.tp_size}; "
                    f"{_listed(divisors(self.tp_size))} would"
                )
        if self.ep_num_redundant_experts < 0:
            raise ConfigError(
                f"--ep-num-redundant-experts {self.ep_num_redundant_experts}: must be at least 0"
            )
        deepep = self.moe_a2a_backend is A2ABackend.DEEPEP
        if deepep and self.moe_wire_format is WireFormat.NVFP4:
            raise ConfigError(
                "--moe-wire-format nvfp4 with --moe-a2a-backend deepep: none or fp8 would work"
            )
        if self.ep_size == 1:
            for flag, used in (
                (f"--moe-a2a-backend {self.moe_a2a_backend}", self.exchanges),
                (
                    f"--ep-num-redundant-experts {self.ep_num_redundant_experts}",
                    self.ep_num_redundant_experts > 0,
                ),
            ):
                if used:
                    raise ConfigError(
                        f"{flag}: needs experts on several groups of ranks; --ep-size "
                        f"{_listed(divisors(self.tp_size)[1:]) or 'above 1'} would give them"
                    )

    @property
    def exchanges(self) -> bool:
        """Whether rows may go to the ranks of their experts by all-to-all."""
        return self.moe_a2a_backend is not A2ABackend.NONE

    @property
    def routes_locally(self) -> bool:
        """Whether rows choose their experts before they travel."""
        return self.exchanges or self.moe_wire_format is not WireFormat.NONE

    @property
    def attn_tp(self) -> int:
        """Ranks that share the attention of one DP group."""
        return self.tp_size // self.attn_dp_size

    @property
    def moe_tp(self) -> int:
        """Ranks that share each expert."""
        return self.tp_size // self.ep_size

    @property
    def ffn_tp(self) -> int:
        """Ranks that share one dense FFN."""
        return self.tp_size if self.moe_dense_tp_size is None else self.moe_dense_tp_size

    @property
    def lm_tp(self) -> int:
        """Ranks over which the lm_head is sharded."""
        return self.attn_tp if self.enable_dp_lm_head else self.tp_size

    @property
    def flags(self) -> str:
        """The flags that say this, as a user would type them."""
        parts = [f"--tp-size {self.tp_size}"]
        if self.attn_dp_size > 1:
            parts.append(f"--attn-dp-size {self.attn_dp_size}")
        if self.moe_dense_tp_size is not None:
            parts.append(f"--moe-dense-tp-size {self.moe_dense_tp_size}")
        if self.enable_dp_lm_head:
            parts.append("--enable-dp-lm-head")
        return " ".join([*parts, *self.expert_flags])

    @property
    def expert_flags(self) -> list[str]:
        """Those of `flags` that mean nothing to a model without routed experts."""
        parts = []
        if self.ep_size > 1:
            parts.append(f"--ep-size {self.ep_size}")
        if self.exchanges:
            parts.append(f"--moe-a2a-backend {self.moe_a2a_backend}")
        if self.moe_wire_format is not WireFormat.NONE:
            parts.append(f"--moe-wire-format {self.moe_wire_format}")
        if self.ep_num_redundant_experts:
            parts.append(f"--ep-num-redundant-experts {self.ep_num_redundant_experts}")
        return parts

    def __str__(self) -> str:
        """The shorthand: `tp8,dp4,ep8`, where dp is attention DP."""
        parts = [f"tp{self.tp_size}"]
        if self.attn_dp_size > 1:
            parts.append(f"dp{self.attn_dp_size}")
        if self.ep_size > 1:
            parts.append(f"ep{self.ep_size}")
        if self.moe_dense_tp_size is not None:
            parts.append(f"dense{self.moe_dense_tp_size}")
        if self.enable_dp_lm_head:
            parts.append("dplm")
        for word, (field, value) in _WORDS.items():
            if word != "dplm" and getattr(self, field) == value:
                parts.append(word)
        if self.ep_num_redundant_experts:
            parts.append(f"red{self.ep_num_redundant_experts}")
        return ",".join(parts)

    @classmethod
    def parse(cls, shorthand: str) -> "Parallelism":
        """Reads the shorthand that `str` prints.

        Raises:
            ConfigError: if a part is none that there is.
        """
        fields = {"tp": "tp_size", "dp": "attn_dp_size", "ep": "ep_size"}
        fields |= {"dense": "moe_dense_tp_size", "red": "ep_num_redundant_experts"}
        values: dict[str, object] = {}
        for part in map(str.strip, shorthand.split(",")):
            match = _SHORTHAND.match(part)
            name: str
            value: object
            if part in _WORDS:
                name, value = _WORDS[part]
            elif match:
                name, value = fields[match[1]], int(match[2])
            else:
                words = ", ".join(_WORDS)
                raise ConfigError(
                    f"layout {shorthand!r}: {part!r} is not one of tpN, dpN, epN, denseN, redN, "
                    f"{words} (an example: tp8,dp4,ep8)"
                )
            if name in values:
                raise ConfigError(f"layout {shorthand!r}: {part!r} says something a second time")
            values[name] = value
        if "tp_size" not in values:
            raise ConfigError(f"layout {shorthand!r}: tpN, the number of ranks, is missing")
        return cls(**values)  # type: ignore[arg-type]

    def with_sizes(self, **sizes: int) -> "Parallelism":
        """The same flags with other sizes."""
        return replace(self, **sizes)  # type: ignore[arg-type]


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
