"""One contract for all communicators: simulated ranks, staged ones, and processes over Gloo."""

import gc
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from comm_cases import (
    COUNTS,
    MESHES,
    Case,
    cases,
    drawn,
    gloo_rank,
    groups_along,
    in_rank_order,
    run_all,
)
from greenlet import getcurrent, greenlet
from torch import Tensor

from isomoe.comm import Communicator, LocalComm, SimWorld, torch_communicator
from isomoe.comm.torch_comm import GlooComm, NcclComm, StagedComm
from isomoe.errors import CollectiveError
from isomoe.layout import Axes, Mesh, Parallelism, Seat
from support import runs

Results = list[dict[str, Tensor]]
"""Of each rank, by run of axes and case."""


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Results]:
    """Results of all cases, each world run once."""
    known: dict[tuple[str, int], Results] = {}

    def get(kind: str, world_size: int) -> Results:
        if (kind, world_size) not in known:
            if kind == "simulated":
                results = SimWorld(MESHES[world_size]).run(run_all)
            elif kind == "staged":
                world = SimWorld(MESHES[world_size])
                results = world.run(lambda comm: run_all(StagedComm(comm, torch.device("cpu"))))
            else:
                folder = tmp_path_factory.mktemp(f"gloo{world_size}")
                torch.multiprocessing.spawn(
                    gloo_rank, (world_size, str(folder)), nprocs=world_size, join=True
                )
                results = [load(folder / f"{rank}.pt") for rank in range(world_size)]
            known[kind, world_size] = results
        return known[kind, world_size]

    return get


def load(file: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("collective", sorted({case.name.split()[0] for case in cases()}))
@pytest.mark.parametrize("world_size", MESHES)
@pytest.mark.parametrize("kind", ["simulated", "staged", "gloo"])
def test_a_collective_gives_what_plain_tensors_give(
    kind: str, world_size: int, collective: str, outcomes: Callable[[str, int], Results]
) -> None:
    mesh = MESHES[world_size]
    results = outcomes(kind, world_size)
    for case in cases():
        if case.name.split()[0] == collective:
            for axes in runs(len(mesh.axes)):
                for group in groups_along(mesh, axes):
                    held = [results[rank][f"{axes} {case.name}"] for rank in group]
                    assert_as_expected(case, held)


def assert_as_expected(case: Case, held: list[Tensor]) -> None:
    given = [case.given(place, len(held)) for place in range(len(held))]
    for got, expected in zip(held, case.expected(given), strict=True):
        assert got.dtype == expected.dtype, case.name
        assert got.shape == expected.shape, case.name
        assert torch.equal(got, expected), case.name  # exactly: sums are promised in rank order
    if case.replicated:
        assert all(torch.equal(held[0], other) for other in held), case.name


def test_the_cases_are_as_hard_as_they_claim() -> None:
    assert any(len(set(counts)) > 1 and 0 in counts for counts in COUNTS.values())
    assert any(not any(counts) for counts in COUNTS.values())
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    methods = {name for name, value in vars(Communicator).items() if callable(value)} - {"__init__"}
    assert methods - {"sum_add_norm"} == {name.split()[0] for name in names}, "one without a case"


class Doubling:
    """A norm of sorts: the sum, and twice that."""

    weight, eps, dtype = torch.ones(3), 0.0, torch.float32

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + addend
        return total, 2 * total


@pytest.mark.parametrize("kind", ["whole", *COUNTS])
@pytest.mark.parametrize("world_size", MESHES)
def test_a_sum_with_what_follows_it_is_that_of_plain_tensors(world_size: int, kind: str) -> None:
    """Of simulated ranks that fuse; `COUNTS` are of the members that get rows of their own."""
    mesh = MESHES[world_size]
    counts = COUNTS.get(kind)
    for axes in runs(len(mesh.axes)):
        for dtype in (torch.float32, torch.bfloat16):
            held = run_fused(mesh, axes, counts, dtype)
            for group in groups_along(mesh, axes):
                total = in_rank_order([addends(rank, len(group), counts, dtype) for rank in group])
                ends = list(accumulate(counts[: len(group)])) if counts else []
                for place, rank in enumerate(group):
                    mine = total[ends[place] - counts[place] : ends[place]] if counts else total
                    expected = residual(rank, len(mine)) + mine
                    added, normed = held[rank]
                    assert torch.equal(added, expected)
                    assert torch.equal(normed, 2 * expected)


def addends(rank: int, members: int, counts: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
    return drawn((sum(counts[:members]) if counts else 5, 3), dtype, rank)


def residual(rank: int, rows: int) -> Tensor:
    return drawn((rows, 3), torch.float32, 50 + rank)


def run_fused(
    mesh: Mesh, axes: Axes, counts: Sequence[int] | None, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """One fused sum on each rank, which must be one collective for each group."""
    world = SimWorld(mesh, fuses=True)
    members = len(groups_along(mesh, axes)[0])

    def rank_main(comm: Communicator) -> tuple[Tensor, Tensor]:
        rank = comm.seat.rank
        x = addends(rank, members, counts, dtype)
        place = next(group.index(rank) for group in groups_along(mesh, axes) if rank in group)
        rows = counts[place] if counts else len(x)
        mine = counts and counts[:members]
        done = comm.sum_add_norm(x, axes, mine, residual(rank, rows), Doubling())
        assert done is not None
        assert torch.equal(x, addends(rank, members, counts, dtype)), "the addends were changed"
        return done

    held = world.run(rank_main)
    assert world.calls == len(groups_along(mesh, axes))
    return held


def declined(comm: Communicator) -> bool:
    """Whether it declines sums with what follows them, of either form, and changes nothing."""
    x, before = ROWS.clone(), ROWS.clone()
    answers = [
        comm.sum_add_norm(x, (0,), None, before, Doubling()),
        comm.sum_add_norm(x, (0,), [2, 2], before[:2], Doubling()),
    ]
    assert torch.equal(x, ROWS)
    assert torch.equal(before, ROWS)
    return answers == [None, None]


def test_simulated_ranks_that_do_not_fuse_decline_and_send_nothing() -> None:
    world = SimWorld(MESHES[2], fuses=False)
    assert world.run(declined) == [True, True]
    # Were anything sent, a lone caller would wait in it.
    assert world.run(lambda comm: comm.seat.rank == 1 or declined(comm)) == [True, True]
    assert world.calls == 0


def test_communicators_without_such_sums_decline_and_send_nothing() -> None:
    """They have no group that anything could be sent to, and nobody else calls."""
    seat = Seat(MESHES[2], 1)
    alone = LocalComm(seat)
    for comm in (
        alone,
        GlooComm(seat, {}),
        NcclComm(seat, {}),
        StagedComm(alone, torch.device("cpu")),
    ):
        assert declined(comm), type(comm)


def broken(rank_main: Callable[[Communicator], object], mesh: Mesh = MESHES[4]) -> str:
    """Runs ranks that disagree; the error's text, once no rank is left alive."""
    unwound = []

    def watched(comm: Communicator) -> None:
        try:
            rank_main(comm)
        finally:
            unwound.append(comm.seat.rank)

    with pytest.raises(CollectiveError) as raised:
        SimWorld(mesh).run(watched)
    assert_no_rank_is_alive()
    assert len(unwound) == len(set(unwound))
    return str(raised.value)


def assert_no_rank_is_alive() -> None:
    gc.collect()
    alive = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), greenlet) and thing is not getcurrent() and bool(thing)
    ]
    assert not alive


ROWS = torch.ones(4, 2)


def test_a_rank_that_calls_another_collective_is_reported() -> None:
    def rank_main(comm: Communicator) -> None:
        comm.all_reduce(ROWS, (1,))
        if comm.seat.rank == 2:
            comm.broadcast(ROWS, (0,))
        else:
            comm.all_reduce(ROWS, (0,))

    message = broken(rank_main)
    assert "ranks 0 and 2 of group (0, 2) differ" in message
    assert "all_reduce over axes (0,)" in message
    assert "broadcast over axes (0,)" in message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda c: c.all_reduce(ROWS, (0,)), lambda c: c.all_reduce(ROWS[:3], (0,))),
        (lambda c: c.all_reduce(ROWS, (0,)), lambda c: c.all_reduce(ROWS.double(), (0,))),
        (lambda c: c.broadcast(ROWS, (0,)), lambda c: c.broadcast(ROWS.t(), (0,))),
        (
            lambda c: c.reduce_scatter(ROWS, (0,), [2, 2]),
            lambda c: c.reduce_scatter(ROWS, (0,), [1, 3]),
        ),
        (
            lambda c: c.all_gather(ROWS, (0,), [4, 4]),
            lambda c: c.all_gather(ROWS, (0,), [3, 4]),
        ),
        (
            lambda c: c.all_gather(ROWS, (0,), [4, 4]),
            lambda c: c.all_gather(ROWS[:, :1], (0,), [4, 4]),
        ),
        (
            lambda c: c.all_to_all(ROWS, (0,), [1, 3], [1, 2]),
            lambda c: c.all_to_all(ROWS, (0,), [3, 1], [3, 1]),
        ),
    ],
    ids=["rows", "dtype", "shape", "scattered counts", "gathered counts", "features", "expected"],
)
@pytest.mark.parametrize("culprit", [0, 1, 2, 3])
def test_a_rank_with_other_counts_shapes_or_dtypes_is_reported(
    one: Callable[[Communicator], Tensor], other: Callable[[Communicator], Tensor], culprit: int
) -> None:
    def rank_main(comm: Communicator) -> None:
        comm.all_reduce(ROWS, (0, 1))
        (other if comm.seat.rank == culprit else one)(comm)
        raise AssertionError("went on after a mismatch")

    def all_to_all_aware(comm: Communicator) -> None:
        group = comm.seat.mesh.group(comm.seat.rank, (0,))
        if culprit in group:
            rank_main(comm)
        else:
            comm.all_reduce(ROWS, (0, 1))

    message = broken(all_to_all_aware)
    assert "differ" in message or "expects" in message or "the row map says" in message


def test_a_rank_whose_rows_are_not_those_of_the_counts_is_reported() -> None:
    for call in (
        lambda c: c.all_gather(ROWS, (0,), [3, 3]),
        lambda c: c.reduce_scatter(ROWS, (0,), [3, 3]),
        lambda c: c.all_to_all(ROWS, (0,), [3, 3], [3, 3]),
    ):
        assert "of 4 rows, but the row map says" in broken(call)


def test_a_rank_that_calls_over_other_axes_is_reported() -> None:
    message = broken(lambda c: c.all_reduce(ROWS, (1,) if c.seat.rank == 3 else (0,)))
    assert "rank 3 waits in all_reduce over axes (1,)" in message
    assert "rank 1 waits in all_reduce over axes (0,)" in message


def test_a_rank_that_never_calls_is_named() -> None:
    message = broken(lambda c: None if c.seat.rank == 1 else c.all_reduce(ROWS, (0,)))
    assert "rank 3 waits in all_reduce over axes (0,)" in message
    assert message.endswith("ended: ranks 0, 1, 2")


def test_ranks_that_call_in_another_order_are_reported_at_the_first_call() -> None:
    done = []

    def rank_main(comm: Communicator) -> None:
        comm.all_gather(ROWS, (0, 1), [4] * 4)
        done.append(comm.seat.rank)
        first, second = (comm.all_reduce, comm.broadcast)[:: -1 if comm.seat.rank == 2 else 1]
        first(ROWS, (0, 1))
        done.append("past the mismatch")
        second(ROWS, (0, 1))

    assert "differ: all_reduce" in broken(rank_main)
    assert set(done) == {0, 1, 2}, "rank 2 is stopped at its call, before rank 3 goes on"


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "between"])
def test_what_a_rank_raises_comes_out_and_no_rank_stays_behind(culprit: int, when: str) -> None:
    def rank_main(comm: Communicator) -> None:
        if when == "between":
            comm.all_reduce(ROWS, (0,))
        if comm.seat.rank == culprit:
            raise ZeroDivisionError(f"rank {culprit}")
        comm.all_reduce(ROWS, (0,))

    world = SimWorld(MESHES[3])
    with pytest.raises(ZeroDivisionError, match=f"rank {culprit}"):
        world.run(rank_main)
    assert_no_rank_is_alive()
    # The world can be used again: nothing of the broken run is left in it.
    (total, *_) = world.run(lambda comm: comm.all_reduce(ROWS, (0,)))
    assert torch.equal(total, 3 * ROWS)


def test_results_are_in_rank_order_and_collectives_are_counted_once_a_group() -> None:
    world = SimWorld(MESHES[4])

    def rank_main(comm: Communicator) -> int:
        comm.all_reduce(ROWS, (1,))
        comm.all_reduce(ROWS, (0, 1))
        return comm.seat.rank

    assert world.run(rank_main) == [0, 1, 2, 3]
    assert world.calls == 2 + 1


def test_a_lone_rank_has_nobody_to_call() -> None:
    comm = LocalComm(Seat(Mesh.of(Parallelism()), 0))
    for call in (
        lambda: comm.all_reduce(ROWS, ()),
        lambda: comm.all_gather(ROWS, (), [4]),
        lambda: comm.reduce_scatter(ROWS, (), [4]),
        lambda: comm.all_to_all(ROWS, (), [4], [4]),
        lambda: comm.broadcast(ROWS, ()),
    ):
        with pytest.raises(CollectiveError, match="on the only rank"):
            call()


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "mpi")
    with pytest.raises(CollectiveError, match="'mpi': gloo and nccl are supported"):
        torch_communicator(Seat(Mesh.of(Parallelism()), 0), [])
