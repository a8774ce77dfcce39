"""The plan: for every regime, which moves settle what was written and deliver what is read.

A dynamic program over the chain of reads picks the residual's own placement, the blocks' variants
and the moves together, by predicted time. What it picks depends on how many rows a step has and
on whether every attention-DP group has the same number: one regime each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

from isomoe.errors import PlacementError
from isomoe.layout.chain import BlockSpec, Chain, ReadSpec, Variant
from isomoe.layout.cost import CostModel, Machine
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, cheapest
from isomoe.layout.parallelism import Parallelism
from isomoe.layout.placement import Placement, row_sharded

BUCKETS = (8, 64, 512, 4096, 32768)
"""Upper bounds of the rows of a step that share a regime; larger steps use the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Steps that run one plan.

    Attributes:
        rows: the most rows of a step, over all ranks.
        equal: whether all attention-DP groups have the same number of rows.
    """

    rows: int
    equal: bool

    @property
    def name(self) -> str:
        """Such as `ragged-512`."""
        return f"{'equal' if self.equal else 'ragged'}-{self.rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A chain of moves and what it is predicted to cost.

    Attributes:
        beats: the cheapest chain that begins otherwise, if there is one.
    """

    moves: tuple[Move, ...]
    sent_bytes_per_row: float
    predicted_us: float
    beats: "Route | None" = None

    def to_json(self) -> dict[str, object]:
        """{"moves", "bytes_per_row", "predicted_us"}, and "beats" where there was a choice."""
        out: dict[str, object] = {
            "moves": [move.to_json() for move in self.moves],
            "bytes_per_row": round(self.sent_bytes_per_row, 3),
            "predicted_us": round(self.predicted_us, 3),
        }
        if self.beats is not None:
            out["beats"] = self.beats.to_json()
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """One sum that is moved to the residual: contributions in one placement, added first.

    Attributes:
        before: the read that settles it.
        producers: the blocks that wrote it; ("residual",) where the residual itself moves.
    """

    before: str
    producers: tuple[str, ...]
    gives: Placement
    residual: Placement
    route: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Normed rows on their way to a block."""

    consumer: str
    residual: Placement
    needs: Placement
    gives: Placement
    route: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """What happens at one read.

    Attributes:
        carry: how the residual so far comes to `residual`; None where there is none yet.
        settles: one for each distinct placement of what was written since the last read.
        deliveries: one for each consumer. Those with equal `needs` are moved once.
    """

    name: str
    residual: Placement
    selects_rows: bool
    carry: Settle | None
    settles: tuple[Settle, ...]
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True, kw_only=True)
class RegimePlan:
    """The bound plan of one regime: what the residual stream executes.

    Attributes:
        kinds: the kind of each block, by name.
    """

    regime: Regime
    mesh: Mesh
    embedding: str
    embedding_gives: Placement
    reads: tuple[ReadPlan, ...]
    inner: tuple[tuple[str, tuple[Move, ...]], ...]
    kinds: dict[str, str]
    predicted_us: float

    @cached_property
    def gives(self) -> dict[str, Placement]:
        """The placement of what each block writes."""
        given = {d.consumer: d.gives for read in self.reads for d in read.deliveries}
        return {self.embedding: self.embedding_gives, **given}

    @property
    def residual(self) -> Placement:
        """The residual's placement at most of the reads."""
        held = [read.residual for read in self.reads]
        return max(held, key=held.count)

    def moves(self) -> Iterator[Move]:
        """Every move of the plan, inner ones included."""
        for read in self.reads:
            parts = (*((read.carry,) if read.carry else ()), *read.settles, *read.deliveries)
            for part in parts:
                yield from part.route.moves
        for _, moves in self.inner:
            yield from moves

    @cached_property
    def signature(self) -> tuple[object, object]:
        """(body, tail): equal for plans that do the same moves between the same kinds of read.

        The tail is the last read, where rows are selected, and the lm_head behind it.
        """
        *body, last = (
            (
                read.residual,
                read.selects_rows,
                read.carry and read.carry.route.moves,
                tuple((s.gives, len(s.producers), s.route.moves) for s in read.settles),
                tuple((d.needs, d.gives, d.route.moves) for d in read.deliveries),
            )
            for read in self.reads
        )
        inner = tuple(moves for _, moves in self.inner)
        return (self.embedding_gives, *body), (last, inner)

    def to_json(self) -> dict[str, object]:
        """The regime as `isomoe plan --json` prints it."""
        settles, deliveries = [], []
        for read in self.reads:
            moving = [read.carry] if read.carry and read.carry.route.moves else []
            for settle in (*moving, *read.settles):
                settles.append(
                    {
                        "before": settle.before,
                        "producers": list(settle.producers),
                        "gives": str(settle.gives),
                        "residual": str(settle.residual),
                        **settle.route.to_json(),
                    }
                )
            for delivery in read.deliveries:
                deliveries.append(
                    {
                        "consumer": delivery.consumer,
                        "residual": str(delivery.residual),
                        "needs": str(delivery.needs),
                        **delivery.route.to_json(),
                    }
                )
        return {
            "name": self.regime.name,
            "rows": self.regime.rows,
            "equal": self.regime.equal,
            "residual": str(self.residual),
            "predicted_us": round(self.predicted_us, 3),
            "settles": settles,
            "deliveries": deliveries,
            "inner": [
                {"block": block, "moves": [move.to_json() for move in moves]}
                for block, moves in self.inner
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plans of all regimes of one model on one mesh."""

    mesh: Mesh
    machine: Machine
    regimes: tuple[RegimePlan, ...]

    def choose(self, rows: Sequence[int]) -> int:
        """The index of the regime for a step with these rows of each attention-DP group."""
        total, equal = sum(rows), len(set(rows)) == 1
        fitting = [
            (index, plan.regime)
            for index, plan in enumerate(self.regimes)
            if plan.regime.equal == equal
        ]
        for index, regime in fitting:
            if total <= regime.rows:
                return index
        return fitting[-1][0]

    def to_json(self) -> dict[str, object]:
        """The whole plan as `isomoe plan --json` prints it."""
        return {
            "world": self.mesh.size,
            "layout": str(self.mesh.parallelism),
            "machine": self.machine.name,
            "mesh": self.mesh.to_json(),
            "regimes": [regime.to_json() for regime in self.regimes],
        }

    def runs(self) -> set[tuple[int, ...]]:
        """Every run of axes that some move uses and communicates over."""
        return {move.axes for plan in self.regimes for move in plan.moves()}


def regimes(mesh: Mesh, buckets: Sequence[int] = BUCKETS) -> list[Regime]:
    """The regimes of a mesh: ragged ones only where there are several attention-DP groups."""
    forms = (True, False) if mesh.attn_dp else (True,)
    return [Regime(rows=rows, equal=equal) for equal in forms for rows in buckets]


def make_plan(chain: Chain, machine: Machine, wanted: Sequence[Regime] | None = None) -> Plan:
    """Plans every regime.

    Raises:
        PlacementError: if a placement that a block declares cannot be reached, or left.
    """
    chosen = regimes(chain.mesh) if wanted is None else wanted
    return Plan(
        mesh=chain.mesh,
        machine=machine,
        regimes=tuple(_Planner(chain, machine, regime).plan() for regime in chosen),
    )


_State = tuple[Placement | None, tuple[Variant, ...]]
"""After a read: the residual's placement (None before the first) and each consumer's variant."""


class _Routes:
    """The cheapest routes between placements in one regime; the same for all models of a width."""

    def __init__(self, cost: CostModel, regime: Regime) -> None:
        self._cost = cost
        self._regime = regime
        self._routes: dict[tuple[Placement, Placement], Route] = {}
        self._prices: dict[Move, float] = {}

    def between(self, before: Placement, after: Placement) -> Route:
        """The cheapest route, and the one that it beat.

        Raises:
            PlacementError: if there is none.
        """
        key = (before, after)
        if key not in self._routes:
            us, moves = cheapest(before, after, self._price)
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
        if move not in self._prices:
            regime = self._regime
            self._prices[move] = self._cost.microseconds(move, regime.rows, regime.equal)
        return self._prices[move]


@lru_cache(maxsize=1024)
def _routes(machine: Machine, axes: tuple[int, ...], row_values: int, regime: Regime) -> _Routes:
    ranks = Mesh(axes=axes, parallelism=Parallelism(tp_size=prod(axes)))
    return _Routes(CostModel(machine=machine, mesh=ranks, row_values=row_values), regime)


class _Planner:
    def __init__(self, chain: Chain, machine: Machine, regime: Regime) -> None:
        self.chain = chain
        self.regime = regime
        mesh = chain.mesh
        self._route = _routes(machine, mesh.axes, chain.hidden_size, regime).between
        axes = len(mesh.axes)
        self.residuals = [row_sharded(k, axes) for k in range(len(mesh.attn_dp), axes + 1)]

    def plan(self) -> RegimePlan:
        """Viterbi over the reads: the cheapest path of states."""
        frontier: dict[_State, tuple[float, tuple[_State, ...]]] = {
            (None, (variant,)): (0.0, ()) for variant in self.chain.embedding.variants
        }
        steps: dict[tuple[_State, _State], float] = {}
        for read in self.chain.reads:
            reached: dict[_State, tuple[float, tuple[_State, ...]]] = {}
            for state in self._states(read):
                for old, (cost, path) in frontier.items():
                    if (old, state) not in steps:
                        steps[old, state] = self._step_us(old, state)
                    total = cost + steps[old, state]
                    if state not in reached or total < reached[state][0]:
                        reached[state] = (total, (*path, old))
            frontier = reached
        last, (total, path) = min(frontier.items(), key=lambda item: item[1][0])
        return self._bind([*path, last], total)

    def _states(self, read: ReadSpec) -> Iterator[_State]:
        for residual in self.residuals:
            for variants in product(*(block.variants for block in read.consumers)):
                yield residual, variants

    def _step_us(self, old: _State, new: _State) -> float:
        (carried, written), (residual, variants) = old, new
        assert residual is not None
        sources = {variant.gives for variant in written}
        total = sum(self._route(gives, residual).predicted_us for gives in sources)
        if carried is not None:
            total += self._route(carried, residual).predicted_us
        needs = {variant.needs for variant in variants if variant.needs is not None}
        return total + sum(self._route(residual, need).predicted_us for need in needs)

    def _bind(self, path: list[_State], total: float) -> RegimePlan:
        (_, (embedding,)), states = path[0], path[1:]
        carried: Placement | None = None
        written: list[tuple[BlockSpec, Variant]] = [(self.chain.embedding, embedding)]
        reads, inner = [], []
        for read, (residual, variants) in zip(self.chain.reads, states, strict=True):
            assert residual is not None
            carry = None
            if carried is not None:
                carry = self._settle(read.name, ("residual",), carried, residual)
            sources: dict[Placement, list[str]] = {}
            for block, variant in written:
                sources.setdefault(variant.gives, []).append(block.name)
            settles = [
                self._settle(read.name, tuple(names), gives, residual)
                for gives, names in sources.items()
            ]
            deliveries = []
            for block, variant in zip(read.consumers, variants, strict=True):
                assert variant.needs is not None
                route = self._route(residual, variant.needs)
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
            regime=self.regime,
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
        self, read: str, producers: tuple[str, ...], gives: Placement, residual: Placement
    ) -> Settle:
        route = self._route(gives, residual)
        return Settle(before=read, producers=producers, gives=gives, residual=residual, route=route)
