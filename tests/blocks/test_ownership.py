"""Which copy of an expert serves a row: one of them, on one rank, and each in turn."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomoe.blocks import Ownership
from isomoe.blocks.expert_load import ExpertLoad
from isomoe.layout import ExpertMap

CPU = torch.device("cpu")


@st.composite
def maps(draw: st.DrawFn) -> tuple[ExpertMap, int]:
    """Copies of experts in any order, each expert at least once, and ranks that share them out."""
    experts = draw(st.integers(1, 8))
    ranks = draw(st.integers(1, 4))
    extra = draw(st.integers(0, 9)) * ranks + -experts % ranks
    more = draw(st.lists(st.integers(0, experts - 1), min_size=extra, max_size=extra))
    return ExpertMap(tuple(draw(st.permutations([*range(experts), *more]))), experts), ranks


def owners(location: ExpertMap, ranks: int) -> list[Ownership]:
    slots = len(location.physical_to_logical) // ranks
    return [Ownership(location, rank * slots, (rank + 1) * slots) for rank in range(ranks)]


@st.composite
def choices(draw: st.DrawFn, experts: int) -> list[list[int]]:
    """[T][K] distinct experts of rows, some of them padding (-1)."""
    top_k = draw(st.integers(1, min(3, experts)))
    row = st.permutations(range(experts)).map(lambda order: list(order[:top_k]))
    return draw(st.lists(st.one_of(row, st.just([-1] * top_k)), max_size=12))


def as_ids(rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).view(len(rows), -1 if rows else 1)


@settings(max_examples=300)
@given(st.data())
def test_each_choice_of_a_row_is_served_by_one_rank_that_holds_it(data: st.DataObject) -> None:
    location, ranks = data.draw(maps())
    rows = data.draw(choices(location.num_logical))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    first = data.draw(st.integers(0, 20))
    every = owners(location, ranks)
    found = []
    for own in every:
        ids = as_ids(rows, dtype)
        copies = own.copies_for(ids, first)
        assert copies.dtype == dtype
        assert ids.tolist() == as_ids(rows).tolist(), "the input was changed"
        found.append((copies.tolist(), own.slots(copies).tolist()))
    assert all(copies == found[0][0] for copies, _ in found), "ranks do not agree"
    slots = len(location.physical_to_logical) // ranks
    for row, chosen in enumerate(rows):
        for place, expert in enumerate(chosen):
            copy = found[0][0][row][place]
            serving = [rank for rank in range(ranks) if found[rank][1][row][place] >= 0]
            if expert < 0:
                assert (copy, serving) == (-1, [])
                continue
            assert location.physical_to_logical[copy] == expert
            assert serving == [copy // slots]
            (rank,) = serving
            slot = found[rank][1][row][place]
            assert rank * slots + slot == copy
            assert every[rank].held[slot] == expert
    others = [slot for _, here in found for row in here for slot in row if slot < 0]
    assert set(others) <= {-1}


@settings(max_examples=200)
@given(st.data())
def test_the_copies_of_an_expert_take_turns(data: st.DataObject) -> None:
    """Rows that follow one another and choose an expert are shared out evenly, to within one."""
    location, ranks = data.draw(maps())
    expert = data.draw(st.integers(0, location.num_logical - 1))
    first, count = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 30))
    served = owners(location, ranks)[0].copies_for(as_ids([[expert]] * count), first)
    turns = Counter(served.flatten().tolist())
    copies = [p for p, one in enumerate(location.physical_to_logical) if one == expert]
    assert set(turns) <= set(copies)
    each = [turns[copy] for copy in copies]
    assert max(each) - min(each) <= 1


@settings(max_examples=200)
@given(st.data())
def test_a_part_of_the_rows_is_served_as_all_of_them_are(data: st.DataObject) -> None:
    """A rank with some rows sends them where one that has all of them would serve them."""
    location, ranks = data.draw(maps())
    rows = data.draw(choices(location.num_logical))
    cut = data.draw(st.integers(0, len(rows)))
    own = owners(location, ranks)[0]
    whole = own.copies_for(as_ids(rows), 0).tolist()
    parts = own.copies_for(as_ids(rows[:cut]), 0).tolist()
    parts += own.copies_for(as_ids(rows[cut:]), cut).tolist()
    assert parts == whole


def test_every_copy_has_its_turn() -> None:
    own = Ownership(ExpertMap((0, 1, 2, 1, 0, 1), 3), 0, 3)
    served = own.copies_for(as_ids([[1, 0]] * 6), 3)
    assert served[:, 0].tolist() == [1, 3, 5, 1, 3, 5]
    assert sorted(served[:, 1].tolist()) == [0, 0, 0, 4, 4, 4]


def test_experts_in_order_are_their_own_copies() -> None:
    ids = torch.tensor([[3, 0], [-1, -1]])
    own = Ownership(ExpertMap.identity(4), 2, 4)
    assert own.copies_for(ids, 5) is ids
    assert own.slots(ids).tolist() == [[1, -1], [-1, -1]]
    assert own.held == (2, 3)


@settings(max_examples=200)
@given(st.data())
def test_the_load_of_all_ranks_is_what_was_chosen(data: st.DataObject) -> None:
    location, ranks = data.draw(maps())
    experts = location.num_logical
    every = owners(location, ranks)
    loads = [ExpertLoad(own.held, experts, True, CPU) for own in every]
    silent = [ExpertLoad(own.held, experts, False, CPU) for own in every]
    expected = np.zeros(experts, dtype=int)
    by_rank = np.zeros((ranks, experts), dtype=int)
    slots = len(location.physical_to_logical) // ranks
    for _ in range(data.draw(st.integers(0, 3))):
        rows = data.draw(choices(experts))
        for own, load, other in zip(every, loads, silent, strict=True):
            physical = own.copies_for(as_ids(rows), 0)
            load.add(own.slots(physical))
            other.add(own.slots(physical))
        for copy in physical.flatten().tolist():
            if copy >= 0:
                by_rank[copy // slots, location.physical_to_logical[copy]] += 1
        expected += np.bincount([e for row in rows for e in row if e >= 0], minlength=experts)
    assert [load.counts() for load in loads] == by_rank.tolist()
    assert np.sum([load.counts() for load in loads], axis=0).tolist() == expected.tolist()
    assert all(load.counts() == [0] * experts for load in silent)
    for load in loads:
        load.reset()
        assert load.counts() == [0] * experts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_copies_on_one_rank_count_as_one_expert_and_padding_as_none(dtype: torch.dtype) -> None:
    load = ExpertLoad((2, 0, 2), 4, True, CPU)
    load.add(torch.tensor([[0, 1], [2, -1], [-1, -1]], dtype=dtype))
    load.add(torch.tensor([[2, 0]], dtype=dtype))
    assert load.counts() == [1, 0, 4, 0]
    load.add(torch.empty(0, 2, dtype=dtype))
    assert load.counts() == [1, 0, 4, 0]
    load.reset()
    load.add(torch.tensor([[1, 1]], dtype=dtype))
    assert load.counts() == [2, 0, 0, 0]
