"""Routes: the cheapest chains of moves between placements, their last sum fused or not."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from itertools import count
from math import inf, prod

from isomoe.errors import PlacementError
from isomoe.layout.cost import CostModel, Machine
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, chains_from, cheapest, sums_into, unreachable
from isomoe.layout.parallelism import Parallelism
from isomoe.layout.placement import Placement
from isomoe.layout.plan import Regime, Route

Pair = tuple[Placement, Placement]
"""(before, after)."""

Item = Pair | Move
"""What has a price: a way between two placements, or a move inside a block."""

Found = tuple[float, tuple[Move, ...], int]
"""Microseconds, the moves, and their number."""


@cache
def number_of(thing: object) -> int:
    """A number of its own for each distinct thing: compares faster than the thing.

    Kept for the life of the process, so that planners of different chains agree: one plan has some
    tens of things, a proof of all models some thousands.
    """
    return next(_NUMBERS)


_NUMBERS = count()


class Routes:
    """The cheapest routes between placements in one regime; the same for all models of a width."""

    def __init__(self, cost: CostModel, regime: Regime) -> None:
        self._cost = cost
        self._regime = regime
        self._found: dict[Item, Found] = {}
        self._fused: dict[Pair, Found | None] = {}
        self._search: dict[Placement, Iterator[tuple[Placement, float, tuple[Move, ...]]]] = {}
        self._routes: dict[Pair, Route] = {}
        self._prices: dict[Move, float] = {}

    def cheapest(self, item: Item) -> Found:
        """The cheapest way of an item.

        Raises:
            PlacementError: if there is none.
        """
        if item in self._found:
            return self._found[item]
        if isinstance(item, Move):
            self._found[item] = self._price(item), (item,), number_of((item,))
            return self._found[item]
        before, after = item
        if before not in self._search:
            self._search[before] = chains_from(before, self._price)
        while item not in self._found:  # one search serves all that lie on its way
            reached = next(self._search[before], None)
            if reached is None:
                raise unreachable(before, after)
            here, us, moves = reached
            self._found[before, here] = us, moves, number_of(moves)
        return self._found[item]

    def fused(self, pair: Pair) -> Found | None:
        """The cheapest way that ends with a sum in one operation with the norm, if one does."""
        if pair not in self._fused:
            before, after = pair
            best = None
            for last in sums_into(after):
                end = self._cost.fused_microseconds(last, self._regime.rows, self._regime.equal)
                if end == inf:
                    continue
                try:
                    us, moves, _ = self.cheapest((before, last.before))
                except PlacementError:
                    continue
                if best is None or us + end < best[0]:
                    best = us + end, (*moves, last), number_of((*moves, last, "fused"))
            self._fused[pair] = best
        return self._fused[pair]

    def saved(self, pair: Pair) -> float:
        """Microseconds that fusing the last sum saves; 0 if it saves nothing."""
        fused = self.fused(pair)
        return 0.0 if fused is None else max(0.0, self.cheapest(pair)[0] - fused[0])

    @property
    def runs_beside(self) -> bool:
        """Whether a second stream pays in steps of so many rows."""
        return self._regime.rows <= self._cost.machine.second_stream_rows

    @property
    def has_fused(self) -> bool:
        """Whether there is any fused sum on this machine."""
        return self._cost.machine.fused is not None

    def between(self, before: Placement, after: Placement) -> Route:
        """The cheapest route, and the one that it beat.

        Raises:
            PlacementError: if there is none.
        """
        key = (before, after)
        if key not in self._routes:
            us, moves, _ = self.cheapest(key)
            beats = None
            if moves:
                try:
                    other_us, other = cheapest(before, after, self._price, avoid=moves[0])
                    beats = self._route(other, other_us, None)
                except PlacementError:
                    beats = None
            self._routes[key] = self._route(moves, us, beats)
        return self._routes[key]

    def fused_between(self, before: Placement, after: Placement) -> Route:
        """The cheapest route with a fused sum at its end; it beat that without."""
        fused = self.fused((before, after))
        assert fused is not None
        us, moves, _ = fused
        return replace(self._route(moves, us, self.between(before, after)), fused=True)

    def _route(self, moves: tuple[Move, ...], us: float, beats: Route | None) -> Route:
        sent = sum(self._cost.sent_bytes_per_row(move) for move in moves)
        return Route(moves=moves, sent_bytes_per_row=sent, predicted_us=us, beats=beats)

    def _price(self, move: Move) -> float:
        price = self._prices.get(move)
        if price is None:
            regime = self._regime
            price = self._cost.microseconds(move, regime.rows, regime.equal)
            self._prices[move] = price
        return price


@lru_cache(maxsize=1024)
def routes_of(machine: Machine, axes: tuple[int, ...], row_values: int, regime: Regime) -> Routes:
    """The routes of steps on one machine and mesh; kept, since many chains share them."""
    ranks = Mesh(axes=axes, parallelism=Parallelism(tp_size=prod(axes)))
    return Routes(CostModel(machine=machine, mesh=ranks, row_values=row_values), regime)
