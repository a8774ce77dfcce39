"""Which logical expert each physical one is a copy of, and the files that say so."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.errors import ConfigError
from isomoe.layout import ExpertLocation, ExpertMap, balanced


@st.composite
def expert_maps(draw: st.DrawFn) -> tuple[ExpertMap, int]:
    """Any map, and a number of ranks that its physical experts split over."""
    ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    experts = draw(st.integers(1, ranks * slots))
    further = ranks * slots - experts
    chosen = draw(st.lists(st.integers(0, experts - 1), min_size=further, max_size=further))
    return ExpertMap(tuple(draw(st.permutations([*range(experts), *chosen]))), experts), ranks


@given(expert_maps())
def test_copies_are_the_places_of_each_logical_expert(drawn: tuple[ExpertMap, int]) -> None:
    found, _ = drawn
    assert len(found.copies) == found.num_logical
    for logical, physical in enumerate(found.copies):
        assert list(physical) == sorted(set(physical))
        assert all(found.physical_to_logical[p] == logical for p in physical)
    assert sum(map(len, found.copies)) == found.num_physical


@given(expert_maps())
def test_ranks_hold_equal_runs_of_the_physical_experts(drawn: tuple[ExpertMap, int]) -> None:
    found, ranks = drawn
    held = [found.held(rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in held}) == 1
    assert sum(held, ()) == found.physical_to_logical
    for outside in (-1, ranks):
        with pytest.raises(ConfigError, match=f"EP rank {outside} is not one of 0 to {ranks - 1}"):
            found.held(outside, ranks)


@given(st.integers(1, 40), st.integers(0, 40))
def test_the_trivial_placement_counts_round_the_experts(experts: int, redundant: int) -> None:
    trivial = ExpertMap.trivial(experts, redundant)
    round_and_round = (*range(experts),) * (redundant + 1)
    assert trivial.physical_to_logical == round_and_round[: experts + redundant]
    assert trivial.is_identity == (redundant == 0)
    assert (trivial == ExpertMap.identity(experts)) == (redundant == 0)


def test_a_permutation_is_not_the_identity() -> None:
    assert not ExpertMap((1, 0), 2).is_identity
    assert ExpertMap((0, 1), 2) == ExpertMap.identity(2)
    assert hash(ExpertMap((0, 1), 2)) == hash(ExpertMap.identity(2))


@pytest.mark.parametrize(
    ("experts", "numbers", "message"),
    [
        (3, (0, 1, 3), "physical expert 2 is a copy of 3: logical experts are from 0 to 2"),
        (3, (0, 1, 2, -1), "physical expert 3 is a copy of -1: logical experts are from 0 to 2"),
        (4, (0, 2, 2, 0), "of 4 logical experts, 2 are not among the 4 physical ones, "
                          "the first is 1; each of 0 to 3 needs a copy"),
        (2, (), "of 2 logical experts, 2 are not among the 0 physical ones"),
        (0, (), "0 logical experts: there must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_no_map_is_refused(experts: int, numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ExpertMap(numbers, experts)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks", "message"),
    [
        (128, 4, 8, "--ep-num-redundant-experts 4: 128 + 4 experts do not split evenly over "
                    "8 EP ranks; 0 or 8 would"),
        (60, 3, 8, "--ep-num-redundant-experts 3: 60 + 3 experts do not split evenly over "
                   "8 EP ranks; 4 would"),
        (4, 0, 0, "--ep-size 0: must be 1 or more"),
    ],
)  # fmt: skip
def test_copies_that_do_not_split_evenly_are_refused(
    experts: int, redundant: int, ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        ExpertMap.trivial(experts, redundant).held(0, ranks)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("experts", "redundant", "message"),
    [
        (4, -1, "--ep-num-redundant-experts -1: must be 0 or more"),
        (0, 2, "0 logical experts: there must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(experts: int, redundant: int, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ExpertMap.trivial(experts, redundant)
    assert str(refused.value) == message


def location(folder: Path, document: Any, redundant: int, ranks: int) -> ExpertLocation:
    file = folder / "location.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return ExpertLocation.load(file, redundant, ranks)


def test_a_file_s_maps_are_taken_as_they_stand(tmp_path: Path) -> None:
    rows = [[], [0, 0, 0, 0], [3, 1, 0, 2, 1, 0]]
    found = location(tmp_path, {"physical_to_logical_map": rows}, redundant=2, ranks=3)
    assert found.num_layers == 3
    assert found.for_layer(2, 4) == ExpertMap((3, 1, 0, 2, 1, 0), 4)


def test_a_file_s_counts_are_balanced(tmp_path: Path) -> None:
    rows = [[], [0, 0, 0, 0], [7, 100, 3, 9]]
    found = location(tmp_path, {"logical_count": rows, "rank": 0}, redundant=2, ranks=3)
    assert found.for_layer(2, 4) == balanced(rows[2], 2, 3)
    assert found.for_layer(1, 4) == ExpertMap.trivial(4, 2), "no token came: no load to balance"


def test_counts_over_time_are_summed(tmp_path: Path) -> None:
    times = [[[], [9, 1, 1, 5]], [[], [0, 1, 40, 5]], [[], [0, 6, 0, 0]]]
    found = location(tmp_path, {"logical_count": times}, redundant=2, ranks=2)
    assert found.num_layers == 2
    assert found.rows == ((), (9, 8, 41, 10))
    assert found.for_layer(1, 4) == balanced([9, 8, 41, 10], 2, 2)


MAPS = {"physical_to_logical_map": [[0, 0, 0, 0], [3, 1, 0, 2, 1, 0], [0, 1, 2, 4, 3, 0]]}
COUNTS = {"logical_count": [[], [1, 2, 3, 4]]}


@pytest.mark.parametrize(
    ("document", "redundant", "layer", "experts", "message"),
    [
        (MAPS, 2, 3, 4, "has 3 rows, none for layer 3; every decoder layer needs one, also"),
        (MAPS, 2, -1, 4, "has 3 rows, none for layer -1"),
        (COUNTS, 2, 2, 4, "has 2 rows, none for layer 2"),
        (MAPS, 0, 1, 4, "layer 1 has 6 physical experts; the model's 4 and "
                        "--ep-num-redundant-experts 0 need 4 (--ep-num-redundant-experts 2 would"),
        (MAPS, 0, 1, 8, "layer 1 has 6 physical experts; the model's 8 and "
                        "--ep-num-redundant-experts 0 need 8"),
        (MAPS, 0, 0, 4, "layer 0: of 4 logical experts, 3 are not among the 4 physical ones"),
        (MAPS, 2, 2, 4, "layer 2: physical expert 3 is a copy of 4: logical experts are from 0"),
        (COUNTS, 2, 0, 4, "layer 0 has 0 counts; the model has 4 experts there, and needs as many"),
        (COUNTS, 0, 1, 6, "layer 1 has 4 counts; the model has 6 experts there"),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, document: Any, redundant: int, layer: int, experts: int, message: str
) -> None:
    found = location(tmp_path, document, redundant, ranks=2)
    with pytest.raises(ConfigError) as refused:
        found.for_layer(layer, experts)
    line = str(refused.value)
    assert line.startswith(f"--init-expert-location {tmp_path / 'location.json'}: {message}")
    assert "\n" not in line


@pytest.mark.parametrize("document", [MAPS, COUNTS], ids=["maps", "counts"])
def test_a_layer_that_does_not_split_evenly_is_refused(tmp_path: Path, document: Any) -> None:
    found = location(tmp_path, document, redundant=2, ranks=4)
    with pytest.raises(ConfigError, match=r"4 \+ 2 experts do not split .* 4 EP ranks; 0 or 4 wo"):
        found.for_layer(1, 4)


NEITHER = ": must be an object with either physical_to_logical_map or logical_count"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", ": not readable as JSON ("),
        ("[" * 100_000, ": not readable as JSON ("),
        ("", ": not readable as JSON ("),
        ([[0, 1]], NEITHER),
        ({}, NEITHER),
        ("null", NEITHER),
        ({"physical_to_logical": [[0]]}, NEITHER),
        (MAPS | COUNTS, NEITHER),
        ({"logical_count": 3}, ": logical_count is 3, not a list with a row for each layer"),
        ({"logical_count": []}, ": logical_count is [], not a list"),
        ({"logical_count": {"0": [1]}}, ": logical_count is {'0': [1]}, not a list"),
        ({"logical_count": [[1], 2]}, ": logical_count: layer 1 is 2, not a list of numbers"),
        ({"logical_count": [[1, -2]]}, ": logical_count: layer 0 has -2 at 1; it must be a whole"),
        ({"logical_count": [[1], [2.0]]}, ": logical_count: layer 1 has 2.0 at 0; it must be"),
        ({"logical_count": [[True]]}, ": logical_count: layer 0 has True at 0"),
        ({"logical_count": [[None, 1]]}, ": logical_count: layer 0 has None at 0"),
        ('{"logical_count": [[NaN]]}', ": logical_count: layer 0 has nan at 0"),
        ({"logical_count": [["x" * 999]]}, ": logical_count: layer 0 has 'xxxxx"),
        ({"logical_count": [[[1], [2]], [[1]]]}, ": logical_count[1] and "),
        ({"logical_count": [[[1], [2]], [[1], [2, 3]]]}, ": logical_count[1] and "),
        ({"logical_count": [[[1]], [[-1]]]}, ": logical_count[1]: layer 0 has -1 at 0"),
        ({"logical_count": [[[1]], 3]}, ": logical_count[1] is 3, not a list with a row"),
        ({"logical_count": [[[1]], [1]]}, ": logical_count[1]: layer 0 is 1, not a list"),
        ({"logical_count": [[[[1]]]]}, ": logical_count[0]: layer 0 has [1] at 0"),
        ({"physical_to_logical_map": [[0, -1]]}, ": physical_to_logical_map: layer 0 has -1 at 1"),
        ({"physical_to_logical_map": [[0.0]]}, ": physical_to_logical_map: layer 0 has 0.0 at 0"),
        ({"physical_to_logical_map": [[[0]]]}, ": physical_to_logical_map: layer 0 has [0] at 0"),
    ],
    ids=range(27),
)
def test_a_file_of_neither_form_is_refused_in_one_line(
    tmp_path: Path, document: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        location(tmp_path, document, 0, 1)
    line = str(refused.value)
    where = f"--init-expert-location {tmp_path / 'location.json'}"
    assert line.startswith(where + message), line
    assert "\n" not in line
    assert len(line) < 2 * len(where) + 200


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--init-expert-location .*: not readable as JSON"):
        ExpertLocation.load(tmp_path / name, 0, 1)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ConfigError, match="not readable as JSON"):
        ExpertLocation.load(tmp_path / "latin.json", 0, 1)
