"""The proof: every layout, regime and case of a model, on simulated ranks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import NamedTuple, cast

import torch

from isomoe.blocks import Batch, Part, SparseMoe
from isomoe.comm import Communicator, SimWorld
from isomoe.errors import IsomoeError, PlacementError
from isomoe.kernels import AttentionBatch, Routing
from isomoe.layout import (
    MACHINES,
    Chain,
    Choice,
    Mesh,
    Move,
    Parallelism,
    Placement,
    Planner,
    RegimePlan,
    Seat,
    TokenRows,
    regimes,
)
from isomoe.models import CausalLM, HFConfig, build, family_of, representative
from isomoe.prove.cases import Case, cases
from isomoe.prove.mutants import Mutant
from isomoe.prove.oracle import Expected, summed_leaf
from isomoe.prove.provenance import Tickets
from isomoe.prove.shares import faults_of, share_of
from isomoe.prove.stubs import Counted, RankStubs, Violation
from isomoe.stream import ResidualStream

PROOF_VOCAB = 509
"""Vocabulary of the proof: more than the rows of any case, and prime, so that shards are padded."""


@dataclass(slots=True, kw_only=True)
class Stats:
    """What was checked.

    Attributes:
        regimes: plans, one for each layout, machine and kind of step.
        plans: of them, those that were run; the others are made of the same steps.
        shares: blocks whose shares on all ranks were added up.
    """

    layouts: int = 0
    regimes: int = 0
    plans: int = 0
    shares: int = 0
    steps: int = 0
    moves: int = 0
    contributions: int = 0

    @property
    def proven_as_equal(self) -> int:
        """Plans that were not run, since others have all their steps."""
        return self.regimes - self.plans

    def add(self, other: "Stats") -> None:
        """Adds another's counts to these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first violation of a layout.

    Attributes:
        level: 1 if the type check refused it, 2 if the proof found it.
        block, rank, row: who saw what; None where it is not about a row.
        counts: for each block behind the row, columns that were counted and should have been.
    """

    model: str
    layout: str
    level: int
    regime: str
    case: str
    block: str
    message: str
    rank: int | None = None
    row: int | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        place = f"{self.model}, {self.layout}"
        if self.level == 1:
            return f"{place}: refused before running: {self.message}"
        who = "" if self.rank is None else f", rank {self.rank}"
        which = "" if self.row is None else f", row {self.row}"
        wrong = [
            f"{block}: expected {expected}, found {found}"
            for block, (found, expected) in self.counts.items()
            if found != expected
        ]
        tail = f"; columns counted: {'; '.join(wrong)}" if wrong else ""
        where = ", ".join(part for part in (place, self.regime, self.case) if part)
        return f"{where}: {self.block}{who}{which}: {self.message}{tail}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model on one layout, cut down to one layer of each sort.

    Attributes:
        name: of the model.
        config: its config.json, with the proof's vocabulary.
        layers: the layers that stand for all.
    """

    name: str
    config: HFConfig
    layout: Parallelism
    layers: list[int]

    @classmethod
    def of(cls, name: str, config: HFConfig, layout: Parallelism) -> "Subject":
        """The subject for a checkpoint's config."""
        small = {**config, "vocab_size": PROOF_VOCAB}
        return cls(
            name=name,
            config=small,
            layout=layout,
            layers=representative(family_of(config), config),
        )

    def build(self, rank: int = 0) -> CausalLM:
        """The model on one rank, without weights."""
        return build(self.config, self.layout, rank, self.layers)

    def build_small(self, rank: int = 0, layout: Parallelism | None = None) -> CausalLM:
        """The same with few experts, to be run."""
        model = build(self.config, layout or self.layout, rank, self.layers)
        for block in model.blocks():
            if isinstance(block, SparseMoe):
                _keep_few_experts(block, model.seat, self.layout.ep_size)
        return model


def _keep_few_experts(block: SparseMoe, seat: Seat, ways: int) -> None:
    """Leaves one or two experts to each of `ways` ranks, and at most two to a token.

    Which experts a rank owns, all of them, and how it finds them, is checked among its shares.
    Here two a rank stand for them. How weights come of logits is no question of layout: all ranks
    work out the same of the same row.
    """
    count = ways * min(2, block.num_experts // ways)
    block.num_experts = block.experts.num_experts = count
    block.owned = block.experts.owned = seat.shard(count, seat.mesh.moe_ep, "experts")
    block.routing = Routing(top_k=min(2, block.routing.top_k, count))
    block.router.parts = (Part(block.router.parts[0].source, count, 0, count),)


def prove(
    subjects: Iterable[Subject], mutant: Mutant | None = None
) -> Iterator[tuple[Stats, Finding | None]]:
    """Proves models in every regime, on layouts of as many ranks in as many attention-DP groups.

    The shares that ranks hold of each block must add up to it. Plans run until each of their
    steps, from one read to the next, has been run: each read checks every row of the residual on
    every rank, so a step that once led from a right residual to a right one does so in every
    plan. With a mutant, which may spoil either, and in some regimes alone, shares and regime count
    as parts of a step.

    Yields:
        What was checked since the last time, and the violation if there is one.
    """
    proven: set[object] = set()
    structures: set[object] = set()
    planned: dict[object, frozenset[object]] = {}
    waiting: dict[frozenset[object], _Waiting] = {}
    for subject in subjects:
        stats = Stats(layouts=1)
        models = subject.build(), subject.build(subject.layout.tp_size - 1)
        mesh = models[0].seat.mesh
        shares = {
            block.name: (
                share_of(block),
                share_of(other),
                _on_ranks(block.spec.variants[0].gives, mesh.axes),
            )
            for block, other in zip(models[0].blocks(), models[1].blocks(), strict=True)
        }
        if mutant is None:
            fault = _check_shares(subject, mesh, shares, proven, stats)
            if fault is not None:
                yield stats, fault
                return
        try:
            chain = models[0].chain if mutant is None else mutant.in_chain(models[0].chain)
            stats.regimes = len(MACHINES) * len(regimes(chain.mesh))
            for choice in _choices(chain) if mutant or chain.structure not in structures else ():
                key = choice.key if mutant is None else (choice.key, choice.regime, *shares.items())
                if key not in planned:
                    plan = choice.bind()
                    planned[key] = _told_apart(plan, shares, mutant)
                    waiting.setdefault(planned[key], _Waiting(subject, mesh, plan, planned[key]))
            structures.add(chain.structure)
        except PlacementError as error:
            yield stats, _refused(subject, error)
            return
        yield stats, None
    yield from _run(list(waiting.values()), mutant, proven)


def _choices(chain: Chain) -> Iterator[Choice]:
    """What is planned for a chain on each machine, in each regime."""
    planner = Planner(chain)
    for machine in MACHINES.values():
        for regime in regimes(chain.mesh):
            yield planner.choose(machine, regime)


class _Waiting(NamedTuple):
    """A plan, and the steps of which it is made."""

    subject: Subject
    mesh: Mesh
    plan: RegimePlan
    steps: frozenset[object]


def _run(
    waiting: list[_Waiting], mutant: Mutant | None, proven: set[object]
) -> Iterator[tuple[Stats, Finding | None]]:
    """Runs plans until all their steps have run; short ones with many new steps go first."""
    worlds: dict[int, _World] = {}
    whole: set[bool] = set()
    left = [(one, set(one.steps)) for one in waiting]
    while left:
        stats = Stats()
        (subject, mesh, plan, steps), _ = max(
            left,
            key=lambda one: (
                len(one[1])
                / (len(one[0].plan.reads) * (1 if id(one[0].subject) in worlds else 1.5))
            ),
        )
        if id(subject) not in worlds:
            worlds[id(subject)] = _World(subject, mutant, mesh)
        every = list(cases(subject.layout.attn_dp_size, plan.regime.equal))
        # The last case has rows of all kinds; the others need not see every step.
        for case in every[-1:] if plan.regime.equal in whole and mutant is None else every:
            found = worlds[id(subject)].check(plan, case, stats)
            if found is not None:
                yield stats, found
                return
        whole.add(plan.regime.equal)
        stats.plans = 1
        for _, new in left:
            new -= steps
        left = [one for one in left if one[1]]
        yield stats, None


def _check_shares(
    subject: Subject,
    mesh: Mesh,
    shares: Mapping[str, object],
    seen: set[object],
    stats: Stats,
) -> Finding | None:
    """Checks the shares of blocks that are unlike any that were checked on as many ranks."""
    new = {name: share for name, share in shares.items() if share not in seen}
    if not new:
        return None
    tickets = Tickets()
    ranks = [subject.build(rank) for rank in range(mesh.size)]
    for blocks in zip(*(model.blocks() for model in ranks), strict=True):
        name = blocks[0].name
        if name not in new or new[name] in seen:
            continue
        fault = faults_of(mesh, list(blocks), tickets)
        if fault is not None:
            violation = Violation(name, fault, None, None, None)
            return _finding(subject, "", "shares", violation, {})
        stats.shares += 1
        seen.add(new[name])
    return None


def _told_apart(
    plan: RegimePlan, shares: Mapping[str, object], mutant: Mutant | None
) -> frozenset[object]:
    """The steps of a plan; with a mutant, those of other shares, axes or regimes are others."""
    if mutant is None:
        return frozenset(_steps(plan, {}))
    return frozenset((plan.regime, plan.mesh.axes, step) for step in _steps(plan, shares))


def _steps(plan: RegimePlan, shares: Mapping[str, object]) -> Iterator[object]:
    """The steps from read to read: equal ones do the same moves between the same placements.

    A block that moves something inside counts with its kind. Placements and moves are told apart
    by the ranks that they join, not by the axes of the mesh they are on: neighbouring axes that
    hold one letter, and are moved over together, are as one.
    """
    world = plan.mesh.size_of(plan.mesh.attn_dp), plan.regime.equal
    inner = dict(plan.inner)
    axes = plan.mesh.axes

    def on_ranks(placement: Placement) -> object:
        return _on_ranks(placement, axes)

    def moved(moves: Iterable[Move]) -> object:
        return tuple(_moved(move, axes) for move in moves)

    before: object = None
    ran: dict[str, object] = {
        plan.embedding: (on_ranks(plan.embedding_gives), shares.get(plan.embedding))
    }
    for read in plan.reads:
        settles = [
            (tuple(ran[name] for name in settle.producers), moved(settle.route.moves))
            for settle in read.settles
        ]
        carry = read.carry and moved(read.carry.route.moves)
        residual = on_ranks(read.residual)
        yield world, before, carry, tuple(settles), residual, read.selects_rows
        ran = {
            d.consumer: (
                moved(d.route.moves),
                on_ranks(d.needs),
                on_ranks(d.gives),
                inner.get(d.consumer) and (plan.kinds[d.consumer], moved(inner[d.consumer])),
                shares.get(d.consumer),
            )
            for d in read.deliveries
        }
        before = residual
    yield world, before, tuple(ran.values())


@cache
def _on_ranks(placement: Placement, axes: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """A placement by its letters and over how many ranks each goes, major first."""
    runs = groupby(zip(placement, axes, strict=True), key=itemgetter(0))
    return tuple((letter, prod(size for _, size in run)) for letter, run in runs)


@cache
def _moved(move: Move, axes: tuple[int, ...]) -> tuple[object, ...]:
    """A move by the groups of ranks that it joins: their size, and how far apart members are."""
    size = prod(axes[axis] for axis in move.axes)
    stride = prod(axes[move.axes[-1] + 1 :])
    return move.op, size, stride, _on_ranks(move.before, axes), _on_ranks(move.after, axes)


class _World:
    """The ranks of one subject, their leaves replaced by stubs."""

    def __init__(self, subject: Subject, mutant: Mutant | None, mesh: Mesh) -> None:
        self.subject = subject
        self.mutant = mutant
        self.mesh = mesh
        self.one_rank = subject.build_small(layout=Parallelism())
        self.models = [subject.build_small(rank) for rank in range(mesh.size)]
        if mutant is not None:
            for model in self.models:
                mutant.in_model(model)
        self._use(Tickets())

    def check(self, plan: RegimePlan, case: Case, stats: Stats) -> Finding | None:
        """Runs one step and adds to `stats`, or returns the violation."""
        try:
            expected = self._expected(case)
            stats.moves += self._simulate(plan, expected)
        except Violation as violation:
            counts = {}
            if violation.row is not None:
                counts = self._count(plan, case, violation)
            return _finding(self.subject, plan.regime.name, case.name, violation, counts)
        except (IsomoeError, RuntimeError, IndexError) as error:
            failed = Violation("step", str(error), None, None, None)
            return _finding(self.subject, plan.regime.name, case.name, failed, {})
        stats.steps += 1
        stats.contributions += expected.contributions * self.mesh.size
        return None

    def _use(self, tickets: Tickets) -> None:
        self.tickets = tickets
        self.stubs = [RankStubs(model, tickets) for model in self.models]
        self._cases: dict[Case, Expected] = {}

    def _expected(self, case: Case) -> Expected:
        if case not in self._cases:
            self._cases[case] = Expected(self.one_rank, self.mesh, case, self.tickets)
        return self._cases[case]

    def _simulate(
        self, plan: RegimePlan, expected: Expected, stop_at: tuple[int, int, int] | None = None
    ) -> int:
        """Runs one step on all ranks; returns the number of collectives.

        Args:
            stop_at: (rank, read, row) at which a counting run ends.
        """
        case, ids = expected.case, expected.ids
        rows = TokenRows.of(self.mesh, case.real, case.padded)
        chosen = rows.select(case.chosen)
        world = SimWorld(self.mesh)

        def rank_main(comm: Communicator) -> None:
            rank = comm.seat.rank
            stop = stop_at[1:] if stop_at is not None and stop_at[0] == rank else None
            self.stubs[rank].begin(plan, expected, stop)
            group = expected.group_of(rank)
            batch = Batch(
                ids=ids[group],
                positions=ids[group],
                attention=cast(AttentionBatch, None),  # its kernel is a stub
                rows=rows,
                logits_rows=chosen,
                rank=rank,
            )
            stream = ResidualStream(plan, comm, rows, torch.int64)
            if self.mutant is not None:
                self.mutant.in_stream(stream)
            logits = self.models[rank].forward(batch, stream)
            if stop_at is None and not torch.equal(logits, expected.logits(rank)):
                what = "logits of the wrong rows or vocabulary"
                raise Violation("lm_head", what, None, rank, None)

        with torch.inference_mode():
            world.run(rank_main)
        return world.calls

    def _count(
        self, plan: RegimePlan, case: Case, violation: Violation
    ) -> dict[str, tuple[int, int]]:
        """Runs the case again for each block in question, counting its columns as integers."""
        assert violation.read is not None
        assert violation.rank is not None
        assert violation.row is not None
        stop_at = (violation.rank, violation.read, violation.row)
        counts = {}
        for leaf in _summed_leaves(self.one_rank, violation.read):
            self._use(Tickets(counting=leaf))
            try:
                self._simulate(plan, self._expected(case), stop_at)
            except Counted as counted:
                counts[leaf] = (counted.found, counted.expected)
        return counts


def _finding(
    subject: Subject,
    regime: str,
    case: str,
    violation: Violation,
    counts: dict[str, tuple[int, int]],
) -> Finding:
    return Finding(
        model=subject.name,
        layout=str(subject.layout),
        level=2,
        regime=regime,
        case=case,
        block=violation.where,
        message=violation.what,
        rank=violation.rank,
        row=violation.row,
        counts=counts,
    )


def _summed_leaves(model: CausalLM, read: int) -> Iterator[str]:
    """The leaves whose contributions a row holds at a read, the latest first."""
    for index in reversed(range(read)):
        layer = model.layers[index // 2]
        for block in layer.ffn if index % 2 else (layer.attn,):
            yield summed_leaf(block)
    yield model.embedding.name


def _refused(subject: Subject, error: PlacementError) -> Finding:
    return Finding(
        model=subject.name,
        layout=str(subject.layout),
        level=1,
        regime="",
        case="",
        block="",
        message=str(error),
    )
