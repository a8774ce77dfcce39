"""A plan from the document that was printed of one, perhaps edited since: checked, then followed.

It must be a plan that the planner could have made of the chain, the cheapest or not. What the
document predicts is not read: costs are worked out anew.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from isomoe.errors import ConfigError, IsomoeError, PlacementError
from isomoe.layout.chain import BlockSpec, Chain, ReadSpec, Variant
from isomoe.layout.cost import CostModel, Machine
from isomoe.layout.document import Node, SaidRegime, SaidSettle
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, Op, moves_from
from isomoe.layout.placement import Letter, Placement
from isomoe.layout.plan import (
    Delivery,
    Plan,
    ReadPlan,
    Regime,
    RegimePlan,
    Route,
    Settle,
    residual_placements,
)


def read_pinned(file: Path, chain: Chain, machine: Machine) -> Plan:
    """The plan in a file with what `isomoe plan --json` printed.

    Raises:
        ConfigError: if there is no such file, it is not JSON, or has another shape.
        PlacementError: if it holds no plan of this chain.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None
    try:
        return pinned(document, chain, machine)
    except IsomoeError as error:
        raise type(error)(f"{file}: {error}") from None


def pinned(document: Mapping[str, object], chain: Chain, machine: Machine) -> Plan:
    """The plan that `Plan.to_json` made a document of.

    Args:
        document: may also have what `isomoe plan --json` prints beside the plan.
        chain: what it must be a plan of.
        machine: whose costs are predicted; the plan may have been made for another.

    Raises:
        ConfigError: if the document has another shape, or is of another layout.
        PlacementError: if it is no plan of this chain; names the regime, the read or the block, and
            what would be right.
    """
    mesh = chain.mesh
    top = Node("plan", document).members(
        ("world", "layout", "mesh", "regimes"), unread=("machine", "model", "memory")
    )
    _check(top["layout"], str(mesh.parallelism))
    _check(top["world"], mesh.size)
    axes = mesh.to_json()
    for name, node in top["mesh"].members(tuple(axes)).items():
        _check(node, axes[name])
    cost = CostModel(machine=machine, mesh=mesh, row_values=chain.hidden_size)
    plans = tuple(
        _Pinned(SaidRegime.of(node, mesh), chain, cost).plan()
        for node in top["regimes"].items("regime", "name")
    )
    _check_regimes(mesh, [plan.regime for plan in plans])
    return Plan(mesh=mesh, machine=machine, regimes=plans)


def _check(node: Node, right: object) -> None:
    if node.value != right:
        raise node.wrong(f"{right} as here")


def _check_regimes(mesh: Mesh, regimes: Sequence[Regime]) -> None:
    for equal, form in ((True, "equal"), (False, "ragged")):
        alike = [regime for regime in regimes if regime.equal == equal]
        exists = equal or bool(mesh.attn_dp)
        if exists and not alike:
            raise PlacementError(f"the plan has no {form} regime; at least one would be right")
        if alike and not exists:
            raise PlacementError(
                f"regime {alike[0].name}: there is one attention group, so that every step is equal"
            )
        for one, two in pairwise(alike):
            if one.rows >= two.rows:
                raise PlacementError(
                    f"regime {two.name}: comes behind {one.name}; ascending rows would be right"
                )


_Said = TypeVar("_Said")


class _Pinned:
    """One regime of a document, and the way along the chain that it must be."""

    def __init__(self, said: SaidRegime, chain: Chain, cost: CostModel) -> None:
        self._said = said
        self._chain = chain
        self._cost = cost
        self._at = said.at
        blocks = {block.name for read in chain.reads for block in read.consumers}
        self._sums: dict[str, list[SaidSettle]] = {read.name: [] for read in chain.reads}
        for one in said.settles:
            if one.before not in self._sums:
                raise PlacementError(f"{one.at}: the model has no such norm")
            self._sums[one.before].append(one)
        self._ways = _by_block(blocks, ((way.at, way.consumer, way) for way in said.deliveries))
        self._inner = _by_block(blocks, ((one.at, one.block, one.moves) for one in said.inner))
        self._gives = {name: one.gives for one in said.settles for name in one.producers}

    def plan(self) -> RegimePlan:
        """The plan, checked.

        Raises:
            ConfigError, PlacementError: see `pinned`.
        """
        chain = self._chain
        embedding = self._variant(chain.embedding, None)
        carried: Placement | None = None
        written: tuple[BlockSpec, ...] = (chain.embedding,)
        reads: list[ReadPlan] = []
        inner: list[tuple[str, tuple[Move, ...]]] = []
        for read in chain.reads:
            residual = self._residual_at(read, written)
            carry = self._carry(read, carried, residual)
            settles = self._settles(read, written, first=carried is None)
            delivered = [self._delivered(read, block, residual) for block in read.consumers]
            reads.append(
                ReadPlan(
                    name=read.name,
                    residual=residual,
                    selects_rows=read.selects_rows,
                    carry=carry,
                    settles=settles,
                    deliveries=tuple(delivery for delivery, _ in delivered),
                )
            )
            inner += [(one.consumer, variant.inner) for one, variant in delivered if variant.inner]
            carried, written = residual, read.consumers
        plan = RegimePlan(
            regime=self._said.regime,
            mesh=chain.mesh,
            embedding=chain.embedding.name,
            embedding_gives=embedding.gives,
            reads=tuple(reads),
            inner=tuple(inner),
            kinds={
                chain.embedding.name: chain.embedding.kind,
                **{b.name: b.kind for read in chain.reads for b in read.consumers},
            },
            predicted_us=self._total_us(reads, inner),
        )
        said = self._said.residual
        if said.value != plan.residual:
            raise said.wrong(f"{plan.residual}, as at most of its reads")
        return plan

    def _residual_at(self, read: ReadSpec, written: tuple[BlockSpec, ...]) -> Placement:
        """The residual's placement at a read, on which all its settles agree."""
        at, sums = f"{self._at}: {read.name}", self._sums[read.name]
        if not sums:
            raise PlacementError(f"{at}: nothing settles {_names(written)}")
        residual, *others = dict.fromkeys(one.residual for one in sums)
        if others:
            raise PlacementError(
                f"{at}: its settles lead to {residual} and to {others[0]}; one would be right"
            )
        right = residual_placements(self._chain.mesh)
        if residual not in right:
            raise PlacementError(
                f"{at}: the residual is {residual}; {' or '.join(right)} would be right"
            )
        return residual

    def _carry(
        self, read: ReadSpec, carried: Placement | None, residual: Placement
    ) -> Settle | None:
        """How the residual so far comes to its placement; what stays need not be said."""
        at = f"{self._at}: {read.name}"
        said = [one for one in self._sums[read.name] if one.carries]
        if carried is None:
            if said:
                raise PlacementError(f"{at}: no residual is there to be moved before the first")
            return None
        if len(said) > 1:
            raise PlacementError(f"{at}: the residual is moved twice; once would be right")
        gives, moves = (said[0].gives, said[0].moves) if said else (carried, ())
        if gives != carried:
            raise PlacementError(
                f"{at}: the residual is moved from {gives}; from {carried} would be right"
            )
        if said and said[0].fused:
            raise PlacementError(f"{at}: the residual itself is moved fused; nothing is summed")
        where = said[0].at if said else f"{at}: the residual"
        return Settle(
            before=read.name,
            producers=("residual",),
            gives=carried,
            residual=residual,
            route=self._route(where, moves, carried, residual),
        )

    def _settles(
        self, read: ReadSpec, written: tuple[BlockSpec, ...], first: bool
    ) -> tuple[Settle, ...]:
        """One for each placement of what was written; each block in one of them."""
        sums = [one for one in self._sums[read.name] if not one.carries]
        due = [block.name for block in written]
        given: dict[str, Placement] = {}
        for one in sums:
            for name in one.producers:
                if name not in due:
                    raise PlacementError(
                        f"{one.at}: {name} has not written since the last; {_names(written)} would "
                        "be right"
                    )
                if name in given:
                    raise PlacementError(f"{one.at}: {name} is settled twice")
                given[name] = one.gives
        missing = [block for block in written if block.name not in given]
        if missing:
            raise PlacementError(f"{self._at}: {read.name}: nothing settles {_names(missing)}")
        for one in sums:
            right = tuple(name for name in due if given[name] == one.gives)
            if one.producers != right or not right:
                raise PlacementError(
                    f"{one.at}: {' + '.join(one.producers) or 'nothing'} from {one.gives} in one "
                    f"sum; {' + '.join(right) or 'no settle'} would be right"
                )
            if one.fused and (first or one is not sums[-1]):
                raise PlacementError(
                    f"{one.at}: fused; only the last sum may be, where there is a residual already"
                )
        return tuple(
            Settle(
                before=read.name,
                producers=one.producers,
                gives=one.gives,
                residual=one.residual,
                route=self._route(one.at, one.moves, one.gives, one.residual, one.fused),
            )
            for one in sums
        )

    def _delivered(
        self, read: ReadSpec, block: BlockSpec, residual: Placement
    ) -> tuple[Delivery, Variant]:
        """How a block's rows come to it, and how it is run."""
        way = self._ways.get(block.name)
        if way is None:
            raise PlacementError(
                f"{self._at}: {read.name}: no delivery to {block.name}; one would be right"
            )
        if way.residual != residual:
            raise PlacementError(
                f"{way.at}: from {way.residual}, but the residual is {residual} at {read.name}"
            )
        if way.beside and not (block.beside and len(read.consumers) > 1):
            raise PlacementError(f"{way.at}: beside, but there is nothing that it may run beside")
        variant = self._variant(block, way.needs)
        delivery = Delivery(
            consumer=block.name,
            residual=residual,
            needs=way.needs,
            gives=variant.gives,
            route=self._route(way.at, way.moves, residual, way.needs),
            beside=way.beside,
        )
        return delivery, variant

    def _variant(self, block: BlockSpec, needs: Placement | None) -> Variant:
        """The declared one that the document says; what nobody settles may be given in any way."""
        gives, inner = self._gives.get(block.name), self._inner.get(block.name, ())
        for variant in block.variants:
            if (variant.needs, variant.inner) == (needs, inner) and gives in (None, variant.gives):
                return variant
        right = " or ".join(_told(one.needs, one.gives, one.inner) for one in block.variants)
        raise PlacementError(
            f"{self._at}: {block.name}: {_told(needs, gives, inner)}; {right} would be right"
        )

    def _route(
        self,
        at: str,
        moves: tuple[Move, ...],
        start: Placement,
        end: Placement,
        fused: bool = False,
    ) -> Route:
        here = start
        for move in moves:
            if move not in moves_from(here):
                raise PlacementError(f"{at}: {move} is no move between blocks from {here}")
            here = move.after
        if here != end:
            raise PlacementError(
                f"{at}: the moves lead from {start} to {here}; to {end} would be right"
            )
        if fused and (not moves or moves[-1].op not in (Op.ALL_REDUCE, Op.REDUCE_SCATTER)):
            raise PlacementError(f"{at}: fused, but its last move is no sum")
        return Route(
            moves=moves,
            sent_bytes_per_row=sum(map(self._cost.sent_bytes_per_row, moves)),
            predicted_us=self._us(moves, fused),
            fused=fused,
        )

    def _us(self, moves: Sequence[Move], fused: bool = False) -> float:
        regime = self._said.regime
        return self._cost.route_microseconds(moves, fused, regime.rows, regime.equal)

    def _total_us(self, reads: list[ReadPlan], inner: list[tuple[str, tuple[Move, ...]]]) -> float:
        """As the planner counts: equal deliveries once, a block's own features not at all."""
        total = 0.0
        for read in reads:
            settles = (*((read.carry,) if read.carry else ()), *read.settles)
            total += sum(one.route.predicted_us for one in settles)
            total += sum({d.needs: d.route.predicted_us for d in read.deliveries}.values())
        every = (move for _, moves in inner for move in moves)
        return total + self._us([m for m in every if Letter.C not in m.before + m.after])


def _by_block(blocks: set[str], said: Iterable[tuple[str, str, _Said]]) -> dict[str, _Said]:
    found: dict[str, _Said] = {}
    for at, name, one in said:
        if name not in blocks:
            raise PlacementError(f"{at}: the model has no block of this name that takes rows")
        if name in found:
            raise PlacementError(f"{at}: is there twice; once would be right")
        found[name] = one
    return found


def _names(blocks: Sequence[BlockSpec]) -> str:
    return ", ".join(block.name for block in blocks)


def _told(needs: Placement | None, gives: Placement | None, inner: tuple[Move, ...]) -> str:
    """A way to run a block."""
    ends = [str(end) for end in (needs, gives) if end is not None]
    moves = [f"{move}{f' {move.bundle}' if move.bundle else ''}" for move in inner]
    return " > ".join(ends) + (f" with {', '.join(moves)} inside" if moves else "")
