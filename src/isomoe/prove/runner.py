"""The proof: every layout, regime and case of a model, on simulated ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import cast

import torch

from isomoe.blocks import Batch, Block, ExpertWeights, RowLinear, SparseMoe
from isomoe.comm import Communicator, SimWorld
from isomoe.errors import IsomoeError, PlacementError
from isomoe.kernels import AttentionBatch
from isomoe.layout import MACHINES, Mesh, Parallelism, Plan, RegimePlan, TokenRows, make_plan
from isomoe.models import CausalLM, HFConfig, build, family_of, representative
from isomoe.prove.cases import Case, cases
from isomoe.prove.mutants import Mutant
from isomoe.prove.oracle import Expected, summed_leaf
from isomoe.prove.provenance import Tickets
from isomoe.prove.stubs import Counted, RankStubs, Violation
from isomoe.stream import ResidualStream

PROOF_VOCAB = 509
"""Vocabulary of the proof: more than the rows of any case, and prime, so that shards are padded."""


@dataclass(slots=True, kw_only=True)
class Stats:
    """What was checked."""

    layouts: int = 0
    regimes: int = 0
    proven_as_equal: int = 0
    steps: int = 0
    moves: int = 0
    contributions: int = 0

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
        return (
            f"{place}, {self.regime}, {self.case}: {self.block}{who}{which}: {self.message}{tail}"
        )


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

    def build(self, rank: int = 0, layout: Parallelism | None = None) -> CausalLM:
        """The model on one rank, without weights."""
        return build(self.config, layout or self.layout, rank, self.layers)


def plans_of(subject: Subject, mutant: Mutant | None) -> list[Plan]:
    """The plans of a subject, for every machine that the planner knows."""
    chain = subject.build().chain
    if mutant is not None:
        chain = mutant.in_chain(chain)
    return [make_plan(chain, machine) for machine in MACHINES.values()]


def prove(
    subject: Subject, mutant: Mutant | None = None, proven: set[object] | None = None
) -> tuple[Stats, Finding | None]:
    """Proves one layout in every regime, or finds the first violation.

    Args:
        proven: keys of what is proven already; plans that are equal are not run again.
    """
    stats = Stats(layouts=1)
    seen = set() if proven is None else proven
    try:
        plans = plans_of(subject, mutant)
    except PlacementError as error:
        return stats, _refused(subject, error)
    world: _World | None = None
    same = _surroundings(subject)
    for regime in (regime for plan in plans for regime in plan.regimes):
        stats.regimes += 1
        body, tail = (regime.regime.equal, regime.signature[0]), regime.signature[1]
        if (same, body, tail) in seen:
            stats.proven_as_equal += 1
            continue
        if world is None:
            world = _World(subject, mutant, regime.mesh)
        steps = list(cases(subject.layout.attn_dp_size, regime.regime.equal))
        # Where only the tail is new, the case that selects some rows and not others will do.
        for case in steps[-1:] if (same, body) in seen else steps:
            found = world.check(regime, case, stats)
            if found is not None:
                return stats, found
        seen |= {(same, body, tail), (same, body)}
    return stats, None


def _surroundings(subject: Subject) -> object:
    """Equal for subjects whose ranks hold the same shares of the same blocks on the same mesh.

    Sizes enter as shares of the whole, so that models which differ in width alone are equal.
    """
    last = subject.layout.tp_size - 1
    models = (subject.build(0), subject.build(last))
    return (
        type(models[0]),
        models[0].seat.mesh.axes,
        replace(subject.layout, enable_dp_lm_head=False),
        tuple(tuple(_share(block) for block in model.blocks()) for model in models),
    )


def _share(block: Block) -> tuple[object, ...]:
    """What of a block a rank holds."""
    held: list[object] = [type(block), block.spec.kind]
    for leaf in block.leaves():
        held.append(type(leaf))
        match leaf:
            case RowLinear():
                held += [Fraction(column, leaf.in_features) for column in leaf.columns]
                held += [leaf.has_bias, leaf.bias_here]
            case ExpertWeights():
                held += [Fraction(column, leaf.intermediate_size) for column in leaf.width]
                held += [leaf.owned, leaf.num_experts]
    if isinstance(block, SparseMoe):
        held += [block.owned, block.top_k, block.renormalize]
    return tuple(held)


class _World:
    """The ranks of one subject, their leaves replaced by stubs."""

    def __init__(self, subject: Subject, mutant: Mutant | None, mesh: Mesh) -> None:
        self.subject = subject
        self.mutant = mutant
        self.mesh = mesh
        self.one_rank = subject.build(layout=Parallelism())
        self.models = [subject.build(rank) for rank in range(mesh.size)]
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
            return self._found(plan, case, violation, counts)
        except (IsomoeError, RuntimeError, IndexError) as error:
            return self._found(plan, case, Violation("step", str(error), None, None, None), {})
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

    def _found(
        self,
        plan: RegimePlan,
        case: Case,
        violation: Violation,
        counts: dict[str, tuple[int, int]],
    ) -> Finding:
        return Finding(
            model=self.subject.name,
            layout=str(self.subject.layout),
            level=2,
            regime=plan.regime.name,
            case=case.name,
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
