"""The bytes that plans claim for rows on their way to experts, against those that are sent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from isomoe.blocks import SparseMoe
from isomoe.blocks.wire import Pack
from isomoe.comm import Communicator, LocalComm, RoutedRows, SimWorld
from isomoe.kernels import Routing
from isomoe.layout import (
    MACHINES,
    A2ABackend,
    Axes,
    Bundle,
    CostModel,
    Machine,
    Mesh,
    Move,
    Op,
    Parallelism,
    Regime,
    RegimePlan,
    Seat,
    TokenRows,
    WireFormat,
)
from isomoe.stream import ResidualStream
from support import group_of, held_rows, leaves_of

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
"""Of the stream on each machine."""


class Counting(LocalComm):
    """Passes gathers and all-to-alls on; other collectives are refused.

    Attributes:
        gathered: bytes that go over the wire when each member's part goes once round the ring.
        exchanged: of each all-to-all the bytes that go to other ranks.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner.seat)
        self._inner = inner
        self.gathered = 0
        self.exchanged: list[int] = []

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        self.gathered += x.numel() * x.element_size() * (len(counts) - 1)
        return self._inner.all_gather(x, axes, counts)

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        rank = self.seat.rank
        place = group_of(self.seat.mesh.axes, rank, axes).index(rank)
        away = sum(send) - send[place]
        self.exchanged.append(away * x[:1].numel() * x.element_size() if len(x) else 0)
        return self._inner.all_to_all(x, axes, send, receive)


@dataclass(frozen=True)
class Case:
    """Rows that go to experts.

    Attributes:
        inner: the moves of the block, the first of them that of the rows.
        rows: of each attention-DP group.
    """

    machine: str
    mesh: Mesh
    hidden: int
    top_k: int
    inner: tuple[Move, ...]
    rows: tuple[int, ...]

    @property
    def form(self) -> WireFormat:
        assert self.inner[0].bundle is not None
        return self.inner[0].bundle.format

    def claim(self, move: Move) -> float:
        """Bytes that all ranks send together."""
        machine: Machine = MACHINES[self.machine]
        cost = CostModel(machine=machine, mesh=self.mesh, row_values=self.hidden)
        return cost.sent_bytes_per_row(move) * sum(self.rows) * self.mesh.size

    def run(self, ids: Tensor, per_rank: int) -> tuple[list[Counting], list[RoutedRows]]:
        """Sends the rows, and what comes of them back. ids: [all rows, K]."""
        owner = leaves_of(self.mesh.axes, self.mesh.parallelism.attn_dp_size, self.rows)
        random = np.random.default_rng(1)
        x = torch.from_numpy(random.normal(size=(len(ids), self.hidden)))
        weights = torch.from_numpy(random.random(ids.shape)).float()
        dtype = DTYPES[self.machine]
        plan = RegimePlan(
            regime=Regime(rows=len(ids), equal=False),
            mesh=self.mesh,
            embedding="",
            embedding_gives=self.inner[0].before,
            reads=(),
            inner=(("moe", self.inner),),
            kinds={"moe": "experts"},
            predicted_us=0.0,
        )

        def rank_main(comm: Communicator) -> tuple[Counting, RoutedRows]:
            counting = Counting(comm)
            rows = TokenRows.of(self.mesh, self.rows)
            stream = ResidualStream(plan, counting, rows, dtype)
            sharded = self.inner[0].before.count("S")
            mine = held_rows(self.mesh.axes, owner, comm.seat.rank, sharded)
            values = Pack(self.form).forward(x[mine].to(dtype))
            came = stream.spread("moe", (values, ids[mine].int(), weights[mine]), per_rank)
            stream.unite("moe", torch.zeros(len(came[1]), self.hidden))
            return counting, came

        results = SimWorld(self.mesh).run(rank_main)
        return [counting for counting, _ in results], [came for _, came in results]


def moe(layout: Parallelism, hidden: int, top_k: int, experts: int) -> SparseMoe:
    return SparseMoe(
        Seat(Mesh.of(layout), 0),
        "moe",
        hidden_size=hidden,
        intermediate_size=12,
        num_experts=experts,
        routing=Routing(top_k=top_k),
    )


GATHERS = [
    Parallelism(tp_size=2, attn_dp_size=2, ep_size=2),
    Parallelism(tp_size=3, ep_size=3),
    Parallelism(tp_size=4, attn_dp_size=2, ep_size=4),
    Parallelism(tp_size=6, attn_dp_size=3, ep_size=3),
]


def gathers(layout: Parallelism, form: WireFormat, hidden: int, top_k: int) -> list[Move]:
    """Those that a block declares. Without a format it declares none: the rows alone travel."""
    packed = replace(layout, moe_wire_format=form if form != "none" else WireFormat.FP8)
    variants = moe(packed, hidden, top_k, 12).spec.variants
    moves = [variant.inner[0] for variant in variants if variant.inner]
    if form == "none":
        return [replace(move, bundle=Bundle(WireFormat.NONE, top_k)) for move in moves]
    return moves


@pytest.mark.parametrize("machine", DTYPES)
@pytest.mark.parametrize("form", list(WireFormat))
@pytest.mark.parametrize("layout", GATHERS, ids=str)
def test_a_packed_gather_sends_what_the_plan_claims(
    layout: Parallelism, form: WireFormat, machine: str
) -> None:
    groups = layout.attn_dp_size
    tried = 0
    for (hidden, top_k), rows in product(
        [(48, 1), (128, 2), (160, 4)], [(7, 0, 12), (1, 0, 0), (0, 0, 0), (5, 5, 5)]
    ):
        for move in gathers(layout, form, hidden, top_k):
            mesh = Mesh.of(layout)
            case = Case(machine, mesh, hidden, top_k, (move,), rows[:groups])
            total = sum(case.rows)
            ids = torch.arange(total * top_k).view(total, top_k)
            counted, came = case.run(ids, 1)
            sent = sum(counting.gathered for counting in counted)
            assert sent == pytest.approx(case.claim(move), rel=1e-12)
            assert not any(counting.exchanged for counting in counted)
            assert all(torch.equal(there, ids) for _, there, _ in came), "not all rows came"
            tried += sent > 0
    assert tried >= 6


def exchange(layout: Parallelism, hidden: int, top_k: int, experts: int) -> tuple[Move, ...]:
    layout = replace(layout, moe_a2a_backend=A2ABackend.TORCH)
    (variant,) = moe(layout, hidden, top_k, experts).spec.variants
    return variant.inner


@dataclass(frozen=True)
class Routed:
    """Experts of a model on EP ranks.

    Attributes:
        bias: how far the claim is off. It takes a row's choices for independent, so that two may
            be one expert; they are distinct, and so reach a few more ranks.
    """

    layout: Parallelism
    experts: int
    top_k: int
    bias: float


ROUTED = [
    Routed(Parallelism(tp_size=2, attn_dp_size=2, ep_size=2), 16, 4, -0.025),
    Routed(Parallelism(tp_size=4, attn_dp_size=2, ep_size=4), 16, 4, -0.061),
    Routed(Parallelism(tp_size=6, attn_dp_size=3, ep_size=3), 12, 2, -0.035),
    Routed(Parallelism(tp_size=3, ep_size=3), 24, 1, 0.0),
    Routed(Parallelism(tp_size=8, attn_dp_size=8, ep_size=8), 64, 3, -0.014),
]
ROWS = 3000


def moments(reached: Iterable[set[int]]) -> tuple[float, float]:
    """Of the other ranks that a row of rank 0 goes to: the mean, and the standard deviation."""
    others = np.array([len(ranks - {0}) for ranks in reached])
    return float(others.mean()), float(others.std())


def independent(routed: Routed) -> tuple[float, float]:
    """If each choice is made as if there were no others, by trying all."""
    return moments(map(set, product(range(routed.layout.ep_size), repeat=routed.top_k)))


def distinct(routed: Routed) -> tuple[float, float]:
    """If all sets of so many experts are alike, by trying all."""
    per_rank = routed.experts // routed.layout.ep_size
    every = combinations(range(routed.experts), routed.top_k)
    return moments({expert // per_rank for expert in chosen} for chosen in every)


def random_ids(routed: Routed, repeated: bool) -> Tensor:
    random = np.random.default_rng([routed.experts, routed.top_k, repeated])
    rows = [random.choice(routed.experts, routed.top_k, replace=repeated) for _ in range(ROWS)]
    return torch.from_numpy(np.array(rows))


@pytest.mark.parametrize("form", list(WireFormat))
@pytest.mark.parametrize("machine", DTYPES)
@pytest.mark.parametrize("repeated", [True, False], ids=["independent", "distinct"])
@pytest.mark.parametrize("routed", ROUTED, ids=lambda routed: str(routed.layout))
def test_dispatch_and_combine_send_what_the_plan_claims(
    routed: Routed, repeated: bool, machine: str, form: WireFormat
) -> None:
    """On average: each row's choice is one draw, of which 3000 are summed."""
    layout = replace(routed.layout, moe_wire_format=form)
    inner = exchange(layout, 48, routed.top_k, routed.experts)
    assert [move.op for move in inner] == [Op.DISPATCH, Op.COMBINE]
    groups = layout.attn_dp_size
    rows = (ROWS - (groups - 1) * 300, *(300,) * (groups - 1))
    case = Case(machine, Mesh.of(layout), 48, routed.top_k, inner, rows)
    counted, _ = case.run(random_ids(routed, repeated), routed.experts // layout.ep_size)
    mean, deviation = independent(routed) if repeated else distinct(routed)
    claimed = independent(routed)[0]
    for at, move in enumerate(inner, start=1):  # the first all-to-all is that of the counts
        sent = sum(counting.exchanged[at] for counting in counted)
        per_row = case.claim(move) / claimed / ROWS  # as claimed of each row, for each rank it goes
        copies = layout.tp_size // layout.ep_size
        assert per_row / copies == pytest.approx(bytes_of_a_row(case, move), rel=1e-9)
        assert abs(sent - mean * ROWS * per_row) <= 3 * deviation * sqrt(ROWS) * per_row
    assert all(len(counting.exchanged) == 3 for counting in counted)


def bytes_of_a_row(case: Case, move: Move) -> int:
    """As it is packed, with its experts (int32) and weights (fp32); what comes back is not."""
    wide = DTYPES[case.machine].itemsize
    if move.op is Op.COMBINE:
        return wide * case.hidden
    x = torch.ones(1, case.hidden, dtype=DTYPES[case.machine])
    packed = sum(part.numel() * part.element_size() for part in Pack(case.form).forward(x))
    return int(packed) + case.top_k * (4 + 4)


@pytest.mark.parametrize(
    ("groups", "kept", "top_k", "members"),
    [(8, 4, 8, 8), (8, 4, 8, 4), (8, 3, 2, 2), (4, 2, 3, 8), (4, 1, 2, 8), (6, 4, 2, 3)],
)
def test_a_row_reaches_the_ranks_of_the_groups_that_it_keeps(
    groups: int, kept: int, top_k: int, members: int
) -> None:
    """Counted: all choices of groups, and of each expert among those of a kept group."""
    experts = groups * members  # so that ranks and groups hold whole ones
    ranks = np.arange(experts) * members // experts
    of_group = np.arange(experts) * groups // experts
    reached = []
    for chosen in combinations(range(groups), kept):
        there = np.bincount(ranks[np.isin(of_group, chosen)], minlength=members)
        share = there / there.sum()
        reached.append((1 - (1 - share) ** top_k).mean())
    bundle = Bundle(WireFormat.NONE, top_k, groups, kept)
    expected = (members - 1) * np.mean(reached)
    assert bundle.destinations(members) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("routed", ROUTED, ids=lambda routed: str(routed.layout))
def test_a_claim_is_a_little_too_small_since_experts_of_a_row_are_distinct(routed: Routed) -> None:
    claimed, sent = independent(routed)[0], distinct(routed)[0]
    assert claimed / sent - 1 == pytest.approx(routed.bias, abs=1e-3)
    bundle = Bundle(WireFormat.NONE, routed.top_k)
    assert bundle.destinations(routed.layout.ep_size) == pytest.approx(claimed, rel=1e-12)
