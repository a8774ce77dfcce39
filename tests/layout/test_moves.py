"""Placements and moves: what cannot be written down, and the cheapest chain of what can."""

from hashlib import sha256
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_oracles import LEGAL_TURNS, distances, legal_moves

from isomoe.errors import PlacementError
from isomoe.layout import Letter, Move, Op, Placement, cheapest, row_sharded
from isomoe.layout.moves import moves_from
from support import placements, runs

LETTERS = "".join(Letter)


def accepted(axes: int) -> dict[tuple[str, tuple[int, ...], str, str], Move]:
    """Every move that the product can be made to construct."""
    found = {}
    valid = placements(axes, LETTERS)
    for op, run, before, after in product(Op, runs(axes), valid, valid):
        try:
            move = Move(op, run, Placement(before), Placement(after))
        except PlacementError:
            continue
        found[str(op), run, before, after] = move
    return found


def made_up_cost(op: str, axes: tuple[int, ...], before: str, after: str) -> float:
    """Positive and arbitrary, the same in every run."""
    return 1 + sha256(f"{op} {axes} {before} {after}".encode()).digest()[0]


def cost_of(move: Move) -> float:
    return made_up_cost(str(move.op), move.axes, str(move.before), str(move.after))


@given(st.text("SRPC", max_size=6))
def test_row_sharded_axes_are_a_prefix(letters: str) -> None:
    is_prefix = letters == "S" * letters.count("S") + letters.replace("S", "")
    if is_prefix:
        placement = Placement(letters)
        assert placement.row_axes == letters.count("S")
        assert len(placement) == len(letters)
        for letter in Letter:
            found = tuple(i for i, held in enumerate(letters) if held == letter.value)
            assert placement.where(letter) == found
    else:
        with pytest.raises(PlacementError, match="row-sharded axes come first") as refused:
            Placement(letters)
        assert f"axis {max(i for i, held in enumerate(letters) if held == 'S')} is S" in str(
            refused.value
        )


def test_an_unknown_letter_is_refused() -> None:
    with pytest.raises(PlacementError, match="letters are S, R, P and C"):
        Placement("SX")


def test_the_closed_sets_are_those_of_the_design() -> None:
    assert set(map(str, Letter)) == {"S", "R", "P", "C"}
    assert set(map(str, Op)) == set(LEGAL_TURNS)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_exactly_the_moves_of_the_design_can_be_written_down(axes: int) -> None:
    assert set(accepted(axes)) == set(legal_moves(axes, LETTERS))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_no_move_sums_an_axis_that_is_not_partial_and_none_makes_one(axes: int) -> None:
    for (op, run, before, after), move in accepted(axes).items():
        if op in ("all_reduce", "reduce_scatter"):
            assert {before[a] for a in run} == {"P"}, str(move)
        made = {a for a in range(axes) if after[a] == "P" and before[a] != "P"}
        assert not made, str(move)


@given(st.data())
def test_no_chain_of_moves_leads_from_rows_or_copies_to_a_partial_sum(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 4))
    start = data.draw(st.sampled_from(placements(axes)))
    settled = [letter in "SR" for letter in start]
    here = Placement(start)
    for _ in range(data.draw(st.integers(1, 8))):
        move = data.draw(st.sampled_from(moves_from(here)))
        assert move.before == here
        here = move.after
        assert here == "S" * here.row_axes + here[here.row_axes :].replace("S", "?")
        for axis, was_settled in enumerate(settled):
            assert not (was_settled and here[axis] in "PC"), str(move)
        settled = [was or letter in "SR" for was, letter in zip(settled, here, strict=True)]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_planner_sees_every_move_between_blocks(axes: int) -> None:
    expected = {m for m in legal_moves(axes) if m[0] not in ("exchange", "dispatch", "combine")}
    seen = {
        (str(m.op), m.axes, str(m.before), str(m.after))
        for p in placements(axes)
        for m in moves_from(Placement(p))
    }
    assert seen == expected


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_cheapest_finds_what_exhaustive_search_finds(axes: int) -> None:
    compared = 0
    for goal in placements(axes):
        best = distances(axes, goal, made_up_cost)
        for start in placements(axes):
            if best[start] == float("inf"):
                with pytest.raises(PlacementError, match=r"no move turns axis \d from [SR] into P"):
                    cheapest(Placement(start), Placement(goal), cost_of)
                continue
            total, chain = cheapest(Placement(start), Placement(goal), cost_of)
            assert total == best[start] == sum(map(cost_of, chain))
            ends = [Placement(start), *(move.after for move in chain)]
            assert [move.before for move in chain] == ends[:-1]
            assert ends[-1] == Placement(goal)
            compared += 1
    assert compared > len(placements(axes))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_beaten_chain_is_the_best_that_begins_otherwise(axes: int) -> None:
    compared = 0
    for start, goal in product(placements(axes), placements(axes)):
        if start == goal or distances(axes, goal, made_up_cost)[start] == float("inf"):
            continue
        _, (first, *_) = cheapest(Placement(start), Placement(goal), cost_of)
        away = distances(axes, goal, made_up_cost, without=start)
        others = [
            made_up_cost(*move) + away[move[3]]
            for move in legal_moves(axes)
            if move[2] == start
            and move != (str(first.op), first.axes, str(first.before), str(first.after))
        ]
        expected = min(others, default=float("inf"))
        if expected == float("inf"):
            with pytest.raises(PlacementError):
                cheapest(Placement(start), Placement(goal), cost_of, avoid=first)
        else:
            found, chain = cheapest(Placement(start), Placement(goal), cost_of, avoid=first)
            assert found == expected
            assert chain[0] != first
        compared += 1
    assert compared


def test_a_second_reduction_is_refused_with_the_axis_and_the_letters() -> None:
    with pytest.raises(
        PlacementError, match=r"all_reduce over axes \(0,\) turns P to R"
    ) as refused:
        Move(Op.ALL_REDUCE, (0,), Placement("RP"), Placement("RP"))
    assert str(refused.value).startswith("all_reduce over axes (0,) turns P to R")
    assert "cannot turn RP into RP" in str(refused.value)
    with pytest.raises(PlacementError, match="axis 1 of PR is R, not P"):
        Move(Op.ALL_REDUCE, (0, 1), Placement("PR"), Placement("RR"))


@pytest.mark.parametrize("run", [(), (0, 2), (1, 0), (2,), (1, 2)])
def test_a_move_takes_a_run_of_axes_that_exist(run: tuple[int, ...]) -> None:
    with pytest.raises(PlacementError, match="a move takes a run of mesh axes"):
        Move(Op.ALL_REDUCE, run, Placement("PP"), Placement("RR"))


def test_a_move_prints_as_the_issue_says() -> None:
    move = Move(Op.REDUCE_SCATTER, (0, 1), Placement("PPR"), Placement("SSR"))
    assert move.to_json() == {
        "op": "reduce_scatter", "axes": [0, 1], "from": "PPR", "to": "SSR",
    }  # fmt: skip
    assert str(move) == "reduce_scatter(0,1) PPR>SSR"


def test_helpers_name_the_usual_placements() -> None:
    assert (str(row_sharded(0, 3)), str(row_sharded(2, 3)), str(row_sharded(0, 0))) == (
        "RRR",
        "SSR",
        "",
    )
