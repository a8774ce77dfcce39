"""The planner: which residual placements, variants and moves a chain takes, by predicted time.

A dynamic program over the chain of reads picks the residual's own placement, the blocks' variants
and the moves together. What it picks depends on how many rows a step has and on whether every
attention-DP group has the same number: one regime each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, pairwise, product
from math import prod
from operator import add

from isomoe.errors import PlacementError
from isomoe.layout.chain import BlockSpec, Chain, Variant
from isomoe.layout.cost import CostModel, Machine
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, chains_from, cheapest, unreachable
from isomoe.layout.parallelism import Parallelism
from isomoe.layout.placement import Placement, row_sharded
from isomoe.layout.plan import Delivery, Plan, ReadPlan, Regime, RegimePlan, Route, Settle, regimes


def make_plan(chain: Chain, machine: Machine, wanted: Sequence[Regime] | None = None) -> Plan:
    """Plans every regime.

    Raises:
        PlacementError: if a placement that a block declares cannot be reached, or left.
    """
    planner = Planner(chain)
    chosen = regimes(chain.mesh) if wanted is None else wanted
    return Plan(
        mesh=chain.mesh,
        machine=machine,
        regimes=tuple(planner.choose(machine, regime).bind() for regime in chosen),
    )


_State = tuple[Placement | None, tuple[Variant, ...]]
"""After a read: the residual's placement (None before the first) and each consumer's variant."""


_Pair = tuple[Placement, Placement]
"""(before, after)."""


@cache
def _number(thing: object) -> int:
    """A number of its own for each distinct thing: compares faster than the thing.

    Kept for the life of the process, so that planners of different chains agree: one plan has some
    tens of things, a proof of all models some thousands.
    """
    return next(_NUMBERS)


_NUMBERS = count()


class _Routes:
    """The cheapest routes between placements in one regime; the same for all models of a width."""

    def __init__(self, cost: CostModel, regime: Regime) -> None:
        self._cost = cost
        self._regime = regime
        self._found: dict[_Pair, tuple[float, tuple[Move, ...], int]] = {}
        self._search: dict[Placement, Iterator[tuple[Placement, float, tuple[Move, ...]]]] = {}
        self._routes: dict[_Pair, Route] = {}
        self._prices: dict[Move, float] = {}

    def cheapest(self, key: _Pair) -> tuple[float, tuple[Move, ...], int]:
        """Between (before, after): microseconds, the moves, and their number.

        Raises:
            PlacementError: if there are none.
        """
        before, after = key
        if before not in self._search:
            self._search[before] = chains_from(before, self._price)
        while key not in self._found:  # one search serves all that lie on its way
            reached = next(self._search[before], None)
            if reached is None:
                raise unreachable(before, after)
            here, us, moves = reached
            self._found[before, here] = us, moves, _number(moves)
        return self._found[key]

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
def _routes(machine: Machine, axes: tuple[int, ...], row_values: int, regime: Regime) -> _Routes:
    ranks = Mesh(axes=axes, parallelism=Parallelism(tp_size=prod(axes)))
    return _Routes(CostModel(machine=machine, mesh=ranks, row_values=row_values), regime)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the planner chose for one regime, not yet bound to the blocks' names.

    Attributes:
        key: equal for choices on equal axes that make the same moves, on rows of the same form,
            between blocks that run the same variants.
        bind: makes the plan of it.
    """

    regime: Regime
    key: object
    bind: Callable[[], RegimePlan]


class _Steps:
    """The steps from the states before a read to those after it, and what each moves.

    Attributes:
        settles: for each residual after the read and each state before it, the sum that settles.
        deliveries: for each state after the read its residual, and the sum that it delivers.
    """

    def __init__(
        self, old: list[_State], new: list[_State], add: Callable[[list[_Pair]], int]
    ) -> None:
        self.settles: dict[Placement, list[int]] = {}
        self.deliveries: list[tuple[Placement, int]] = []
        for residual, variants in new:
            assert residual is not None
            needs = dict.fromkeys(v.needs for v in variants if v.needs is not None)
            self.deliveries.append((residual, add([(residual, need) for need in needs])))
            if residual not in self.settles:
                self.settles[residual] = [
                    add(
                        [(v, residual) for v in dict.fromkeys(v.gives for v in written)]
                        + ([] if carried is None else [(carried, residual)])
                    )
                    for carried, written in old
                ]


class Planner:
    """Plans one chain: a search over the states after each read, for the cheapest path.

    Which states there are, and which routes lie between them, is worked out once; a regime only
    has its own prices.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        axes = len(chain.mesh.axes)
        residuals = [row_sharded(k, axes) for k in range(len(chain.mesh.attn_dp), axes + 1)]
        self._pairs: dict[_Pair, int] = {}
        self._sums: dict[tuple[int, ...], int] = {}
        kinds: dict[object, list[_State]] = {}
        self._states: list[list[_State]] = [[(None, (v,)) for v in chain.embedding.variants]]
        for read in chain.reads:
            variants = tuple(block.variants for block in read.consumers)
            if variants not in kinds:
                kinds[variants] = list(product(residuals, product(*variants)))
            self._states.append(kinds[variants])
        steps: dict[tuple[int, int], _Steps] = {}
        self._steps: list[_Steps] = []
        for old, new in pairwise(self._states):
            key = (id(old), id(new))
            if key not in steps:
                steps[key] = _Steps(old, new, self._sum_of)
            self._steps.append(steps[key])
        self._paths: dict[tuple[int, ...], tuple[object, tuple[int, ...]]] = {}
        self._kind = _number(
            (
                chain.mesh.axes,
                chain.mesh.attn_dp,
                tuple(
                    (
                        read.selects_rows,
                        *((b.kind, b.inner) if b.inner else None for b in read.consumers),
                    )
                    for read in chain.reads
                ),
            )
        )

    def choose(self, machine: Machine, regime: Regime) -> Choice:
        """The cheapest path of a regime.

        Raises:
            PlacementError: if a placement that a block declares cannot be reached, or left.
        """
        routes = _routes(machine, self.chain.mesh.axes, self.chain.hidden_size, regime)
        found = [routes.cheapest(pair) for pair in self._pairs]
        us = [price for price, _, _ in found]
        sums = [sum(map(us.__getitem__, pairs)) for pairs in self._sums]
        total, path = self._cheapest_path(sums)
        if path not in self._paths:
            self._paths[path] = self._described(path)
        states, pairs = self._paths[path]
        return Choice(
            regime=regime,
            key=(self._kind, regime.equal, states, *(found[pair][2] for pair in pairs)),
            bind=lambda: self._bind(regime, routes.between, path, total),
        )

    def _sum_of(self, pairs: list[_Pair]) -> int:
        numbers = tuple(self._pairs.setdefault(pair, len(self._pairs)) for pair in pairs)
        return self._sums.setdefault(numbers, len(self._sums))

    def _cheapest_path(self, sums: list[float]) -> tuple[float, tuple[int, ...]]:
        """Viterbi over the reads. Of equal paths, that of the first states.

        Args:
            sums: microseconds of each sum of routes.

        Returns:
            Its microseconds, and which of the states it takes before and after each read.
        """
        frontier = [0.0] * len(self._states[0])
        origins: list[list[int]] = []
        tables: dict[int, list[list[float]]] = {}
        for step in self._steps:
            if id(step) not in tables:
                tables[id(step)] = [
                    [sums[settle] + sums[delivery] for settle in step.settles[residual]]
                    for residual, delivery in step.deliveries
                ]
            reached, before = [], []
            for costs in tables[id(step)]:
                totals = list(map(add, frontier, costs))
                least = min(totals)
                reached.append(least)
                before.append(totals.index(least))
            frontier = reached
            origins.append(before)
        total = min(frontier)
        path = [frontier.index(total)]
        for before in reversed(origins):
            path.append(before[path[-1]])
        return total, tuple(reversed(path))

    def _described(self, path: tuple[int, ...]) -> tuple[object, tuple[int, ...]]:
        """The states of a path, and the routes that lie along it."""
        states = [states[at] for states, at in zip(self._states, path, strict=True)]
        by_number = list(self._sums)
        along: dict[int, None] = {}
        for step, old, new in zip(self._steps, path, path[1:], strict=False):
            residual, delivery = step.deliveries[new]
            along |= dict.fromkeys(by_number[step.settles[residual][old]] + by_number[delivery])
        return _number(tuple(states)), tuple(along)

    def _bind(
        self,
        regime: Regime,
        between: Callable[[Placement, Placement], Route],
        path: tuple[int, ...],
        total: float,
    ) -> RegimePlan:
        (_, (embedding,)), *states = (
            states[at] for states, at in zip(self._states, path, strict=True)
        )
        carried: Placement | None = None
        written: list[tuple[BlockSpec, Variant]] = [(self.chain.embedding, embedding)]
        reads, inner = [], []
        for read, (residual, variants) in zip(self.chain.reads, states, strict=True):
            assert residual is not None
            carry = None
            if carried is not None:
                carry = _settle(read.name, ("residual",), carried, residual, between)
            sources: dict[Placement, list[str]] = {}
            for block, variant in written:
                sources.setdefault(variant.gives, []).append(block.name)
            settles = [
                _settle(read.name, tuple(names), gives, residual, between)
                for gives, names in sources.items()
            ]
            deliveries = []
            for block, variant in zip(read.consumers, variants, strict=True):
                assert variant.needs is not None
                route = between(residual, variant.needs)
                deliveries.append(
                    Delivery(
                        consumer=block.name,
                        residual=residual,
                        needs=variant.needs,
                        gives=variant.gives,
                        route=route,
                    )
                )
                if block.inner:
                    inner.append((block.name, block.inner))
            reads.append(
                ReadPlan(
                    name=read.name,
                    residual=residual,
                    selects_rows=read.selects_rows,
                    carry=carry,
                    settles=tuple(settles),
                    deliveries=tuple(deliveries),
                )
            )
            carried, written = residual, list(zip(read.consumers, variants, strict=True))
        return RegimePlan(
            regime=regime,
            mesh=self.chain.mesh,
            embedding=self.chain.embedding.name,
            embedding_gives=embedding.gives,
            reads=tuple(reads),
            inner=tuple(inner),
            kinds={
                self.chain.embedding.name: self.chain.embedding.kind,
                **{b.name: b.kind for read in self.chain.reads for b in read.consumers},
            },
            predicted_us=total,
        )


def _settle(
    read: str,
    producers: tuple[str, ...],
    gives: Placement,
    residual: Placement,
    between: Callable[[Placement, Placement], Route],
) -> Settle:
    return Settle(
        before=read,
        producers=producers,
        gives=gives,
        residual=residual,
        route=between(gives, residual),
    )
