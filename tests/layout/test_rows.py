"""Row maps against ownership lists: which rank holds which row, one row at a time."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.errors import PlacementError
from isomoe.layout import Mesh, Parallelism, Seat, TokenRows
from isomoe.layout.rows import even_split
from support import group_of, held_rows, leaves_of, runs

MESHES = [
    Mesh.of(Parallelism(tp_size=tp, attn_dp_size=dp, ep_size=ep))
    for tp, dp, ep in [
        (1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (6, 2, 6), (6, 3, 3), (8, 2, 4), (12, 2, 6),
    ]
]  # fmt: skip
SIZES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=12, max_size=12)


def drawn(mesh: Mesh, sizes: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], TokenRows]:
    """Real rows of each group, the same with padding, and their map."""
    groups = mesh.parallelism.attn_dp_size
    real = [n for n, _ in sizes[:groups]]
    padded = [n + pad for n, pad in sizes[:groups]]
    return real, padded, TokenRows.of(mesh, real, padded)


@given(st.sampled_from(MESHES), SIZES)
def test_spans_are_the_rows_that_a_rank_holds(mesh: Mesh, sizes: list[tuple[int, int]]) -> None:
    _, padded, rows = drawn(mesh, sizes)
    owner = leaves_of(mesh.axes, len(padded), padded)
    assert rows.total == len(owner)
    ends = np.cumsum([0, *padded]).tolist()
    assert list(rows.groups) == list(itertools.pairwise(ends))
    for rank in range(mesh.size):
        for row_axes in range(len(mesh.axes) + 1):
            assert list(range(*rows.span(rank, row_axes))) == held_rows(
                mesh.axes, owner, rank, row_axes
            )


@given(st.sampled_from(MESHES), SIZES)
def test_counts_and_cuts_are_those_of_the_group(mesh: Mesh, sizes: list[tuple[int, int]]) -> None:
    _, padded, rows = drawn(mesh, sizes)
    owner = leaves_of(mesh.axes, len(padded), padded)
    for run in runs(len(mesh.axes)):
        for rank in range(mesh.size):
            seat = Seat(mesh, rank)
            together = held_rows(mesh.axes, owner, rank, run[0])
            mine = held_rows(mesh.axes, owner, rank, run[-1] + 1)
            assert together[rows.cut(seat, run)] == mine
            assert rows.counts(seat, run) == tuple(
                len(held_rows(mesh.axes, owner, member, run[-1] + 1))
                for member in group_of(mesh.axes, rank, run)
            )


@given(st.sampled_from(MESHES), SIZES)
def test_padding_is_what_stands_behind_a_group_s_tokens(
    mesh: Mesh, sizes: list[tuple[int, int]]
) -> None:
    real, padded, rows = drawn(mesh, sizes)
    owner = leaves_of(mesh.axes, len(padded), padded)
    is_padding = np.concatenate(
        [np.arange(held) >= n for n, held in zip(real, padded, strict=True)]
    )
    assert rows.has_padding == bool(is_padding.any())
    for rank in range(mesh.size):
        for row_axes in range(len(mesh.axes) + 1):
            held = held_rows(mesh.axes, owner, rank, row_axes)
            marked = np.zeros(len(held), dtype=bool)
            for part in rows.padding(rank, row_axes):
                assert not marked[part].any(), "counted twice"
                marked[part] = True
            assert marked.tolist() == is_padding[held].tolist()


@given(st.sampled_from(MESHES), SIZES, st.data())
def test_selected_rows_stay_with_the_ranks_that_hold_them(
    mesh: Mesh, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    real, padded, rows = drawn(mesh, sizes)
    owner = leaves_of(mesh.axes, len(padded), padded)
    chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else [] for n in real]
    starts = np.cumsum([0, *padded])
    wanted = [int(first) + row for first, some in zip(starts, chosen, strict=False) for row in some]
    selected = rows.select(chosen)
    assert selected.index == tuple(wanted)
    assert selected.total == len(wanted)
    for rank in range(mesh.size):
        for row_axes in range(len(mesh.axes) + 1):
            held = held_rows(mesh.axes, owner, rank, row_axes)
            local = selected.local(rows, rank, row_axes)
            assert [held[place] for place in local] == [row for row in held if row in wanted]
            start, stop = selected.span(rank, row_axes)
            assert [wanted[i] for i in range(start, stop)] == [held[place] for place in local]
    for run in runs(len(mesh.axes)):
        seat = Seat(mesh, mesh.size - 1)
        assert selected.counts(seat, run) == tuple(
            len(set(held_rows(mesh.axes, owner, member, run[-1] + 1)) & set(wanted))
            for member in group_of(mesh.axes, seat.rank, run)
        )


@given(st.integers(0, 40), st.integers(1, 9))
def test_an_even_split_differs_by_one_at_most_and_loses_nothing(rows: int, ways: int) -> None:
    parts = even_split(rows, ways)
    assert parts == [len(part) for part in np.array_split(np.arange(rows), ways)]


FOUR = Mesh.of(Parallelism(tp_size=4, attn_dp_size=2))


@pytest.mark.parametrize(
    ("real", "padded"),
    [((1, 2, 3), None), ((1,), None), ((1, 2), (1,)), ((1, 2), (1, 1)), ((3, -1), None)],
)
def test_counts_that_do_not_fit_the_groups_are_refused(
    real: tuple[int, ...], padded: tuple[int, ...] | None
) -> None:
    with pytest.raises(PlacementError):
        TokenRows.of(FOUR, real, padded)


@pytest.mark.parametrize(
    "chosen",
    [
        [[], [5]],  # beyond the last row
        [[3], []],  # another group's row
        [[], [-1]],  # another group's row
        [[1, 0], []],  # not ascending: the rows would come back in another order
        [[1, 1], []],  # twice
        [[0]],  # one list for two groups
    ],
)
def test_a_selection_of_rows_that_are_not_the_group_s_own_is_refused(
    chosen: list[list[int]],
) -> None:
    rows = TokenRows.of(FOUR, (3, 4))
    with pytest.raises((PlacementError, ValueError)):
        rows.select(chosen)
