"""The flags of the ways between attention and experts: how they are read, printed and refused."""

from collections.abc import Iterator
from itertools import product

import pytest

from isomoe.blocks import SparseMoe
from isomoe.errors import ConfigError
from isomoe.kernels import Routing
from isomoe.layout import A2ABackend, Mesh, Parallelism, Seat, WireFormat


def every_way() -> Iterator[Parallelism]:
    for (tp, dp, ep), backend, form, redundant in product(
        [(1, 1, 1), (2, 2, 1), (2, 2, 2), (4, 2, 4), (6, 3, 2)], A2ABackend, WireFormat, (0, 2, 12)
    ):
        refused = (backend, form) == (A2ABackend.DEEPEP, WireFormat.NVFP4)
        if not refused and (ep > 1 or (backend is A2ABackend.NONE and not redundant)):
            yield Parallelism(
                tp_size=tp,
                attn_dp_size=dp,
                ep_size=ep,
                moe_a2a_backend=backend,
                moe_wire_format=form,
                ep_num_redundant_experts=redundant,
            )


def test_the_shorthand_is_read_as_it_is_printed_and_tells_all_ways_apart() -> None:
    every = list(every_way())
    for one in every:
        assert Parallelism.parse(str(one)) == one
    assert len({str(one) for one in every}) == len({one.flags for one in every}) == len(every) > 40


def test_deepep_takes_no_nvfp4() -> None:
    with pytest.raises(ConfigError, match="none or fp8 would work"):
        Parallelism.parse("tp2,ep2,deepep,nvfp4")


def test_what_the_shorthand_and_the_flags_look_like() -> None:
    one = Parallelism.parse("ep4, tp4,red4 ,fp8,a2a,dp2")
    assert (one.moe_a2a_backend, one.moe_wire_format) == (A2ABackend.TORCH, WireFormat.FP8)
    assert one.ep_num_redundant_experts == 4
    assert str(one) == "tp4,dp2,ep4,a2a,fp8,red4"
    assert one.flags == (
        "--tp-size 4 --attn-dp-size 2 --ep-size 4 --moe-a2a-backend torch --moe-wire-format fp8 "
        "--ep-num-redundant-experts 4"
    )
    plain = Parallelism.parse("tp4,dp2,ep4")
    assert (plain.exchanges, plain.routes_locally) == (False, False)
    assert (one.exchanges, one.routes_locally) == (True, True)
    packed = Parallelism.parse("tp1,nvfp4")
    assert (packed.exchanges, packed.routes_locally) == (False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp4,ep4,red", "'red' is not one of tpN, dpN, epN, denseN, redN"),
        ("tp4,ep4,red-1", "'red-1' is not one of"),
        ("tp4,ep4,a2a2", "'a2a2' is not one of"),
        ("tp4,fp4", "'fp4' is not one of .*a2a, .*fp8, nvfp4"),
        ("tp4,FP8", "'FP8' is not one of"),
        ("tp4,ep4,a2a,a2a", "'a2a' says something a second time"),
        ("tp4,ep4,a2a,deepep", "'deepep' says something a second time"),
        ("tp4,fp8,nvfp4", "'nvfp4' says something a second time"),
        ("tp4,ep4,red2,red4", "'red4' says something a second time"),
    ],
)
def test_a_wrong_shorthand_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        Parallelism.parse(text)
    assert "\n" not in str(told.value)


ONE_GROUP = "needs experts on several groups of ranks; --ep-size"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp4,a2a", f"--moe-a2a-backend torch: {ONE_GROUP} 2, 4 would give them"),
        ("tp6,dp3,deepep", f"--moe-a2a-backend deepep: {ONE_GROUP} 2, 3, 6 would give them"),
        ("tp1,a2a", f"--moe-a2a-backend torch: {ONE_GROUP} above 1 would give them"),
        ("tp4,red4", f"--ep-num-redundant-experts 4: {ONE_GROUP} 2, 4 would give them"),
        ("tp1,red1", f"--ep-num-redundant-experts 1: {ONE_GROUP} above 1 would give them"),
    ],
)
def test_one_group_of_experts_has_nobody_to_exchange_with_or_to_balance(
    text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as told:
        Parallelism.parse(text)
    assert str(told.value) == message


@pytest.mark.parametrize("ep", [1, 2])
def test_fewer_than_no_redundant_experts_are_refused(ep: int) -> None:
    with pytest.raises(ConfigError) as told:
        Parallelism(tp_size=2, ep_size=ep, ep_num_redundant_experts=-1)
    assert str(told.value) == "--ep-num-redundant-experts -1: must be at least 0"


def moe(layout: str, hidden: int = 48) -> None:
    SparseMoe(
        Seat(Mesh.of(Parallelism.parse(layout)), 0),
        "moe",
        hidden_size=hidden,
        intermediate_size=12,
        num_experts=12,
        routing=Routing(top_k=2),
    )


def test_copies_that_do_not_split_over_the_ranks_are_refused() -> None:
    for good in ("tp2,ep2,red2", "tp4,ep4,red8", "tp4,ep2,red2", "tp3,ep3,red3,a2a"):
        moe(good)
    for bad, good in (("tp2,ep2,red1", "0 or 2"), ("tp4,ep4,a2a,red2", "0 or 4")):
        with pytest.raises(ConfigError, match=f"; {good} would"):
            moe(bad)


def test_rows_that_a_format_cannot_hold_are_refused() -> None:
    for hidden in (40, 8, 130):
        moe("tp2,ep2", hidden)
        moe("tp2,ep2,fp8", hidden)
        for layout in ("tp1,nvfp4", "tp2,dp2,ep2,nvfp4", "tp2,ep2,a2a,nvfp4"):
            with pytest.raises(ConfigError) as told:
                moe(layout, hidden)
            assert str(told.value) == (
                f"--moe-wire-format nvfp4: rows of {hidden} values do not split into runs of 16; "
                "fp8 would work"
            )
    moe("tp1,nvfp4", 16)
