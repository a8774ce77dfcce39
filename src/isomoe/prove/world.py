"""The simulated ranks of one subject, and the steps that they run."""

from collections.abc import Iterator
from typing import cast

import torch

from isomoe.blocks import Batch
from isomoe.comm import SimWorld
from isomoe.comm.sim import SimComm
from isomoe.errors import IsomoeError
from isomoe.kernels import AttentionBatch
from isomoe.layout import Mesh, Parallelism, RegimePlan, TokenRows
from isomoe.models import CausalLM
from isomoe.prove.cases import Case
from isomoe.prove.finding import Finding, Stats
from isomoe.prove.fused import fuse_in
from isomoe.prove.mutants import Mutant
from isomoe.prove.oracle import Expected, summed_leaf
from isomoe.prove.provenance import Tickets
from isomoe.prove.stubs import Counted, RankStubs, Violation
from isomoe.prove.subject import Subject
from isomoe.stream import ResidualStream


class World:
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
            return found_in(self.subject, plan.regime.name, case.name, violation, counts)
        except (IsomoeError, RuntimeError, IndexError) as error:
            failed = Violation("step", str(error), None, None, None)
            return found_in(self.subject, plan.regime.name, case.name, failed, {})
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
        self,
        plan: RegimePlan,
        expected: Expected,
        ways: tuple[bool, ...] = (True, False),
        stop_at: tuple[int, int, int] | None = None,
    ) -> int:
        """Runs one step on all ranks; returns the number of collectives.

        Args:
            ways: of fused sums: made, declined, or each of them both.
            stop_at: (rank, read, row) at which a counting run ends.
        """
        case, ids = expected.case, expected.ids
        rows = TokenRows.of(self.mesh, case.real, case.padded)
        chosen = rows.select(case.chosen)
        world = SimWorld(self.mesh)

        def rank_main(comm: SimComm) -> None:
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
            if plan.fuses:
                fuse_in(ways, stream, comm)
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
                self._simulate(plan, self._expected(case), (violation.fuses,), stop_at)
            except Counted as counted:
                counts[leaf] = (counted.found, counted.expected)
        return counts


def found_in(
    subject: Subject,
    regime: str,
    case: str,
    violation: Violation,
    counts: dict[str, tuple[int, int]],
) -> Finding:
    """A violation, with where it was met."""
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
