"""Rows go to the ranks of the experts they chose, and their sums come back.

What should arrive is worked out row by row on lists. Each member of each group has rows of its own,
so that nothing can pass between groups unnoticed.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomoe.comm import (
    CommExchange,
    Communicator,
    LocalComm,
    RoutedRows,
    SimWorld,
    torch_communicator,
)
from isomoe.layout import Axes, Mesh, Parallelism, Seat
from support import group_of

T = TypeVar("T")

HIDDEN = 4
GROUPS: list[tuple[Mesh, Axes]] = [
    (Mesh.of(Parallelism(tp_size=2, ep_size=2)), (0,)),
    (Mesh.of(Parallelism(tp_size=3, ep_size=3)), (0,)),
    (Mesh.of(Parallelism(tp_size=4, attn_dp_size=2)), (0,)),
    (Mesh.of(Parallelism(tp_size=4, attn_dp_size=2)), (0, 1)),
    (Mesh.of(Parallelism(tp_size=6, attn_dp_size=2)), (0,)),
    (Mesh.of(Parallelism(tp_size=6, attn_dp_size=3)), (0,)),
    (Mesh.of(Parallelism(tp_size=6, attn_dp_size=3)), (0, 1)),
]
DTYPES: list[tuple[torch.dtype, ...]] = [
    (torch.float32,),
    (torch.bfloat16,),
    (torch.float8_e4m3fn, torch.float32),
    (torch.uint8,),
    (torch.uint8, torch.float8_e4m3fn, torch.float32),
]


Sent = tuple[int, Axes, list[int], Tensor]
"""Who sent, over which axes, how many rows to each member, and the rows."""


class Recording(LocalComm):
    """Passes on all-to-alls, and keeps what was sent; other collectives are refused."""

    def __init__(self, inner: Communicator, log: list[Sent]) -> None:
        super().__init__(inner.seat)
        self._inner = inner
        self._log = log

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        self._log.append((self.seat.rank, axes, list(send), x.clone()))
        return self._inner.all_to_all(x, axes, send, receive)


@dataclass(frozen=True)
class Case:
    """The rows of all ranks.

    Attributes:
        chosen: for each rank its rows, and for each of them the experts; -1 is none.
    """

    mesh: Mesh
    axes: Axes
    per_rank: int
    dtypes: tuple[torch.dtype, ...]
    chosen: list[list[list[int]]]
    top_k: int

    def rows(self, rank: int) -> RoutedRows:
        """What a rank has. No two rows of all ranks are alike: each has weights of its own."""
        ids = self.chosen[rank]
        random = np.random.default_rng(rank)

        def drawn(dtype: torch.dtype, wide: int) -> Tensor:
            """Small whole numbers: all that is made of them is exact."""
            low = 0 if dtype == torch.uint8 else -8
            values = torch.from_numpy(random.integers(low, 9, (len(ids), wide)))
            return values.to(torch.float32).to(dtype)

        wide = (HIDDEN, 3, 1)
        values = tuple(drawn(dtype, wide[i]) for i, dtype in enumerate(self.dtypes))
        weights = torch.arange(len(ids) * self.top_k, dtype=torch.float32) / 4 + 64 * rank + 1
        return (
            values,
            torch.tensor(ids, dtype=torch.int32).view(len(ids), self.top_k),
            weights.view(len(ids), self.top_k),
        )

    def group(self, rank: int) -> list[int]:
        return group_of(self.mesh.axes, rank, self.axes)

    def owned(self, rank: int) -> range:
        """The experts of a rank."""
        first = self.group(rank).index(rank) * self.per_rank
        return range(first, first + self.per_rank)

    def run(self, rank_main: Callable[[Communicator], T], log: list[Sent] | None = None) -> list[T]:
        kept = [] if log is None else log
        return SimWorld(self.mesh).run(lambda comm: rank_main(Recording(comm, kept)))


Row = tuple[bytes, ...]


def listed(rows: RoutedRows) -> list[Row]:
    """Each row as the bytes of all that belongs to it."""
    values, ids, weights = rows
    plain = [x.contiguous().view(torch.uint8).numpy() if x.numel() else x for x in values]
    parts = [*plain, ids.numpy(), weights.numpy()]
    return [tuple(part[i].tobytes() for part in parts) for i in range(len(ids))]


def arriving(case: Case, rank: int) -> list[Row]:
    """The rows of a group that chose any expert of a rank, each once."""
    owned = case.owned(rank)
    return [
        row
        for source in case.group(rank)
        for row, ids in zip(listed(case.rows(source)), case.chosen[source], strict=True)
        if any(one in owned for one in ids)
    ]


def served(rows: RoutedRows, owned: range, dtype: torch.dtype) -> Tensor:
    """What the experts of a rank make of rows: expert e of x makes (e + 2) x + e, weighted."""
    (x, *_), ids, weights = rows
    out = torch.zeros(len(ids), HIDDEN)
    for row, chosen in enumerate(ids.tolist()):
        for place, expert in enumerate(chosen):
            if expert in owned:
                out[row] += weights[row, place] * ((expert + 2) * x[row].float() + expert)
    return out.to(dtype)


def dense(case: Case, rank: int) -> Tensor:
    """What all chosen experts together make of a rank's rows, nothing sent."""
    every = range(len(case.group(rank)) * case.per_rank)
    return served(case.rows(rank), every, torch.float32)


def exchanged(case: Case, comm: Communicator, dtype: torch.dtype) -> tuple[list[Row], Tensor]:
    """One dispatch and combine on one rank: what arrived, and what came back."""
    exchange = CommExchange(comm)
    rank = comm.seat.rank
    rows = case.rows(rank)
    before = listed(rows)
    most = max(len(case.chosen[other]) for other in case.group(rank))
    arrived, sent = exchange.dispatch(rows, case.axes, case.per_rank, most)
    got = listed(arrived)
    assert [x.dtype for x in arrived[0]] == [x.dtype for x in rows[0]]
    assert (arrived[1].dtype, arrived[2].dtype) == (torch.int32, torch.float32)
    back = exchange.combine(served(arrived, case.owned(rank), dtype), sent)
    assert back.dtype == dtype
    assert listed(rows) == before, "the input was changed"
    return got, back


def check(case: Case) -> list[int]:
    """Dispatch, what was sent, and combine, against the oracle; the rows that each rank sent."""
    log: list[Sent] = []
    results = case.run(lambda comm: exchanged(case, comm, torch.float32), log)
    for rank, (arrived, back) in enumerate(results):
        assert Counter(arrived) == Counter(arriving(case, rank)), rank
        assert max(Counter(arrived).values(), default=1) == 1, "a row came twice"
        assert torch.equal(back, dense(case, rank)), rank
    return check_sent(case, log)


def check_sent(case: Case, log: list[Sent]) -> list[int]:
    """The counts, then the rows, then their sums; padding rows in none of them."""
    sent = []
    for rank in range(case.mesh.size):
        mine = [(send, x) for who, axes, send, x in log if who == rank and axes == case.axes]
        (_, counts), (send, rows), (back, sums) = mine
        assert len(mine) * case.mesh.size == len(log)
        going = [
            sum(any(one in case.owned(member) for one in ids) for ids in case.chosen[rank])
            for member in case.group(rank)
        ]
        assert send == going
        assert counts.flatten().tolist() == going
        assert len(rows) == sum(going)
        assert len(sums) == len(arriving(case, rank)) == sum(back)
        width = sum(len(part) for part in listed(case.rows(rank))[0]) if len(rows) else 0
        assert rows.numel() == width * len(rows), "more travels than the rows"
        sent.append(len(rows))
    return sent


@settings(max_examples=150)
@given(st.data())
def test_what_arrives_and_comes_back_is_what_lists_say(data: st.DataObject) -> None:
    mesh, axes = data.draw(st.sampled_from(GROUPS))
    per_rank = data.draw(st.integers(1, 4))
    experts = len(group_of(mesh.axes, 0, axes)) * per_rank
    top_k = data.draw(st.integers(1, min(4, experts)))
    expert = st.integers(-1, experts - 1)
    row = st.lists(expert, min_size=top_k, max_size=top_k).filter(
        lambda ids: len(set(ids) - {-1}) == len([one for one in ids if one >= 0])
    )
    chosen = [data.draw(st.lists(row, max_size=6)) for _ in range(mesh.size)]
    check(Case(mesh, axes, per_rank, data.draw(st.sampled_from(DTYPES)), chosen, top_k))


def cases(top_k: int, choose: Callable[[int, int, int], list[list[int]]]) -> Iterator[Case]:
    """One for each group and some numbers of experts; `choose` is given rank, members, per_rank."""
    for (mesh, axes), per_rank in itertools.product(GROUPS, (1, 3)):
        members = len(group_of(mesh.axes, 0, axes))
        if members * per_rank < top_k:
            continue
        chosen = [choose(rank, members, per_rank) for rank in range(mesh.size)]
        yield Case(mesh, axes, per_rank, DTYPES[per_rank % 5], chosen, top_k)


def random_rows(count: int, experts: int, top_k: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.choice(experts, top_k, replace=False).tolist() for _ in range(count)]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_random_routing_with_padding_between(top_k: int) -> None:
    def choose(rank: int, members: int, per_rank: int) -> list[list[int]]:
        rows = random_rows(20 + rank, members * per_rank, top_k, seed=rank)
        return [[-1] * top_k if i % 3 == 2 else ids for i, ids in enumerate(rows)]

    for case in cases(top_k, choose):
        check(case)


def test_no_rank_has_any_row() -> None:
    for case in cases(2, lambda rank, members, per_rank: []):
        check(case)


@pytest.mark.parametrize("with_rows", [0, 1])
def test_one_rank_alone_has_rows(with_rows: int) -> None:
    for case in cases(
        2, lambda rank, m, p: random_rows(5, m * p, 2, 3) if rank == with_rows else []
    ):
        check(case)


def test_nothing_but_padding() -> None:
    for case in cases(2, lambda rank, members, per_rank: [[-1, -1]] * 3):
        assert not any(check(case)), "padding was sent"


@pytest.mark.parametrize("place", [0, -1])
def test_all_rows_go_to_one_rank(place: int) -> None:
    """All their experts are there: each row travels once."""

    def choose(rank: int, members: int, per_rank: int) -> list[list[int]]:
        first = (place % members) * per_rank
        here = [first + k for k in range(per_rank)]
        return [
            [here[(i + k) % per_rank] if k < per_rank else -1 for k in range(3)] for i in range(6)
        ]

    for case in cases(3, choose):
        assert check(case) == [6] * case.mesh.size


@pytest.mark.parametrize("order", list(itertools.permutations([1e8, 1.0, -1e8])))
def test_sums_are_made_in_the_order_of_ranks_in_fp32(order: tuple[float, ...]) -> None:
    expected = np.float32(0)
    for addend in order:
        expected = np.float32(expected + np.float32(addend))
    assert summed(order, torch.float32) == expected


def test_sums_of_narrow_values_are_wide_until_the_end() -> None:
    """Rounded after each, 256 + 1 + 1 would stay 256 in bf16, which knows 258."""
    assert summed((256.0, 1.0, 1.0), torch.bfloat16) == 258.0
    assert summed((2**40, 1, -1), torch.int64) == 2**40
    assert summed((2**40, 1, 1), torch.int64) == 2**40 + 2, "whole numbers stay exact"


def summed(addends: Sequence[float], dtype: torch.dtype) -> float:
    """One row of rank 1 that all three ranks serve, each with one addend."""
    mesh, axes = GROUPS[1]

    def rank_main(comm: Communicator) -> Tensor:
        exchange = CommExchange(comm)
        rows = 1 if comm.seat.rank == 1 else 0
        ids = torch.tensor([[2, 0, 1]], dtype=torch.int32)[:rows]
        parcel = (torch.zeros(rows, 1),), ids, torch.ones(rows, 3)
        _, sent = exchange.dispatch(parcel, axes, 1, 1)
        return exchange.combine(torch.tensor([[addends[comm.seat.rank]]], dtype=dtype), sent)

    back = SimWorld(mesh).run(rank_main)
    assert [len(x) for x in back] == [0, 1, 0]
    assert {x.dtype for x in back} == {dtype}
    return float(back[1])


def test_a_second_time_gives_the_same_bits() -> None:
    mesh, axes = GROUPS[-1]
    chosen = [random_rows(30 - 6 * rank, 18, 4, seed=rank) for rank in range(6)]
    case = Case(mesh, axes, 3, DTYPES[0], chosen, 4)

    def rank_main(comm: Communicator) -> tuple[list[Row], Tensor]:
        exchange = CommExchange(comm)
        arrived, sent = exchange.dispatch(case.rows(comm.seat.rank), axes, 3, 30)
        # Not whole numbers: another order of addends would give other bits.
        return listed(arrived), exchange.combine(arrived[2] ** 0.5 * 1000**comm.seat.rank, sent)

    one, other = case.run(rank_main), case.run(rank_main)
    for (rows, sums), (again, sums_again) in zip(one, other, strict=True):
        assert rows == again
        assert torch.equal(sums, sums_again)


GLOO = Case(
    GROUPS[1][0],
    (0,),
    2,
    DTYPES[-1],
    [random_rows(5, 6, 3, seed=1), [], [*random_rows(2, 6, 3, seed=2), [-1, -1, -1], [4, -1, 5]]],
    3,
)


def gloo_rank(rank: int, world_size: int, folder: str) -> None:
    """One process: the exchange over Gloo, and one more in which nobody has rows."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    comm = torch_communicator(Seat(GLOO.mesh, rank), [GLOO.axes])
    arrived, back = exchanged(GLOO, comm, torch.float32)
    nobody = Case(GLOO.mesh, GLOO.axes, 2, GLOO.dtypes, [[], [], []], 3)
    none, nothing = exchanged(nobody, comm, torch.float32)
    assert (none, nothing.shape) == ([], (0, HIDDEN))
    torch.save((arrived, back), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_over_gloo_exchange_what_simulated_ranks_do(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gloo_rank, (3, str(tmp_path)), nprocs=3, join=True)
    simulated = GLOO.run(lambda comm: exchanged(GLOO, comm, torch.float32))
    for rank in range(3):
        arrived, back = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert Counter(arrived) == Counter(arriving(GLOO, rank))
        assert torch.equal(back, dense(GLOO, rank))
        assert arrived == simulated[rank][0]
