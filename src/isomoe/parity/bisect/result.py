"""What a bisection found, as plain data."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from isomoe.parity.bisect.passes import Pass
from isomoe.parity.bisect.stations import Kind


class Defect(StrEnum):
    """The class of a defect, guessed from the numbers."""

    DOUBLE_REDUCE = "double reduce"
    """What was summed already, or is the same on every rank, is summed again."""
    MISSING_REDUCE = "missing reduce"
    """Addends are handed on as if they were the sum."""
    WRONG_GROUP = "wrong group"
    """A sum over ranks that hold other rows."""
    WRONG_ROWS = "wrong rows"
    """The right numbers in the rows of other tokens."""
    BIAS_OR_SCALE = "bias or scale"
    """Every row is multiplied by the same factor, or has the same vector added."""
    ROUTING = "routing"
    """A token's experts or their weights are other than the baseline's."""
    UNKNOWN = "unknown"


CLOSE = 0.1
"""Two things are the same to a guess if their typical rows differ by less, relative to their size:
far above rounding, far below any of the defects."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A class of defect, and why."""

    defect: Defect
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One station, compared.

    Attributes:
        kind: what happens there.
        name: of the block, or of the norm that reads.
        layer: of the block; None before the first layer and behind the last.
        block: what writes, norms or is delivered to; at a read, the blocks that it settles.
        block_kind: what sort of block that is.
        placement: how the rows lie on the mesh of the other side.
        median, worst: over the rows, norm of the difference relative to the baseline's row.
        floor: what `median` may be at most by rounding.
        ratio: of the rows' norms to the baseline's, the median.
        rows: how many were compared.
        rows_off: how many of them differ by more than the floor.
        is_off: whether that is more than rounding, or ranks disagree. At reads and deliveries:
            whether what arrived is not what was written or normed.
    """

    kind: Kind
    name: str
    layer: int | None
    block: str
    block_kind: str
    placement: str
    median: float
    worst: float
    floor: float
    ratio: float
    rows: int
    rows_off: int
    is_off: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """The first station at which the sides part.

    Attributes:
        kind, layer, block, block_kind: as in `Point`.
        placement: what the block gives; of a move, where from and where to: "PP -> SR".
        rows: "all", or which.
        ratio: norm of what came to what should have come, the median over these rows.
        guess: the class of the defect.
        sentence: all of it, for people.
    """

    kind: Kind
    layer: int | None
    block: str
    block_kind: str
    placement: str
    rows: str
    ratio: float
    guess: Defect
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """Two sides, station by station.

    Attributes:
        baseline, other: their names.
        batches: how the prompts were batched when the sides parted; together if they do not.
        rows: tokens that were compared.
        stations: in the order of the forward pass.
        culprit: None if they do not part.
    """

    baseline: str
    other: str
    batches: Pass
    rows: int
    stations: tuple[Point, ...]
    culprit: Culprit | None

    @property
    def curve(self) -> tuple[Point, ...]:
        """The residual stream at each read."""
        return tuple(point for point in self.stations if point.kind is Kind.READ)

    @property
    def sentence(self) -> str:
        """The outcome in one line."""
        if self.culprit is None:
            return f"no station of {len(self.stations)} leaves the noise floor"
        return self.culprit.sentence

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, with `curve` and `sentence`; what is not finite is null."""
        points = [_finite(asdict(point)) for point in self.stations]
        return {
            "baseline": self.baseline,
            "other": self.other,
            "batches": self.batches,
            "rows": self.rows,
            "sentence": self.sentence,
            "culprit": None if self.culprit is None else _finite(asdict(self.culprit)),
            "curve": [point for point in points if point["kind"] is Kind.READ],
            "stations": points,
        }


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }
