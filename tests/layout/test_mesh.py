"""The mesh: every group of every factoring is a run of its axes."""

import re
from collections.abc import Iterator
from itertools import pairwise, product
from math import prod

import pytest

from isomoe.errors import ConfigError
from isomoe.layout import Mesh, Parallelism, Seat

MOST_RANKS = 24
KINDS = ("attn", "moe", "ffn", "lm")


def divides(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n // d * d == n]


def every_degree(ranks: int) -> Iterator[Parallelism]:
    for dp, ep, dense in product(divides(ranks), divides(ranks), [None, *divides(ranks)]):
        for dp_lm_head in (False, True) if dense is None else (False,):
            yield Parallelism(
                tp_size=ranks,
                attn_dp_size=dp,
                ep_size=ep,
                moe_dense_tp_size=dense,
                enable_dp_lm_head=dp_lm_head,
            )


def widths(p: Parallelism) -> dict[str, int]:
    """How many neighbouring ranks share one block of each kind, from the flags alone."""
    attn = p.tp_size // p.attn_dp_size
    return {
        "attn": attn,
        "moe": p.tp_size // p.ep_size,
        "ffn": p.moe_dense_tp_size or p.tp_size,
        "lm": attn if p.enable_dp_lm_head else p.tp_size,
    }


def nest(ranks: int, one: int, other: int) -> bool:
    """Whether blocks of the smaller number of consecutive ranks lie within blocks of the larger."""
    small, large = sorted((one, other))
    return len({(r // small, r // large) for r in range(ranks)}) == len(
        {r // small for r in range(ranks)}
    )


def has_mesh(p: Parallelism) -> bool:
    sizes = widths(p).values()
    return all(nest(p.tp_size, a, b) for a, b in product(sizes, sizes))


@pytest.mark.parametrize("ranks", range(1, MOST_RANKS + 1))
def test_every_group_is_a_run_of_axes_and_has_the_right_ranks(ranks: int) -> None:
    tried = 0
    for p in filter(has_mesh, every_degree(ranks)):
        mesh = Mesh.of(p)
        tried += 1
        assert prod(mesh.axes) == ranks
        assert all(size > 1 for size in mesh.axes)
        for kind, width in widths(p).items():
            shared = getattr(mesh, "moe_tp" if kind == "moe" else f"{kind}_tp")
            apart = getattr(mesh, "moe_ep" if kind == "moe" else f"{kind}_dp")
            assert apart + shared == mesh.all == tuple(range(len(mesh.axes)))
            for rank in range(ranks):
                together = tuple(r for r in range(ranks) if r // width == rank // width)
                same_place = tuple(r for r in range(ranks) if r % width == rank % width)
                assert mesh.group(rank, shared) == together
                assert mesh.group(rank, apart) == same_place
                assert mesh.index(rank, shared) == together.index(rank)
                assert Seat(mesh, rank).index(apart) == same_place.index(rank)
        assert len(mesh.axes) == len({1, ranks, *widths(p).values()}) - 1, "finer than needed"
    assert tried >= 1


@pytest.mark.parametrize("ranks", range(1, MOST_RANKS + 1))
def test_what_has_no_mesh_is_refused_with_the_sizes_that_have_one(ranks: int) -> None:
    for p in every_degree(ranks):
        if has_mesh(p):
            continue
        with pytest.raises(ConfigError) as refused:
            Mesh.of(p)
        message = str(refused.value)
        assert message.startswith(f"{p.flags}: ")
        sharing = re.search(r"=(\d+) and .*=(\d+) share no mesh", message)
        assert sharing, message
        assert not nest(ranks, int(sharing[1]), int(sharing[2]))
        works = [
            ep
            for ep in divides(ranks)
            if has_mesh(
                Parallelism(
                    tp_size=ranks,
                    attn_dp_size=p.attn_dp_size,
                    ep_size=ep,
                    moe_dense_tp_size=p.moe_dense_tp_size,
                    enable_dp_lm_head=p.enable_dp_lm_head,
                )
            )
        ]
        offered = re.search(r"--ep-size ([\d, ]+) would", message)
        assert (list(map(int, offered[1].split(", "))) if offered else []) == works, message


def test_strides_of_two_and_three_share_no_mesh() -> None:
    with pytest.raises(ConfigError) as refused:
        Mesh.of(Parallelism(tp_size=6, attn_dp_size=3, ep_size=2))
    assert str(refused.value) == (
        "--tp-size 6 --attn-dp-size 3 --ep-size 2: attn_tp=2 and moe_tp=3 share no mesh, "
        "since 2 does not divide 3; --ep-size 1, 3, 6 would"
    )


def test_the_issue_s_layout_has_axes_four_and_two() -> None:
    mesh = Mesh.of(Parallelism(tp_size=8, attn_dp_size=4, ep_size=8))
    assert mesh.axes == (4, 2)
    assert (mesh.attn_dp, mesh.attn_tp, mesh.moe_ep, mesh.moe_tp) == ((0,), (1,), (0, 1), ())


def test_one_rank_has_no_axes() -> None:
    mesh = Mesh.of(Parallelism())
    assert mesh.axes == ()
    assert mesh.all == mesh.attn_tp == mesh.moe_ep == ()
    assert mesh.group(0, ()) == (0,)


@pytest.mark.parametrize(
    ("tp", "heads", "axes"), [(8, 2, (2, 4)), (6, 3, (3, 2)), (6, 2, (2, 3)), (4, 4, (4,))]
)
def test_copies_of_a_kv_head_are_neighbours_on_axes_of_their_own(
    tp: int, heads: int, axes: tuple[int, ...]
) -> None:
    mesh = Mesh.of(Parallelism(tp_size=tp), kv_heads=[heads])
    assert mesh.axes == axes
    assert mesh.attn_tp == mesh.all


def test_copies_of_kv_heads_that_cross_an_expert_s_ranks_are_refused() -> None:
    p = Parallelism(tp_size=6, ep_size=2)  # copies: 2 neighbours; an expert: 3 neighbours
    with pytest.raises(ConfigError, match=r"attn_rep \(copies of 3 KV heads\)=2 and moe_tp=3"):
        Mesh.of(p, kv_heads=[3])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"attn_dp_size": 3}, "--attn-dp-size 3 does not divide --tp-size 8; 1, 2, 4, 8 would"),
        ({"ep_size": 6}, "--ep-size 6 does not divide --tp-size 8; 1, 2, 4, 8 would"),
        ({"moe_dense_tp_size": 5}, "--moe-dense-tp-size 5 does not divide --tp-size 8"),
        ({"ep_size": 0}, "--ep-size 0 does not divide"),
        ({"tp_size": 0}, "--tp-size 0: must be from 1 to 1024"),
        ({"tp_size": 1025}, "--tp-size 1025: must be from 1 to 1024"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Parallelism(**({"tp_size": 8} | sizes))
    assert str(refused.value).startswith(message)


def test_axes_that_do_not_factor_the_ranks_are_refused() -> None:
    for axes in ((2, 2), (8, 1), (2, 5)):
        with pytest.raises(ConfigError, match="do not factor"):
            Mesh(axes=axes, parallelism=Parallelism(tp_size=8))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 8, 12])
def test_the_shorthand_is_read_as_it_is_printed(ranks: int) -> None:
    for p in every_degree(ranks):
        assert Parallelism.parse(str(p)) == p


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp8,pp2", "'pp2' is not one of tpN"),
        ("dp2", "tpN, the number of ranks, is missing"),
        ("tp8,tp4", "says something a second time"),
        ("tp8,dplm,dplm", "says something a second time"),
        ("tp", "is not one of"),
        ("", "is not one of"),
    ],
)
def test_a_wrong_shorthand_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Parallelism.parse(text)


@pytest.mark.parametrize("ranks", [2, 3, 6, 12])
def test_shards_partition_what_they_split(ranks: int) -> None:
    for p in filter(has_mesh, every_degree(ranks)):
        mesh = Mesh.of(p)
        for axes in (mesh.attn_tp, mesh.moe_ep, mesh.ffn_tp, mesh.lm_tp):
            ways = mesh.size_of(axes)
            spans = sorted({Seat(mesh, r).shard(5 * ways, axes, "x") for r in range(ranks)})
            assert spans[0][0] == 0
            assert spans[-1][1] == 5 * ways
            assert all(stop == start for (_, stop), (start, _) in pairwise(spans))
            if ways > 1:
                with pytest.raises(ConfigError, match=f"{ways} does not divide {ways + 1} heads"):
                    Seat(mesh, 0).shard(ways + 1, axes, "heads")


def test_a_mesh_prints_its_groups() -> None:
    mesh = Mesh.of(Parallelism(tp_size=12, attn_dp_size=3, ep_size=6, enable_dp_lm_head=True))
    shown = mesh.to_json()
    assert shown.pop("axes") == [3, 2, 2]
    assert shown == {
        "attn_dp": [0], "attn_tp": [1, 2], "moe_ep": [0, 1], "moe_tp": [2],
        "ffn_dp": [], "ffn_tp": [0, 1, 2], "lm_dp": [0], "lm_tp": [1, 2],
    }  # fmt: skip
    assert all(name.rpartition("_")[0] in KINDS for name in shown)
