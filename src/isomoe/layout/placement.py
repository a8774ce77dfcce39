"""How an activation lies on the mesh: one letter an axis."""

from dataclasses import dataclass, field
from enum import StrEnum

from isomoe.errors import PlacementError
from isomoe.layout.mesh import Axes


class Letter(StrEnum):
    """What the ranks along one axis hold of an activation `[rows, features]`."""

    S = "S"
    """Different rows; the counts may differ, and may be zero."""
    R = "R"
    """The same rows, the same values."""
    P = "P"
    """The same rows, addends whose sum along the axis is the value."""
    C = "C"
    """The same rows, different features. Only inside a block."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One letter for each mesh axis; row-sharded axes come first, since rows are ordered by rank.

    Raises:
        PlacementError: for an unknown letter, or an S behind another letter.
    """

    letters: str
    row_axes: int = field(init=False, repr=False, compare=False)
    """How many leading axes are row-sharded."""

    def __post_init__(self) -> None:
        if set(self.letters) - set(Letter):
            raise PlacementError(f"placement {self.letters!r}: letters are S, R, P and C")
        if "S" in self.letters.lstrip("S"):
            axis = self.letters.rindex("S")
            raise PlacementError(
                f"placement {self.letters!r}: axis {axis} is S behind an axis that is not; "
                "row-sharded axes come first"
            )
        prefix = len(self.letters) - len(self.letters.lstrip("S"))
        object.__setattr__(self, "row_axes", prefix)

    def __hash__(self) -> int:
        return hash(self.letters)

    def __str__(self) -> str:
        return self.letters

    def __len__(self) -> int:
        return len(self.letters)

    def where(self, letter: Letter) -> Axes:
        """The axes that hold `letter`."""
        return tuple(a for a, held in enumerate(self.letters) if held == letter)

    def put(self, letter: Letter, axes: Axes) -> "Placement":
        """This placement with `letter` on `axes`."""
        return Placement(
            "".join(letter if a in axes else held for a, held in enumerate(self.letters))
        )


def replicated(axes: int) -> Placement:
    """R on all axes."""
    return Placement("R" * axes)


def row_sharded(prefix: int, axes: int) -> Placement:
    """S on the first `prefix` axes, R on the rest."""
    return Placement("S" * prefix + "R" * (axes - prefix))
