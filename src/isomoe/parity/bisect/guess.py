"""What sort of defect it is: hypotheses, tried on the rows that are off.

The classes are those of known reduction bugs (SGLang #23731, #36884, #37199 and their like).
"""

from dataclasses import dataclass, replace

import torch

from isomoe.parity.bisect.assemble import Recording, Whole
from isomoe.parity.bisect.compare_rows import best_scale, nearest, typical_error
from isomoe.parity.bisect.locate import Found, Rows, arrived, carried
from isomoe.parity.bisect.ranks import of_block, of_read
from isomoe.parity.bisect.result import CLOSE, Defect, Guess
from isomoe.parity.bisect.stations import Kind

_MANY = 8
"""Fewer rows than these may be alike by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The rows of a station that is off.

    Attributes:
        came: those that are off.
        due: what should have come, of all rows that there were.
        guess: the class of the defect.
    """

    came: Whole
    due: Whole
    guess: Guess

    @property
    def ratio(self) -> float:
        """The median ratio of the norms."""
        due = self.due.at(self.came.places)
        sizes = due.x.norm(dim=1).clamp_min(1e-30)
        return float((self.came.x.norm(dim=1) / sizes).median())


def examine(found: Found, other: Rows) -> Evidence:
    """The class of the defect at a station that is off, and what shows it.

    Args:
        other: the side that is off.
    """
    assert found.off is not None
    off = found.places[found.off]
    station = found.station
    came, due = other.whole(station), found.baseline
    guesses: list[Guess | None] = []
    move = isinstance(other, Recording) and station.kind in (Kind.READ, Kind.DELIVERY)
    if isinstance(other, Recording):
        if move:
            came, due = arrived(other, station)
        if station.kind is Kind.READ:
            before = carried(other, station.name)
            guesses += [
                of_read(other, station),
                _moved_rows(other.whole(station).at(off), _total(before, due)),
                _with_residual(came.at(off), due, before),
            ]
        elif station.name in other.steps[0].dumps[0].plan.gives:
            guesses.append(of_block(other, station, due, off))
    came = came.at(off)
    guesses += [_moved_rows(came, due), _by_rows(came, due, move)]
    return Evidence(
        came=came, due=due, guess=next((g for g in guesses if g is not None), _by_kind(found))
    )


def _with_residual(came: Whole, due: Whole, before: Whole | None) -> Guess | None:
    """Whether a read added the residual stream itself once more, or several times."""
    if before is None:
        return None
    extra = came.x - due.at(came.places).x
    factor, misfit = best_scale(extra, before.at(came.places).x)
    if misfit > CLOSE:
        return None
    return Guess(Defect.DOUBLE_REDUCE, f"the residual stream is added {factor:.3g} times more")


def _total(before: Whole | None, written: Whole) -> Whole:
    """The residual stream that a read should have made of what was written."""
    if before is None:
        return written
    return replace(written, x=written.x + before.at(written.places).x)


def _by_rows(came: Whole, due: Whole, move: bool) -> Guess | None:
    """Hypotheses that need whole rows alone."""
    x, y = came.x, due.at(came.places).x
    if not bool(torch.isfinite(x).all()):
        return Guess(Defect.UNKNOWN, "NaN or infinite")
    if not bool(x.any()):
        if len(x) < len(due.x):
            return Guess(Defect.MISSING_REDUCE, "they are zero: what they lack is on other ranks")
        return Guess(Defect.UNKNOWN, "every row is zero")
    factor, misfit = best_scale(x, y)
    if misfit < CLOSE and abs(factor - 1) < CLOSE / 10 and bool((came.spread > CLOSE).any()):
        return Guess(Defect.WRONG_ROWS, "ranks that should hold the same rows do not")
    if misfit < CLOSE:
        copies = move and round(factor) > 1 and abs(factor - round(factor)) < CLOSE
        defect = Defect.DOUBLE_REDUCE if copies else Defect.BIAS_OR_SCALE
        return Guess(defect, f"every row is {factor:.3g} times what it should be")
    extra = x - y
    if len(x) >= _MANY and typical_error(extra, extra.mean(0).expand_as(extra)) < CLOSE:
        return Guess(Defect.BIAS_OR_SCALE, "the same vector is added to every row")
    if _moved_rows(replace(came, x=extra), due) is not None:
        return Guess(Defect.WRONG_GROUP, "other tokens' rows are added")
    return None


def _moved_rows(came: Whole, pool: Whole) -> Guess | None:
    """Whether most rows are those of other tokens."""
    found = nearest(came.x, pool.x)
    # A row that is as near to its own place is not moved: tokens may be alike.
    source = torch.where(found >= 0, pool.places[found], came.places)
    steps = (source - came.places)[source != came.places]
    if 2 * len(steps) <= len(source):
        return None
    usual = int(steps.mode().values)
    alike = f", mostly {usual:+d} away" if 2 * int((steps == usual).sum()) > len(steps) else ""
    return Guess(Defect.WRONG_ROWS, f"the rows are those of other tokens{alike}")


def _by_kind(found: Found) -> Guess:
    if found.station.kind is Kind.BLOCK and found.point.block_kind == "experts":
        return Guess(Defect.ROUTING, "what comes in is right, and what comes out no multiple of it")
    return Guess(Defect.UNKNOWN, "neither a multiple of what it should be nor other tokens' rows")
