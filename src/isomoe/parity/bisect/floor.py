"""The noise floor: what rounding alone does at each station, measured, with a margin."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isomoe.parity.bisect.compare_rows import Apart

MARGIN = 4.0
"""The floor of medians is so many times what was measured. Six clean layouts of the bundled
checkpoint, in bf16 and fp32, stay below 0.27 of it at every station."""
_ROWS_MARGIN = 2
"""The same of how many rows may be off; clean layouts stay below 0.4 of it."""
_FEW_ROWS = 8
"""So many rows may be off in any case, since near ties a token is routed to other experts."""
_LEAST_RATIO = 1e-4
"""No scale error is so small; the rounding of fp32 is smaller still."""
_MANY_ROWS = 40
"""The median ratio of fewer rows says little of one percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What may be off at one station.

    Attributes:
        error: the median error at most.
        ratio: how far the median ratio of norms may be from 1 at most.
        rows: how many rows may exceed `error` at most.
    """

    error: float
    ratio: float
    rows: int

    @classmethod
    def of(cls, noise: Sequence[Apart], eps: float, before: "Floor | None") -> "Floor":
        """The floor at one station.

        Args:
            noise: clean runs against one another.
            eps: of the model's dtype; no floor is below it, since a clean run may be lucky.
            before: at the last station of this kind; rounding does not grow less.
        """
        least = MARGIN * eps
        error = max(least, *(MARGIN * one.median for one in noise), before.error if before else 0.0)
        ratio = max(eps, _LEAST_RATIO, *(MARGIN * abs(one.ratio - 1) for one in noise))
        off = max((int((one.error > error).sum()) for one in noise), default=0)
        return cls(
            error=error,
            ratio=max(ratio, before.ratio if before else 0.0),
            rows=max(_ROWS_MARGIN * off + _FEW_ROWS, before.rows if before else 0),
        )

    def exceeded(self, found: Apart) -> torch.Tensor | None:
        """Which rows are off, [n] bool; None if what was found may be rounding."""
        off = found.error > self.error
        # Of few rows all must be off: one that is routed otherwise may stand for many.
        most = found.median > self.error if len(off) >= _FEW_ROWS else bool(off.all())
        if most or int(off.sum()) > self.rows:
            return off
        if abs(found.ratio - 1) > self.ratio and len(off) >= _MANY_ROWS:
            return torch.ones_like(off)
        return None
