"""Sums in one operation with the addition to the residual and the norm: as if they were not.

A chain made by hand is planned on a machine that fuses whatever can be. What reads give is compared
with plain sums of whole numbers, which are exact in fp32, and bit for bit with ranks that decline.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from isomoe.comm import AddNorm, Communicator, LocalComm, SimWorld
from isomoe.layout import (
    Axes,
    BlockSpec,
    Chain,
    Mesh,
    Op,
    Parallelism,
    Placement,
    ReadSpec,
    RegimePlan,
    TokenRows,
    Variant,
    make_plan,
)
from isomoe.prove.runner import FUSES_ALL
from isomoe.stream import ResidualStream
from support import coordinates, held_rows, leaves_of

HIDDEN = 3
THREE = Mesh.of(Parallelism(tp_size=3))
TWO_BY_TWO = Mesh.of(Parallelism(tp_size=4, attn_dp_size=2))
TWO_BY_THREE = Mesh.of(Parallelism(tp_size=6, attn_dp_size=2))
BLOCKS = ("embed", "one", "two", "three")


@dataclass(frozen=True)
class Case:
    """A chain: embed -> first -> {one, two} -> second -> three -> last (some rows only) -> head.

    Attributes:
        gives: of embed, one, two and three; needs: of one, two, three and head.
        sums: of the second read and of the last: what is fused, and how many other sums there are.
    """

    mesh: Mesh
    gives: tuple[str, str, str, str]
    needs: tuple[str, str, str, str]
    sums: tuple[tuple[Op, int], tuple[Op, int]]


WHOLE, SCATTERED = (Op.ALL_REDUCE, 0), (Op.REDUCE_SCATTER, 0)
CASES = [
    Case(THREE, ("P", "P", "P", "P"), ("R",) * 4, (WHOLE, WHOLE)),
    Case(THREE, ("P", "P", "R", "P"), ("R",) * 4, (WHOLE, WHOLE)),
    Case(THREE, ("P", "P", "S", "P"), ("S",) * 4, (SCATTERED, SCATTERED)),
    Case(TWO_BY_TWO, ("SP", "SP", "SP", "SP"), ("SR",) * 4, (WHOLE, WHOLE)),
    Case(TWO_BY_TWO, ("PP", "PP", "SR", "PP"), ("SS",) * 4, (SCATTERED, SCATTERED)),
    Case(TWO_BY_TWO, ("SR", "RP", "SR", "RP"), ("SR",) * 4, (WHOLE, WHOLE)),  # behind a slice
    Case(TWO_BY_THREE, ("SR", "SP", "SP", "PP"), ("SS",) * 4, (SCATTERED, SCATTERED)),
    Case(TWO_BY_THREE, ("SP", "PR", "SP", "SP"), ("SR",) * 4, ((Op.REDUCE_SCATTER, 1), WHOLE)),
]


def plans(case: Case) -> list[RegimePlan]:
    def block(name: str, needs: str | None, gives: str) -> BlockSpec:
        variant = Variant(None if needs is None else Placement(needs), Placement(gives))
        return BlockSpec(name=name, kind=name, variants=(variant,))

    embed, *blocks = (
        block(name, needs, gives)
        for name, needs, gives in zip(BLOCKS, (None, *case.needs), case.gives, strict=False)
    )
    head = block("head", case.needs[-1], case.needs[-1])
    chain = Chain(
        mesh=case.mesh,
        embedding=embed,
        reads=(
            ReadSpec(name="first", consumers=tuple(blocks[:2])),
            ReadSpec(name="second", consumers=tuple(blocks[2:])),
            ReadSpec(name="last", consumers=(head,), selects_rows=True),
        ),
        hidden_size=HIDDEN,
    )
    return list(make_plan(chain, FUSES_ALL).regimes)


class Counting(LocalComm):
    """Passes sums on, and counts them; other collectives are refused."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner.seat)
        self._inner = inner
        self.seen: Counter[str] = Counter()

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        self.seen[Op.ALL_REDUCE] += 1
        return self._inner.all_reduce(x, axes)

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        self.seen[Op.REDUCE_SCATTER] += 1
        return self._inner.reduce_scatter(x, axes, counts)

    def sum_add_norm(
        self,
        x: Tensor,
        axes: Axes,
        counts: Sequence[int] | None,
        residual: Tensor,
        norm: AddNorm,
    ) -> tuple[Tensor, Tensor] | None:
        done = self._inner.sum_add_norm(x, axes, counts, residual, norm)
        form = Op.ALL_REDUCE if counts is None else Op.REDUCE_SCATTER
        self.seen[f"{'fused' if done else 'declined'} {form}"] += 1
        return done


class Square:
    """Not linear, so that a sum is not normed by parts unnoticed."""

    weight, eps, dtype = torch.ones(HIDDEN), 0.0, torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        return x * x + 7

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        total = (residual + addend).to(residual.dtype)
        return total, self(total)


norm = Square()


@dataclass(frozen=True)
class Step:
    """The rows of a step.

    Attributes:
        real: of each attention-DP group; chosen: those at the last read.
        whole_numbers: so that sums are exact; else they depend on their order.
    """

    case: Case
    plan: RegimePlan
    real: tuple[int, ...]
    chosen: tuple[tuple[int, ...], ...]
    whole_numbers: bool = True

    def addends(self, block: str) -> dict[tuple[int, ...], Tensor]:
        """What each member along the P axes of a block gives to all rows of the step."""
        gives = self.case.gives[BLOCKS.index(block)]
        along = [size for size, g in zip(self.case.mesh.axes, gives, strict=True) if g == "P"]

        def drawn(member: tuple[int, ...]) -> Tensor:
            random = np.random.default_rng([*block.encode(), *member, len(member)])
            shape = (sum(self.real), HIDDEN)
            if self.whole_numbers:
                return torch.from_numpy(random.integers(-20, 21, shape)).float()
            return torch.from_numpy(random.normal(size=shape) * 10.0 ** sum(member)).float()

        return {member: drawn(member) for member in coordinates(along)}

    def part(self, block: str, rank: int, held: list[int]) -> Tensor:
        """A rank's share of what a block gives."""
        gives = self.case.gives[BLOCKS.index(block)]
        place = coordinates(self.case.mesh.axes)[rank]
        return self.addends(block)[tuple(place[a] for a, g in enumerate(gives) if g == "P")][held]

    def run(self, fuses: bool) -> tuple[list[list[Tensor]], list[list[Counter[str]]], int]:
        """On each rank what the reads give, and the sums that it called at each; and all that were
        made."""
        case, axes = self.case, self.case.mesh.axes
        rows = TokenRows.of(case.mesh, self.real)
        owner = leaves_of(axes, case.mesh.parallelism.attn_dp_size, self.real)
        world = SimWorld(case.mesh, fuses=fuses)

        def rank_main(comm: Communicator) -> tuple[list[Tensor], list[Counter[str]]]:
            counting = Counting(comm)
            stream = ResidualStream(self.plan, counting, rows, torch.float32)
            got: list[Tensor] = []
            seen: list[Counter[str]] = []

            def write(*blocks: str) -> None:
                for block in blocks:
                    sharded = case.gives[BLOCKS.index(block)].count("S")
                    held = held_rows(axes, owner, comm.seat.rank, sharded)
                    stream.write(block, self.part(block, comm.seat.rank, held))

            def read(name: str, *consumers: str) -> None:
                chosen = rows.select(self.chosen) if name == "last" else None
                counting.seen = Counter()
                normed = stream.read(norm, name, rows=chosen)
                seen.append(counting.seen)
                got.extend(normed.to(consumer) for consumer in consumers)

            write("embed")
            read("first", "one", "two")
            write("one", "two")
            read("second", "three")
            write("three")
            read("last", "head")
            return got, seen

        results = world.run(rank_main)
        return [got for got, _ in results], [seen for _, seen in results], world.calls

    def by_hand(self, rank: int) -> list[Tensor]:
        """What the reads give to one, two, three and the head."""
        axes = self.case.mesh.axes
        owner = leaves_of(axes, self.case.mesh.parallelism.attn_dp_size, self.real)
        ends = np.cumsum([0, *self.real])
        wanted = {int(ends[g]) + row for g, some in enumerate(self.chosen) for row in some}
        total = torch.zeros(sum(self.real), HIDDEN)
        after = {}
        for block in BLOCKS:
            total = total + sum(self.addends(block).values())
            after[block] = total * total + 7
        found = []
        for needs, last in zip(self.case.needs, ("embed", "embed", "two", "three"), strict=True):
            held = held_rows(axes, owner, rank, needs.count("S"))
            found.append(after[last][[r for r in held if last != "three" or r in wanted]])
        return found


def steps(case: Case) -> list[Step]:
    """Equal, ragged and missing rows, in the plans of the smallest and the largest regime."""
    groups = case.mesh.parallelism.attn_dp_size
    equal: list[tuple[int, ...]] = [(6,) * groups, (1,) * groups, (0,) * groups]
    ragged: list[tuple[int, ...]] = [(5, 2), (0, 4), (1, 0)] if groups == 2 else [(5,), (4,)]
    bound = plans(case)
    made = []
    for plan, real in [*product([bound[0]], equal), *product([bound[-1]], ragged)]:
        some = tuple(tuple(range(0, n, 2)) for n in real)
        for chosen in (some, tuple(tuple(range(n)) for n in real), ((),) * groups):
            made.append(Step(case, plan, real, chosen))
    return made


ids = [f"{case.mesh.axes} {'+'.join(case.gives)}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_reads_give_the_norm_of_plain_sums_whether_fused_or_not(case: Case) -> None:
    for step in steps(case):
        for fuses in (True, False):
            got, _, _ = step.run(fuses)
            for rank, held in enumerate(got):
                for one, expected in zip(held, step.by_hand(rank), strict=True):
                    assert torch.equal(one, expected)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_fused_or_not_makes_no_bit_of_difference(case: Case) -> None:
    for exact in steps(case):
        step = replace(exact, whole_numbers=False)
        for one, other in zip(step.run(True)[0], step.run(False)[0], strict=True):
            assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_there_is_one_sum_either_way(case: Case) -> None:
    for step in steps(case):
        _, fused, made = step.run(True)
        _, apart, made_apart = step.run(False)
        assert made == made_apart
        for seen, seen_apart in zip(fused, apart, strict=True):
            assert not any("fused" in op or "declined" in op for op in (*seen[0], *seen_apart[0]))
            for at, (op, others) in enumerate(case.sums, start=1):
                assert seen[at][f"fused {op}"] == 1
                assert seen_apart[at][f"declined {op}"] == 1
                assert seen_apart[at][op] - seen[at][op] == 1
                assert seen[at].total() == 1 + others
                assert seen_apart[at].total() == 2 + others  # one of them sent nothing


def test_the_plans_fuse_both_forms_and_the_lone_read_without_a_residual_is_not() -> None:
    forms = {op for case in CASES for op, _ in case.sums}
    assert forms == {Op.ALL_REDUCE, Op.REDUCE_SCATTER}
    for case in CASES:
        for plan in plans(case):
            assert [
                [settle.route.moves[-1].op for settle in read.settles if settle.route.fused]
                for read in plan.reads
            ] == [[], *([op] for op, _ in case.sums)]
