"""The planner: which residual placements, variants and moves a chain takes, by predicted time.

A dynamic program over the chain of reads picks the residual's own placement, the blocks' variants
and the moves together. What it picks depends on how many rows a step has and on whether every
attention-DP group has the same number: one regime each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from operator import add
from typing import NamedTuple

from isomoe.layout.chain import BlockSpec, Chain, Variant
from isomoe.layout.cost import Machine
from isomoe.layout.moves import Move
from isomoe.layout.placement import Letter, Placement
from isomoe.layout.plan import (
    Delivery,
    Plan,
    ReadPlan,
    Regime,
    RegimePlan,
    Route,
    Settle,
    regimes,
    residual_placements,
)
from isomoe.layout.routes import Found, Item, Routes, number_of, routes_of


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the planner chose for one regime, not yet bound to the blocks' names.

    Attributes:
        key: a part for the step to each read, and one for what is behind the last. On equal axes
            parts are equal for steps that make the same moves, on rows of the same form, between
            blocks that run the same variants.
        bind: makes the plan of it.
    """

    regime: Regime
    key: tuple[object, ...]
    bind: Callable[[], RegimePlan]


class _Sum(NamedTuple):
    """What a step from one read to the next costs, by the numbers of its items.

    Attributes:
        items: of which it is the sum.
        addends: those of them of which one may be fused with the norm behind it.
    """

    items: tuple[int, ...]
    addends: tuple[int, ...] = ()


class _Steps:
    """The steps from the states before a read to those after it, and what each moves.

    Attributes:
        settles: for each residual after the read and each state before it, the sum that settles.
        deliveries: for each state after the read its residual, and the sum that it delivers.
    """

    def __init__(
        self,
        old: list[_State],
        new: list[_State],
        number: Callable[[Item], int],
        add: Callable[[_Sum], int],
    ) -> None:
        self.settles: dict[Placement, list[int]] = {}
        self.deliveries: list[tuple[Placement, int]] = []
        for residual, variants in new:
            assert residual is not None
            needs = dict.fromkeys(v.needs for v in variants if v.needs is not None)
            items: list[Item] = [(residual, need) for need in needs]
            # A block's own features take the same, whatever is chosen.
            items += [m for v in variants for m in v.inner if Letter.C not in m.before + m.after]
            self.deliveries.append((residual, add(_Sum(tuple(map(number, items))))))
            if residual not in self.settles:
                self.settles[residual] = [
                    add(_settled(residual, carried, written, number)) for carried, written in old
                ]


def _settled(
    residual: Placement,
    carried: Placement | None,
    written: tuple[Variant, ...],
    number: Callable[[Item], int],
) -> _Sum:
    addends = tuple(number((gives, residual)) for gives in dict.fromkeys(v.gives for v in written))
    if carried is None:  # there is nothing to add to
        return _Sum(addends)
    return _Sum((*addends, number((carried, residual))), addends)


class _Taken(NamedTuple):
    """A step of a path.

    Attributes:
        between: a number for the states that it leads from and to, and the blocks between them.
        sums: of the routes to the blocks before it, and from them: other ones in other regimes.
    """

    between: int
    sums: tuple[int, ...]


class Planner:
    """Plans one chain: a search over the states after each read, for the cheapest path.

    Which states there are, and which routes lie between them, is worked out once; a regime only
    has its own prices.

    Args:
        residuals: placements of the residual to choose from; None: all that it may have.
    """

    def __init__(self, chain: Chain, residuals: Sequence[Placement] | None = None) -> None:
        self.chain = chain
        if residuals is None:
            residuals = residual_placements(chain.mesh)
        self._items: dict[Item, int] = {}
        self._sums: dict[_Sum, int] = {}
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
                steps[key] = _Steps(old, new, self._number_of, self._sum_of)
            self._steps.append(steps[key])
        self._by_number = list(self._sums)
        self._paths: dict[tuple[int, ...], list[_Taken]] = {}
        mesh = chain.mesh
        axes = mesh.axes, mesh.attn_dp, mesh.parallelism.ep_num_redundant_experts > 0
        blocks = [(), *(tuple(map(_inside, read.consumers)) for read in chain.reads)]
        selects = [*(read.selects_rows for read in chain.reads), None]
        self._places = [number_of((axes, place)) for place in zip(blocks, selects, strict=True)]

    def choose(self, machine: Machine, regime: Regime) -> Choice:
        """The cheapest path of a regime.

        Raises:
            PlacementError: if a placement that a block declares cannot be reached, or left.
        """
        routes = routes_of(machine, self.chain.mesh.axes, self.chain.hidden_size, regime)
        found = [routes.cheapest(item) for item in self._items]
        us = [price for price, _, _ in found]
        fuses = self._fusing(routes)
        sums = [sum(map(us.__getitem__, one.items)) for one in self._sums]
        for one, (saved, _, _) in fuses.items():
            sums[one] -= saved
        total, path = self._cheapest_path(sums)
        if path not in self._paths:
            self._paths[path] = list(self._taken(path))
        taken = self._paths[path]
        sums_taken = {one for step in taken for one in step.sums}
        along = {one: self._numbers_along(one, found, fuses) for one in sums_taken}
        return Choice(
            regime=regime,
            key=tuple(
                (regime.equal, step.between, *(along[one] for one in step.sums)) for step in taken
            ),
            bind=lambda: self._bind(regime, routes, path, total),
        )

    def _number_of(self, item: Item) -> int:
        return self._items.setdefault(item, len(self._items))

    def _sum_of(self, one: _Sum) -> int:
        return self._sums.setdefault(one, len(self._sums))

    def _fusing(self, routes: Routes) -> dict[int, tuple[float, int, int]]:
        """Of the sums that gain by it: microseconds saved, by which item, and the number of its
        fused route."""
        if not routes.has_fused:
            return {}
        pairs = [item for item in self._items if not isinstance(item, Move)]
        gains = {self._items[pair]: (routes.saved(pair), routes.fused(pair)) for pair in pairs}
        fuses = {}
        for number, one in enumerate(self._sums):
            best = max(one.addends, key=lambda item: gains[item][0], default=None)
            if best is not None and gains[best][0] > 0:
                saved, route = gains[best]
                assert route is not None
                fuses[number] = saved, best, route[2]
        return fuses

    def _numbers_along(
        self, one: int, found: list[Found], fuses: dict[int, tuple[float, int, int]]
    ) -> tuple[int, ...]:
        """The numbers of the routes that a sum is of."""
        _, fused, number = fuses.get(one, (0.0, None, 0))
        items = self._by_number[one].items
        return tuple(number if item == fused else found[item][2] for item in items)

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

    def _taken(self, path: tuple[int, ...]) -> Iterator[_Taken]:
        """The steps of a path."""
        delivered: tuple[int, ...] = ()
        for place, states, step, old, new in zip(
            self._places, self._states, self._steps, path, path[1:], strict=False
        ):
            residual, delivery = step.deliveries[new]
            settle = step.settles[residual][old]
            yield _Taken(number_of((place, states[old], residual)), (*delivered, settle))
            delivered = (delivery,)
        last = self._states[-1][path[-1]]
        yield _Taken(number_of((self._places[-1], last)), delivered)

    def _bind(
        self,
        regime: Regime,
        routes: Routes,
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
                carry = _settle(read.name, ["residual"], carried, residual, routes.between)
            sources: dict[Placement, list[str]] = {}
            for block, variant in written:
                sources.setdefault(variant.gives, []).append(block.name)
            last = None
            if carried is not None and routes.has_fused:
                last = max(sources, key=lambda gives: routes.saved((gives, residual)))
                last = last if routes.saved((last, residual)) > 0 else None
            settles = [
                _settle(read.name, names, gives, residual, routes.between)
                for gives, names in sources.items()
                if gives != last
            ]
            if last is not None:
                fused = routes.fused_between
                settles.append(_settle(read.name, sources[last], last, residual, fused))
            deliveries = []
            for block, variant in zip(read.consumers, variants, strict=True):
                assert variant.needs is not None
                route = routes.between(residual, variant.needs)
                deliveries.append(
                    Delivery(
                        consumer=block.name,
                        residual=residual,
                        needs=variant.needs,
                        gives=variant.gives,
                        route=route,
                        beside=block.beside and routes.runs_beside and len(read.consumers) > 1,
                    )
                )
                if variant.inner:
                    inner.append((block.name, variant.inner))
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


def _inside(block: BlockSpec) -> object:
    """What a block moves inside, and what it is then; None for one that moves nothing."""
    inner = tuple(variant.inner for variant in block.variants)
    return (block.kind, inner) if any(inner) else None


def _settle(
    read: str,
    producers: Sequence[str],
    gives: Placement,
    residual: Placement,
    between: Callable[[Placement, Placement], Route],
) -> Settle:
    return Settle(
        before=read,
        producers=tuple(producers),
        gives=gives,
        residual=residual,
        route=between(gives, residual),
    )
