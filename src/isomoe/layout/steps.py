"""The steps from one read to the next: which there are, and what each costs.

Many chains have the same, and share them: which there are is a question of mesh axes and variants,
what they cost one of the machine, the hidden size and the regime besides.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import NamedTuple

from isomoe.layout.chain import Variant
from isomoe.layout.cost import Machine
from isomoe.layout.placement import Letter, Placement
from isomoe.layout.plan import Regime
from isomoe.layout.routes import Item, Pair, Routes, number_of, routes_of

State = tuple[Placement | None, tuple[Variant, ...]]
"""After a read: the residual's placement (None before the first) and each consumer's variant."""

Numbers = tuple[int, ...]
"""Those of routes."""


class Place(NamedTuple):
    """What there is to choose from at a read: placements of the residual, and variants of each
    consumer. Before the first read: variants of the embedding."""

    residuals: tuple[Placement | None, ...]
    variants: tuple[tuple[Variant, ...], ...]

    def states(self) -> list[State]:
        """Every choice."""
        return list(product(self.residuals, product(*self.variants)))


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """What is done at once, and costs what its items do. `sum_of` makes one of equal ones.

    Attributes:
        addends: those of the items of which one may be fused with the norm behind them.
    """

    items: tuple[Item, ...]
    addends: tuple[Pair, ...]


@cache
def sum_of(items: tuple[Item, ...], addends: tuple[Pair, ...] = ()) -> Sum:
    """That of some items; kept, as numbers of routes are."""
    return Sum(items, addends)


class Steps:
    """The steps from the states of one place to those of the next.

    Attributes:
        old, new: these states.
        settles: for each residual after the read and each old state, what brings the residual so
            far and what was written there.
        deliveries: for each new state, what brings the rows of the read to its blocks, and through.
    """

    def __init__(self, before: Place, after: Place) -> None:
        self.old, self.new = before.states(), after.states()
        self.settles = {
            residual: [_settle(*state, residual) for state in self.old]
            for residual in after.residuals
            if residual is not None
        }
        self.deliveries = [_delivery(*state) for state in self.new]
        self._numbers: dict[tuple[int, int], int] = {}

    def settle(self, old: int, new: int) -> Sum:
        """That of a step."""
        residual, _ = self.new[new]
        assert residual is not None
        return self.settles[residual][old]

    def number(self, old: int, new: int) -> int:
        """For the state that a step leads from, and the residual that it leads to."""
        key = old, new
        if key not in self._numbers:
            self._numbers[key] = number_of((self.old[old], self.new[new][0]))
        return self._numbers[key]


def _settle(carried: Placement | None, written: tuple[Variant, ...], residual: Placement) -> Sum:
    given = dict.fromkeys(variant.gives for variant in written)
    addends = tuple((gives, residual) for gives in given)
    if carried is None:  # there is nothing to add to
        return sum_of(addends)
    return sum_of((*addends, (carried, residual)), addends)


def _delivery(residual: Placement | None, variants: tuple[Variant, ...]) -> Sum:
    assert residual is not None
    needs = dict.fromkeys(v.needs for v in variants if v.needs is not None)
    # A block's own features take the same, whatever is chosen.
    inner = (m for v in variants for m in v.inner if Letter.C not in m.before + m.after)
    return sum_of((*((residual, need) for need in needs), *inner))


class Prices:
    """What steps cost in one regime."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self._sums: dict[Sum, tuple[float, Numbers]] = {}
        self._tables: dict[Steps, list[list[float]]] = {}

    def of(self, one: Sum) -> tuple[float, Numbers]:
        """Its microseconds, and the numbers of the routes of its items.

        Raises:
            PlacementError: if there is none.
        """
        if one not in self._sums:
            fused = self.routes.fusing(one.addends)
            found = [
                self.routes.cheapest(item) if item != fused else self.routes.fused(fused)
                for item in one.items
            ]
            self._sums[one] = sum(us for us, _, _ in found), tuple(which for _, _, which in found)
        return self._sums[one]

    def table(self, steps: Steps) -> list[list[float]]:
        """Microseconds of each: for each new state, those from each old one."""
        if steps not in self._tables:
            settled = {
                residual: [self.of(settle)[0] for settle in settles]
                for residual, settles in steps.settles.items()
            }
            self._tables[steps] = [
                [us + self.of(delivery)[0] for us in settled[residual]]
                for (residual, _), delivery in zip(steps.new, steps.deliveries, strict=True)
                if residual is not None
            ]
        return self._tables[steps]


@lru_cache(maxsize=1024)
def prices_of(machine: Machine, axes: tuple[int, ...], row_values: int, regime: Regime) -> Prices:
    """Those on one machine and mesh; kept, since many chains share them."""
    return Prices(routes_of(machine, axes, row_values, regime))


@lru_cache(maxsize=4096)
def steps_between(before: Place, after: Place) -> Steps:
    """The steps from one place to the next; kept, as their prices are."""
    return Steps(before, after)
