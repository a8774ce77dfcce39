"""From a text to its answer, and from right answers to an accuracy."""

import math
import re
from dataclasses import dataclass

_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
"""A number as lm-evaluation-harness's `flexible-extract` of gsm8k finds it."""
_Z_95 = 1.959963984540054
"""Of a two-sided 95% interval."""


def strict_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """The first group of the first match, as `normalized`; None if there is no match."""
    found = pattern.search(text)
    return normalized(found[1]) if found else None


def flexible_answer(text: str) -> str | None:
    """The last number in the text, as `normalized`; None if there is none."""
    found = list(_FLEXIBLE.finditer(text))
    return normalized(found[-1][0]) if found else None


def normalized(answer: str) -> str:
    """Without commas, dollar signs and a final full stop: `$1,234.` is `1234`.

    The answers are compared as texts, as the harness does: `5.00` is not `5`.
    """
    return answer.strip().replace(",", "").replace("$", "").removesuffix(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """`right` of `total`.

    Raises:
        ValueError: if there is no total.
    """

    right: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.total or not self.total:
            raise ValueError(f"{self.right} of {self.total} is no share")

    @property
    def value(self) -> float:
        """As a number from 0 to 1."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927) at 95%: it holds for shares near 0 and 1 as well."""
        n, p, z2 = self.total, self.value, _Z_95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # Exact at the ends, where rounding would leave the share outside.
        low = middle - half if self.right else 0.0
        high = middle + half if self.right < n else 1.0
        return low, high

    def to_json(self) -> dict[str, object]:
        """As a plain dict."""
        return {
            "accuracy": self.value,
            "right": self.right,
            "n": self.total,
            "interval": list(self.interval),
        }
