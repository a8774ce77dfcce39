"""The plan: for every regime, which moves settle what was written and deliver what is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from isomoe.layout.cost import Machine
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move
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
        beats: the cheapest chain that begins otherwise, if there is one; of a fused route the
            cheapest one without.
        fused: its last move, a sum, is made in one operation with the addition to the residual and
            the norm. Where that declines a batch, it is made by itself.
    """

    moves: tuple[Move, ...]
    sent_bytes_per_row: float
    predicted_us: float
    beats: "Route | None" = None
    fused: bool = False

    def to_json(self) -> dict[str, object]:
        """{"moves", "bytes_per_row", "predicted_us"}; "fused" if it is, and "beats" where there was
        a choice."""
        out: dict[str, object] = {
            "moves": [move.to_json() for move in self.moves],
            "bytes_per_row": round(self.sent_bytes_per_row, 3),
            "predicted_us": round(self.predicted_us, 3),
        }
        if self.fused:
            out["fused"] = True
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
    """Normed rows on their way to a block.

    Attributes:
        beside: the block then runs on a second stream, beside the others of its read.
    """

    consumer: str
    residual: Placement
    needs: Placement
    gives: Placement
    route: Route
    beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """What happens at one read.

    Attributes:
        carry: how the residual so far comes to `residual`; None where there is none yet.
        settles: one for each distinct placement of what was written since the last read; a fused
            one, of which there is one at most, comes last.
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
    def fuses(self) -> bool:
        """Whether any sum is made in one operation with the norm behind it."""
        return any(settle.route.fused for read in self.reads for settle in read.settles)

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
                tuple(
                    (s.gives, len(s.producers), s.route.moves, s.route.fused) for s in read.settles
                ),
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
                        **({"beside": True} if delivery.beside else {}),
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

    def fused_runs(self) -> set[tuple[int, ...]]:
        """Those over which some sum is fused with the norm behind it."""
        return {
            settle.route.moves[-1].axes
            for plan in self.regimes
            for read in plan.reads
            for settle in read.settles
            if settle.route.fused
        }

    def runs(self) -> set[tuple[int, ...]]:
        """Every run of axes that some move uses and communicates over."""
        return {move.axes for plan in self.regimes for move in plan.moves()}


def regimes(mesh: Mesh, buckets: Sequence[int] = BUCKETS) -> list[Regime]:
    """The regimes of a mesh: ragged ones only where there are several attention-DP groups."""
    forms = (True, False) if mesh.attn_dp else (True,)
    return [Regime(rows=rows, equal=equal) for equal in forms for rows in buckets]


def residual_placements(mesh: Mesh) -> list[Placement]:
    """Those that a residual may have: S at least where attention holds different requests."""
    axes = len(mesh.axes)
    return [row_sharded(prefix, axes) for prefix in range(len(mesh.attn_dp), axes + 1)]
