"""The degrees of parallelism of one replica, as the flags name them."""

import re
from dataclasses import dataclass, replace

from isomoe.errors import ConfigError

MAX_RANKS = 1024
_SHORTHAND = re.compile(r"(tp|dp|ep|dense)(\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How many ways each kind of block is split over the `tp_size` ranks of a replica.

    Attributes:
        tp_size: all ranks of the replica (SGLang's meaning of the flag).
        attn_dp_size: groups of ranks that run attention on their own requests.
        ep_size: groups of ranks that each own a share of the experts.
        moe_dense_tp_size: ranks that share one dense FFN; None means `tp_size`.
        enable_dp_lm_head: shard the lm_head over an attention group instead of over all ranks.

    Raises:
        ConfigError: if a degree does not divide `tp_size`; the message lists those that do.
    """

    tp_size: int = 1
    attn_dp_size: int = 1
    ep_size: int = 1
    moe_dense_tp_size: int | None = None
    enable_dp_lm_head: bool = False

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
        if self.ep_size > 1:
            parts.append(f"--ep-size {self.ep_size}")
        if self.moe_dense_tp_size is not None:
            parts.append(f"--moe-dense-tp-size {self.moe_dense_tp_size}")
        if self.enable_dp_lm_head:
            parts.append("--enable-dp-lm-head")
        return " ".join(parts)

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
        return ",".join(parts)

    @classmethod
    def parse(cls, shorthand: str) -> "Parallelism":
        """Reads the shorthand that `str` prints.

        Raises:
            ConfigError: if a part is not one of tpN, dpN, epN, denseN, dplm.
        """
        fields = {"tp": "tp_size", "dp": "attn_dp_size", "ep": "ep_size"}
        fields["dense"] = "moe_dense_tp_size"
        values: dict[str, int | bool] = {}
        for part in shorthand.split(","):
            match = _SHORTHAND.match(part.strip())
            name: str
            value: int | bool
            if part.strip() == "dplm":
                name, value = "enable_dp_lm_head", True
            elif match:
                name, value = fields[match[1]], int(match[2])
            else:
                raise ConfigError(
                    f"layout {shorthand!r}: {part!r} is not one of tpN, dpN, epN, denseN, dplm "
                    "(an example: tp8,dp4,ep8)"
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
