"""The residual stream on simulated ranks, with integers: sums are exact, whatever the layout."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomoe.comm import Communicator, SimWorld
from isomoe.errors import PlacementError
from isomoe.layout import (
    MACHINES,
    Axes,
    BlockSpec,
    Chain,
    LogitsRows,
    Mesh,
    Move,
    Op,
    Parallelism,
    Placement,
    ReadSpec,
    RegimePlan,
    TokenRows,
    Variant,
    make_plan,
)
from isomoe.stream import Normed, ResidualStream
from support import coordinates, held_rows, leaves_of, placements

HIDDEN = 3
MESHES = [
    Mesh.of(Parallelism(tp_size=tp, attn_dp_size=dp, ep_size=ep))
    for tp, dp, ep in [(1, 1, 1), (3, 3, 1), (3, 1, 1), (4, 2, 2), (6, 2, 6), (6, 3, 1), (12, 3, 6)]
]
BLOCKS = ("embed", "one", "two")


class Recording(Communicator):
    """Passes everything on, and keeps a list of it."""

    def __init__(self, inner: Communicator, log: list[tuple[str, Axes, int, torch.dtype]]) -> None:
        super().__init__(inner.seat)
        self.inner = inner
        self.log = log

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        self.log.append(("all_reduce", axes, len(x), x.dtype))
        return self.inner.all_reduce(x, axes)

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        self.log.append(("all_gather", axes, sum(counts), x.dtype))
        return self.inner.all_gather(x, axes, counts)

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        self.log.append(("reduce_scatter", axes, len(x), x.dtype))
        return self.inner.reduce_scatter(x, axes, counts)

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        self.log.append(("all_to_all", axes, len(x), x.dtype))
        return self.inner.all_to_all(x, axes, send, receive)

    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        raise AssertionError("the stream has no broadcast")


def chain(mesh: Mesh, gives: Sequence[str], needs: Sequence[str]) -> Chain:
    """embed -> first -> {one, two} -> last (some rows only) -> head."""

    def block(name: str, needs: str | None, gives: str) -> BlockSpec:
        variant = Variant(None if needs is None else Placement(needs), Placement(gives))
        return BlockSpec(name=name, kind=name, variants=(variant,))

    return Chain(
        mesh=mesh,
        embedding=block("embed", None, gives[0]),
        reads=(
            ReadSpec(
                name="first",
                consumers=(block("one", needs[0], gives[1]), block("two", needs[1], gives[2])),
            ),
            ReadSpec(
                name="last", consumers=(block("head", needs[2], needs[2]),), selects_rows=True
            ),
        ),
        hidden_size=HIDDEN,
    )


def whole(block: str, rows: int) -> Tensor:
    """What a block contributes to each row of the step."""
    random = np.random.default_rng(list(block.encode()))
    return torch.from_numpy(random.integers(-50, 50, (rows, HIDDEN)))


def share(block: str, mesh: Mesh, rank: int, gives: str, held: list[int], total: int) -> Tensor:
    """A rank's part of it: any addends along P that sum to the whole, made up but for the last."""
    place = coordinates(mesh.axes)[rank]
    along = [axis for axis, letter in enumerate(gives) if letter == "P"]
    mine = tuple(place[axis] for axis in along)

    def made_up(member: tuple[int, ...]) -> Tensor:
        random = np.random.default_rng([*block.encode(), *member, len(member)])
        return torch.from_numpy(random.integers(-9, 9, (total, HIDDEN)))

    members = coordinates([mesh.axes[axis] for axis in along])
    if mine == members[-1]:
        part = whole(block, total) - sum(made_up(m) for m in members[:-1])
    else:
        part = made_up(mine)
    return part[held]


class Square:
    """Not linear, so that a sum is not normed by parts unnoticed."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * x + 7

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        total = (residual + addend).to(residual.dtype)
        return total, self(total)


norm = Square()


@settings(max_examples=150)
@given(st.data())
def test_every_block_sees_the_norm_of_everything_written_before(data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from(MESHES))
    axes, groups = len(mesh.axes), mesh.parallelism.attn_dp_size
    gives = [data.draw(st.sampled_from(placements(axes))) for _ in BLOCKS]
    needs = [data.draw(st.sampled_from(placements(axes, "SR"))) for _ in range(3)]
    real = [data.draw(st.integers(0, 5)) for _ in range(groups)]
    held = [n + data.draw(st.integers(0, 2)) for n in real]
    chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else [] for n in real]
    machine = data.draw(st.sampled_from(list(MACHINES.values())))
    plan = data.draw(st.sampled_from(make_plan(chain(mesh, gives, needs), machine).regimes))
    rows = TokenRows.of(mesh, real, held)
    selected = rows.select(chosen)
    owner = leaves_of(mesh.axes, groups, held)
    ends = np.cumsum([0, *held])
    wanted = {int(ends[g]) + row for g, some in enumerate(chosen) for row in some}
    total = len(owner)

    def rank_main(comm: Communicator) -> None:
        rank = comm.seat.rank

        def mine(placement: str) -> list[int]:
            return held_rows(mesh.axes, owner, rank, placement.count("S"))

        def write(block: str, placement: str) -> None:
            part = share(block, mesh, rank, placement, mine(placement), total)
            stream.write(block, part)

        stream = ResidualStream(plan, comm, rows, torch.int64)
        write("embed", gives[0])
        h = stream.read(norm, "first")
        before = norm(whole("embed", total))
        assert torch.equal(h.to("one"), before[mine(needs[0])])
        assert torch.equal(h.to("two"), before[mine(needs[1])])
        write("one", gives[1])
        write("two", gives[2])
        h = stream.read(norm, "last", rows=selected)
        after = norm(sum(whole(block, total) for block in BLOCKS))
        assert torch.equal(h.to("head"), after[[r for r in mine(needs[2]) if r in wanted]])

    SimWorld(mesh).run(rank_main)


THREE = Mesh.of(Parallelism(tp_size=3))
TWO_BY_THREE = Mesh.of(Parallelism(tp_size=6, attn_dp_size=2))


def first_plan(mesh: Mesh, gives: Sequence[str], needs: Sequence[str]) -> RegimePlan:
    return make_plan(chain(mesh, gives, needs), MACHINES["cuda"]).regimes[0]


def run_through(
    mesh: Mesh,
    gives: Sequence[str],
    needs: Sequence[str],
    deliver: Callable[[Normed], object],
    tokens: int = 6,
) -> list[tuple[str, Axes, int, torch.dtype]]:
    """What rank 0 calls in one pass that keeps the first row of each group."""
    groups = mesh.parallelism.attn_dp_size
    rows = TokenRows.of(mesh, (tokens,) * groups)
    owner = leaves_of(mesh.axes, groups, rows.real)
    log: list[tuple[str, Axes, int, torch.dtype]] = []

    def rank_main(comm: Communicator) -> None:
        rank = comm.seat.rank
        watched = Recording(comm, log if rank == 0 else [])
        stream = ResidualStream(first_plan(mesh, gives, needs), watched, rows, torch.int64)
        for block, placement in zip(BLOCKS, gives, strict=True):
            held = held_rows(mesh.axes, owner, rank, placement.count("S"))
            stream.write(block, share(block, mesh, rank, placement, held, len(owner)))
            if block == "embed":
                deliver(stream.read(norm, "first"))
        stream.read(norm, "last", rows=rows.select([[0]] * groups)).to("head")

    SimWorld(mesh).run(rank_main)
    return log


def test_writing_moves_nothing() -> None:
    world = SimWorld(THREE)
    plan = first_plan(THREE, "PPP", "RRR")

    def rank_main(comm: Communicator) -> None:
        stream = ResidualStream(plan, comm, TokenRows.of(THREE, (2,)), torch.int64)
        stream.write("embed", torch.ones(2, HIDDEN, dtype=torch.int64))

    world.run(rank_main)
    assert world.calls == 0


def test_contributions_in_one_placement_are_added_before_they_are_moved() -> None:
    def settle_calls(gives: Sequence[str]) -> int:
        log = run_through(THREE, gives, "RRR", lambda h: (h.to("one"), h.to("two")))
        return len(log) - 1  # without the embedding's

    assert settle_calls(["P", "P", "P"]) == 1
    assert settle_calls(["P", "P", "R"]) == 1
    assert settle_calls(["P", "R", "R"]) == 0
    assert settle_calls(["P", "P", "S"]) == 2


def test_each_distinct_delivery_is_moved_once() -> None:
    def deliveries(needs: Sequence[str], times: int) -> int:
        calls = run_through(
            TWO_BY_THREE,
            ["SR", "SR", "SR"],
            needs,
            lambda h: [(h.to("one"), h.to("two")) for _ in range(times)],
        )
        return sum(op == "all_gather" for op, *_ in calls)

    head = "SR"
    assert deliveries(["SR", "SR", head], 2) == 0
    assert deliveries(["RR", "SR", head], 1) == 1
    assert deliveries(["RR", "RR", head], 1) == 1
    assert deliveries(["RR", "RR", head], 3) == 1


def test_the_same_delivery_is_the_same_tensor() -> None:
    seen: list[bool] = []
    run_through(
        TWO_BY_THREE,
        ["SR", "SR", "SR"],
        ["RR", "RR", "SR"],
        lambda h: seen.append(h.to("one") is h.to("two")),
    )
    assert seen == [True] * 6


@pytest.mark.parametrize(
    ("mesh", "gives", "needs", "kept"),
    [(THREE, ["P", "P", "P"], ["R", "R", "R"], 1), (TWO_BY_THREE, ["PP"] * 3, ["RR"] * 3, 2)],
)
def test_rows_are_selected_before_anything_is_moved(
    mesh: Mesh, gives: list[str], needs: list[str], kept: int
) -> None:
    log = run_through(mesh, gives, needs, lambda h: (h.to("one"), h.to("two")))
    groups = mesh.parallelism.attn_dp_size
    last = next(i for i, (_, _, rows, _) in enumerate(log) if rows < 6)
    assert all(rows <= kept for _, _, rows, _ in log[last:])
    assert log[last:], "something is moved at the last read"
    assert all(rows in (6, 6 * groups) for _, _, rows, _ in log[:last])


@pytest.mark.parametrize("order", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_what_travels_is_in_the_stream_s_dtype_whatever_blocks_give(order: tuple[str, str]) -> None:
    rows = TokenRows.of(THREE, (2,))
    log: list[tuple[str, Axes, int, torch.dtype]] = []
    kept = []

    def rank_main(comm: Communicator) -> None:
        watched = Recording(comm, log)
        plan = first_plan(THREE, "PPP", "RRR")
        stream = ResidualStream(plan, watched, rows, torch.bfloat16)
        stream.write("embed", torch.ones(2, HIDDEN, dtype=torch.float32))
        stream.read(norm, "first")
        for block, dtype in zip(("one", "two"), order, strict=True):
            stream.write(block, torch.ones(2, HIDDEN, dtype=getattr(torch, dtype)))
        kept.append(stream.read(norm, "last", rows=rows.select([[0, 1]])).to("head").dtype)

    SimWorld(THREE).run(rank_main)
    assert log
    assert {dtype for *_, dtype in log} == {torch.bfloat16}
    assert set(kept) == {torch.bfloat16}


def test_collect_joins_features_and_trades_them_for_rows() -> None:
    """Features over axes (2, 3), in rank order: gathered over the minor axis, then exchanged."""
    mesh, features = TWO_BY_THREE, 12
    inner = (
        Move(Op.ALL_GATHER, (1,), Placement("CC"), Placement("CR")),
        Move(Op.EXCHANGE, (0,), Placement("CR"), Placement("SR")),
    )
    head = BlockSpec(
        name="head",
        kind="head",
        variants=(Variant(Placement("RR"), Placement("CC"), inner),),
    )
    embed = BlockSpec(name="embed", kind="e", variants=(Variant(None, Placement("SR")),))
    plan = make_plan(
        Chain(
            mesh=mesh,
            embedding=embed,
            reads=(ReadSpec(name="last", consumers=(head,), selects_rows=True),),
            hidden_size=HIDDEN,
        ),
        MACHINES["cpu"],
    ).regimes[0]
    for real in [(2, 3), (0, 4), (1, 0), (0, 0), (3, 3)]:
        rows = TokenRows.of(mesh, real)
        selected = rows.select([list(range(n)) for n in real])
        everything = torch.arange(sum(real) * features).view(sum(real), features)
        owner = leaves_of(mesh.axes, 2, real)

        def rank_main(
            comm: Communicator,
            rows: TokenRows = rows,
            selected: LogitsRows = selected,
            everything: Tensor = everything,
            owner: list[int] = owner,
        ) -> None:
            rank = comm.seat.rank
            stream = ResidualStream(plan, comm, rows, torch.int64)
            mine = held_rows(mesh.axes, owner, rank, 1)
            stream.write("embed", torch.zeros(len(mine), HIDDEN, dtype=torch.int64))
            stream.read(norm, "last", rows=selected)
            part = everything[:, rank * 2 : rank * 2 + 2]
            assert torch.equal(stream.collect("head", part), everything[mine])
            with pytest.raises(PlacementError, match="another: unknown to the plan"):
                stream.collect("another", part)

        SimWorld(mesh).run(rank_main)


def alone() -> ResidualStream:
    """A stream on one rank, with three rows."""
    mesh = MESHES[0]
    plan = make_plan(chain(mesh, ["", "", ""], ["", "", ""]), MACHINES["cpu"]).regimes[0]
    streams: list[ResidualStream] = []
    rows = TokenRows.of(mesh, (3,))
    SimWorld(mesh).run(lambda comm: streams.append(ResidualStream(plan, comm, rows, torch.float32)))
    return streams[0]


X = torch.ones(3, HIDDEN)
EVERY_ROW = TokenRows.of(MESHES[0], (3,)).select([(0, 1, 2)])


def test_a_block_that_the_plan_does_not_know_may_not_write() -> None:
    with pytest.raises(PlacementError, match="three: unknown to the plan"):
        alone().write("three", X)


def test_a_block_may_not_write_twice() -> None:
    stream = alone()
    stream.write("embed", X)
    with pytest.raises(PlacementError, match="embed: wrote twice"):
        stream.write("embed", X)


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_a_contribution_of_other_rows_is_refused(rows: int) -> None:
    message = f"embed: gives , 3 rows on rank 0, but wrote {rows}"
    with pytest.raises(PlacementError, match=message):
        alone().write("embed", torch.ones(rows, HIDDEN))


def test_reads_come_in_the_plan_s_order_and_end_with_it() -> None:
    stream = alone()
    stream.write("embed", X)
    with pytest.raises(PlacementError, match="last: the plan has first here"):
        stream.read(norm, "last")
    stream = alone()
    stream.write("embed", X)
    stream.read(norm, "first")
    stream.write("one", X)
    stream.write("two", X)
    stream.read(norm, "last", rows=EVERY_ROW)
    with pytest.raises(PlacementError, match="last: the plan has nothing here"):
        stream.read(norm, "last")


def test_a_read_without_all_contributions_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"first: written \[\], but the plan settles"):
        alone().read(norm, "first")
    stream = alone()
    stream.write("embed", X)
    stream.read(norm, "first")
    stream.write("two", X)
    with pytest.raises(PlacementError, match=r"written \['two'\], .* settles \['one', 'two'\]"):
        stream.read(norm, "last")


def test_a_contribution_of_another_read_is_refused() -> None:
    stream = alone()
    stream.write("embed", X)
    stream.write("one", X)
    with pytest.raises(PlacementError, match=r"written \['embed', 'one'\]"):
        stream.read(norm, "first")


def test_nothing_is_delivered_to_a_block_that_the_plan_does_not_feed() -> None:
    stream = alone()
    stream.write("embed", X)
    h = stream.read(norm, "first")
    with pytest.raises(PlacementError, match="head: the plan delivers nothing to it at first"):
        h.to("head")
