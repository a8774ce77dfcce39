"""How an activation lies on the mesh: one letter an axis."""

from enum import StrEnum
from functools import cache

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


class Placement(str):
    """One letter for each mesh axis; row-sharded axes come first, since rows are ordered by rank.

    A string of its letters, so that placements compare, hash and print as fast as strings do.

    Attributes:
        row_axes: how many leading axes are row-sharded.

    Raises:
        PlacementError: for an unknown letter, or an S behind another letter.
    """

    row_axes: int

    def __new__(cls, letters: str) -> "Placement":
        if set(letters) - set(Letter):
            raise PlacementError(f"placement {letters!r}: letters are S, R, P and C")
        others = letters.lstrip("S")
        if "S" in others:
            raise PlacementError(
                f"placement {letters!r}: axis {letters.rindex('S')} is S behind an axis that is "
                "not; row-sharded axes come first"
            )
        placement = super().__new__(cls, letters)
        placement.row_axes = len(letters) - len(others)
        return placement

    def where(self, letter: Letter) -> Axes:
        """The axes that hold `letter`."""
        return _where(self, letter)

    def put(self, letter: Letter, axes: Axes) -> "Placement":
        """This placement with `letter` on `axes`."""
        return _put(self, letter, axes)


@cache
def _where(placement: Placement, letter: Letter) -> Axes:
    return tuple(a for a, held in enumerate(placement) if held == letter)


@cache
def _put(placement: Placement, letter: Letter, axes: Axes) -> Placement:
    return Placement("".join(letter if a in axes else held for a, held in enumerate(placement)))


@cache
def row_sharded(prefix: int, axes: int) -> Placement:
    """S on the first `prefix` axes, R on the rest."""
    return Placement("S" * prefix + "R" * (axes - prefix))
