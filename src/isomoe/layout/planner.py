"""The planner: which residual placements, variants and moves a chain takes, by predicted time.

A dynamic program over the chain of reads picks the residual's own placement, the blocks' variants
and the moves together. What it picks depends on how many rows a step has and on whether every
attention-DP group has the same number: one regime each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from operator import add

from isomoe.layout.chain import BlockSpec, Chain, Variant
from isomoe.layout.cost import Machine
from isomoe.layout.placement import Placement
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
from isomoe.layout.routes import Routes, number_of
from isomoe.layout.steps import Numbers, Place, Prices, prices_of, steps_between


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


class Planner:
    """Plans one chain: a search over the states after each read, for the cheapest path.

    Its states and the steps between them are worked out once; a regime only has its own prices.

    Args:
        residuals: placements of the residual to choose from; None: all that it may have.
    """

    def __init__(self, chain: Chain, residuals: Sequence[Placement] | None = None) -> None:
        self.chain = chain
        if residuals is None:
            residuals = residual_placements(chain.mesh)
        variants = [tuple(block.variants for block in read.consumers) for read in chain.reads]
        places = [Place((None,), (chain.embedding.variants,))]
        places += [Place(tuple(residuals), each) for each in variants]
        self._steps = list(starmap(steps_between, pairwise(places)))
        self._states = [self._steps[0].old, *(steps.new for steps in self._steps)]
        mesh = chain.mesh
        axes = mesh.axes, mesh.attn_dp, mesh.parallelism.ep_num_redundant_experts > 0
        inside = [(), *(tuple(map(_inside, read.consumers)) for read in chain.reads)]
        selects = [*(read.selects_rows for read in chain.reads), None]
        self._kinds = [number_of((axes, kind)) for kind in zip(inside, selects, strict=True)]

    def choose(self, machine: Machine, regime: Regime) -> Choice:
        """The cheapest path of a regime.

        Raises:
            PlacementError: if a placement that a block declares cannot be reached, or left.
        """
        prices = prices_of(machine, self.chain.mesh.axes, self.chain.hidden_size, regime)
        total, path = _cheapest_path(list(map(prices.table, self._steps)))
        return Choice(
            regime=regime,
            key=tuple((regime.equal, *part) for part in self._parts(path, prices)),
            bind=lambda: self._bind(regime, prices.routes, path, total),
        )

    def _parts(self, path: list[int], prices: Prices) -> Iterator[tuple[object, ...]]:
        """Those of a path's key."""
        delivered: Numbers = ()
        for kind, steps, old, new in zip(self._kinds, self._steps, path, path[1:], strict=False):
            _, settled = prices.of(steps.settle(old, new))
            yield kind, steps.number(old, new), delivered, settled
            _, delivered = prices.of(steps.deliveries[new])
        yield self._kinds[-1], number_of(self._states[-1][path[-1]]), delivered

    def _bind(
        self,
        regime: Regime,
        routes: Routes,
        path: list[int],
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
            fused = None
            if carried is not None:
                fused = routes.fusing((gives, residual) for gives in sources)
            settles = [
                _settle(read.name, names, gives, residual, routes.between)
                for gives, names in sources.items()
                if (gives, residual) != fused
            ]
            if fused is not None:
                last, _ = fused
                settles.append(
                    _settle(read.name, sources[last], last, residual, routes.fused_between)
                )
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


def _cheapest_path(tables: list[list[list[float]]]) -> tuple[float, list[int]]:
    """Viterbi over the reads. Of equal paths, that of the first states.

    Args:
        tables: microseconds of the steps to each read: for each new state, from each old one.

    Returns:
        Its microseconds, and which of the states it takes before and after each read.
    """
    frontier = [0.0] * len(tables[0][0])
    origins: list[list[int]] = []
    for table in tables:
        reached, before = [], []
        for us in table:
            totals = list(map(add, frontier, us))
            least = min(totals)
            reached.append(least)
            before.append(totals.index(least))
        frontier = reached
        origins.append(before)
    total = min(frontier)
    path = [frontier.index(total)]
    for before in reversed(origins):
        path.append(before[path[-1]])
    path.reverse()
    return total, path


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
