"""Pinned plans: what was printed is followed, and what is no plan of the model is refused."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from math import isclose
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_oracles import LEGAL_TURNS
from test_layout_plan import LAYOUTS, model

from isomoe.errors import ConfigError, IsomoeError, PlacementError
from isomoe.layout import (
    MACHINES,
    Chain,
    FusedSums,
    Machine,
    Mesh,
    Parallelism,
    Plan,
    Rate,
    RegimePlan,
    make_plan,
    pinned,
    read_pinned,
    regimes,
)
from isomoe.layout.plan import Delivery, Settle
from isomoe.models import build, family_of, known_configs
from isomoe.models.registry import fits, representative

CONFIGS = known_configs()
CUDA = MACHINES["cuda"]
_RATE = Rate(alpha_us=2.0, bytes_per_us=2e5)
FUSING = replace(
    CUDA,
    fused=FusedSums(whole=_RATE, scattered=_RATE, host_us=0.0, max_bytes=2**20),
    second_stream_rows=512,
)
"""With sums that are fused in small steps, and declined in large ones; with a second stream."""

WORDS = ["tp1", "tp2", "tp4,dp2,ep4", "tp4,dp2,ep4,fp8", "tp4,dp2,ep4,a2a,fp8", "tp8,dp4,ep2,dplm"]


@lru_cache(maxsize=32)
def chain_of(name: str, layout: str) -> Chain:
    """Of a shipped model, one layer of each sort in each surrounding."""
    config = CONFIGS[name]
    return build(
        config, Parallelism.parse(layout), layers=representative(family_of(config), config)
    ).chain


def printed(plan: Plan) -> Any:
    return json.loads(json.dumps(plan.to_json()))


def does(bound: RegimePlan) -> object:
    """All that the stream executes."""
    return (
        bound.regime,
        bound.signature,
        bound.gives,
        bound.kinds,
        bound.inner,
        bound.residual,
        [
            (
                read.name,
                read.residual,
                read.selects_rows,
                read.carry and (read.carry.gives, read.carry.residual, read.carry.route.moves),
                [(s.before, s.producers, s.gives, s.residual) for s in read.settles],
                [(s.route.moves, s.route.fused) for s in read.settles],
                [
                    (d.consumer, d.residual, d.needs, d.gives, d.route.moves)
                    for d in read.deliveries
                ],
            )
            for read in bound.reads
        ],
    )


def fitting() -> Iterator[tuple[str, str]]:
    for name, config in CONFIGS.items():
        for words in WORDS:
            if fits(family_of(config), config, Parallelism.parse(words)):
                yield name, words


@pytest.mark.parametrize(("name", "words"), list(fitting()))
def test_a_printed_plan_comes_back_as_it_was(name: str, words: str) -> None:
    assert_comes_back(chain_of(name, words), FUSING)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_plans_of_hand_made_chains_come_back_too(layout: Parallelism, machine: Machine) -> None:
    assert_comes_back(model(Mesh.of(layout), layers=2), machine)


def assert_comes_back(chain: Chain, machine: Machine) -> None:
    plan = make_plan(chain, machine)
    found = pinned(printed(plan), chain, machine)
    assert (found.mesh, found.machine) == (plan.mesh, machine)
    assert list(map(does, found.regimes)) == list(map(does, plan.regimes))
    for one, other in zip(found.regimes, plan.regimes, strict=True):
        # 1e-9: the same costs, added in another order.
        assert one.predicted_us == pytest.approx(other.predicted_us, rel=1e-9)
        for a, b in zip(parts(one), parts(other), strict=True):
            assert isclose(a.route.predicted_us, b.route.predicted_us, rel_tol=1e-9)
            assert a.route.sent_bytes_per_row == b.route.sent_bytes_per_row
    assert pinned(printed(found), chain, machine) == found


def parts(bound: RegimePlan) -> Iterator[Settle | Delivery]:
    for read in bound.reads:
        yield from (*((read.carry,) if read.carry else ()), *read.settles, *read.deliveries)


def test_some_of_those_plans_carry_fuse_move_inside_and_run_two_streams() -> None:
    plan = make_plan(chain_of("deepseek-v3", "tp4,dp2,ep4,a2a,fp8"), FUSING)
    assert any(bound.fuses for bound in plan.regimes)
    assert not all(bound.fuses for bound in plan.regimes)
    every = [read.carry for bound in plan.regimes for read in bound.reads if read.carry]
    assert any(carry.route.moves for carry in every)
    assert any(d.beside for bound in plan.regimes for read in bound.reads for d in read.deliveries)
    assert any(move.bundle for bound in plan.regimes for _, inner in bound.inner for move in inner)


def test_a_plan_made_for_another_machine_is_followed_and_costs_are_those_of_this_one() -> None:
    chain = chain_of("qwen3-30b-a3b", "tp4,dp2,ep4")
    plan = make_plan(chain, FUSING)
    found = pinned(printed(plan), chain, MACHINES["cpu"])
    assert list(map(does, found.regimes)) == list(map(does, plan.regimes))
    least = make_plan(chain, MACHINES["cpu"])
    for one, other in zip(found.regimes, least.regimes, strict=True):
        assert one.predicted_us >= other.predicted_us * (1 - 1e-9)


# A hand-made chain: 2 x 2 ranks, two layers, and a plan in which something fuses and is carried.
CHAIN = model(Mesh.of(Parallelism.parse("tp4,dp2,ep4,dense2")), layers=2)
PLAN = make_plan(CHAIN, FUSING, regimes(CHAIN.mesh, (8, 512)))
DOCUMENT = printed(PLAN)
A2A = chain_of("deepseek-v3", "tp4,dp2,ep4,a2a,fp8")
A2A_DOCUMENT = printed(make_plan(A2A, FUSING, regimes(A2A.mesh, (8,))))
"""The same, with rows that are dispatched, and two blocks whose addends are one sum."""


def settle(document: Any, before: str, producer: str, regime: int = 0) -> Any:
    return next(
        one
        for one in document["regimes"][regime]["settles"]
        if one["before"] == before and producer in one["producers"]
    )


def delivery(document: Any, consumer: str, regime: int = 0) -> Any:
    ways = document["regimes"][regime]["deliveries"]
    return next(one for one in ways if one["consumer"] == consumer)


def drop_first_move(document: Any) -> None:
    settle(document, "0.norm1", "embed")["moves"].pop(0)


def swap_blocks(document: Any) -> None:
    settle(document, "0.norm2", "0.attn")["producers"] = ["0.experts"]
    settle(document, "1.norm1", "0.experts")["producers"] = ["0.attn"]


def swap_gives(document: Any) -> None:
    one, other = (settle(document, "1.norm1", name) for name in ("0.experts", "0.dense"))
    one["producers"], other["producers"] = other["producers"], one["producers"]


def settle_twice(document: Any) -> None:
    settles = document["regimes"][0]["settles"]
    settles.append(deepcopy(settle(document, "0.norm2", "0.attn")))


def settle_nothing(document: Any) -> None:
    one = deepcopy(settle(document, "0.norm2", "0.attn"))
    one.update(producers=[], gives="SR", moves=[])
    one["moves"] = lead("SR", one["residual"])
    document["regimes"][0]["settles"].insert(0, one)


def lead(start: str, end: str) -> list[Any]:
    """Moves between two row-sharded placements of two axes."""
    if start == end:
        return []
    if start == "SR" and end == "SS":
        return [{"op": "slice", "axes": [1], "from": start, "to": end}]
    assert (start, end) == ("SS", "SR")
    return [{"op": "all_gather", "axes": [1], "from": start, "to": end}]


def drop_settle(document: Any) -> None:
    settles = document["regimes"][0]["settles"]
    settles.remove(settle(document, "0.norm2", "0.attn"))


def drop_every_settle(document: Any) -> None:
    shown = document["regimes"][0]
    shown["settles"] = [one for one in shown["settles"] if one["before"] != "0.norm2"]


def settle_head(document: Any) -> None:
    settle(document, "norm", "1.experts")["producers"].append("lm_head")


def drop_delivery(document: Any) -> None:
    document["regimes"][0]["deliveries"].remove(delivery(document, "0.experts"))


def deliver_twice(document: Any) -> None:
    document["regimes"][0]["deliveries"].append(delivery(document, "0.experts"))


def need_otherwise(document: Any) -> None:
    way = delivery(document, "0.attn")
    way.update(needs="SS", moves=lead(way["residual"], "SS"))


def deliver_from_elsewhere(document: Any) -> None:
    way = delivery(document, "0.experts")
    way["residual"] = "SR" if way["residual"] == "SS" else "SS"


def residual_of_addends(document: Any) -> None:
    settle(document, "0.norm1", "embed").update(residual="SP", moves=[])


def residual_over_groups(document: Any) -> None:
    one = settle(document, "0.norm1", "embed")
    one["residual"] = "RR"
    one["moves"].append({"op": "all_gather", "axes": [0], "from": "SR", "to": "RR"})


def residual_changes_unmoved(document: Any) -> None:
    """The experts' residual lies otherwise, and the residual so far is not taken there."""
    settles = document["regimes"][0]["settles"]
    carries = [one for one in settles if one["producers"] == ["residual"]]
    document["regimes"][0]["settles"] = [one for one in settles if one not in carries]
    assert carries


def carry(document: Any) -> Any:
    for one in document["regimes"][0]["settles"]:
        if one["producers"] == ["residual"]:
            return one
    raise AssertionError("no residual moves")


def carry_from_elsewhere(document: Any) -> None:
    one = carry(document)
    one.update(gives=one["residual"], moves=[])


def carry_twice(document: Any) -> None:
    document["regimes"][0]["settles"].append(carry(document))


def carry_fused(document: Any) -> None:
    carry(document)["fused"] = True


def carry_before_the_first(document: Any) -> None:
    one = deepcopy(settle(document, "0.norm1", "embed"))
    one.update(producers=["residual"], gives=one["residual"], moves=[])
    document["regimes"][0]["settles"].insert(0, one)


def fuse_first(document: Any) -> None:
    settle(document, "0.norm1", "embed")["fused"] = True


def fuse_no_sum(document: Any) -> None:
    one = settle(document, "0.norm2", "0.attn")
    residual = one["residual"]
    other = {"SR": "SS", "SS": "SR"}[residual]
    op = {"SR": "all_reduce", "SS": "reduce_scatter"}[other]
    one["moves"] = [{"op": op, "axes": [1], "from": "SP", "to": other}, *lead(other, residual)]
    one["fused"] = True


def fuse_before_another(document: Any) -> None:
    settles = document["regimes"][0]["settles"]
    one = settle(document, "1.norm1", "0.experts")
    one["fused"] = True
    settles.remove(one)
    settles.insert(0, one)


def move_inside_a_block(document: Any) -> None:
    one = settle(document, "0.norm1", "embed")
    residual = one["residual"]
    stays = {"op": "dispatch", "axes": [0], "from": residual, "to": residual}
    one["moves"].append(stays)


def move_that_does_not_follow(document: Any) -> None:
    one = delivery(document, "0.experts")
    one["moves"].append({"op": "slice", "axes": [1], "from": "SR", "to": "SS"})


def run_beside(document: Any) -> None:
    delivery(document, "0.attn")["beside"] = True


def shared(document: Any) -> Any:
    """The first settle of two blocks."""
    settles = document["regimes"][0]["settles"]
    return next(one for one in settles if len(one["producers"]) == 2)


def add_in_another_order(document: Any) -> None:
    shared(document)["producers"].reverse()


def settle_one_by_one(document: Any) -> None:
    one = shared(document)
    two = deepcopy(one)
    one["producers"], two["producers"] = one["producers"][:1], one["producers"][1:]
    document["regimes"][0]["settles"].append(two)


def inside(document: Any) -> Any:
    return document["regimes"][0]["inner"][0]


def send_other_bundles(document: Any) -> None:
    inside(document)["moves"][0]["bundle"]["top_k"] = 2


def send_in_another_format(document: Any) -> None:
    inside(document)["moves"][0]["bundle"]["format"] = "nvfp4"


def bring_nothing_back(document: Any) -> None:
    inside(document)["moves"].pop()


def move_nothing_inside(document: Any) -> None:
    document["regimes"][0]["inner"].pop(0)


def move_inside_twice(document: Any) -> None:
    document["regimes"][0]["inner"].append(inside(document))


def move_inside_another(document: Any) -> None:
    inside(document)["block"] = "model.embed_tokens"


def read_nowhere(document: Any) -> None:
    shared(document)["before"] = "model.layers.99.input_layernorm"


Edit = Callable[[Any], None]
HAND_MADE: list[tuple[Edit, str, str]] = [
    (
        drop_first_move,
        "settle before 0.norm1: the moves lead from SP to SP; to S",
        "would be right",
    ),
    (swap_blocks, "0.attn: SR > P", "SR > SP would be right"),
    (swap_gives, "0.experts: RR > ", "RR > PP would be right"),
    (settle_twice, "settle before 0.norm2: 0.attn is settled twice", ""),
    (settle_nothing, "settle before 0.norm2: nothing from SR in one sum; no settle would be", ""),
    (drop_settle, "0.norm2: nothing settles 0.attn", ""),
    (drop_every_settle, "0.norm2: nothing settles 0.attn", ""),
    (settle_head, "settle before norm: lm_head has not written", "1.experts, 1.dense would be"),
    (drop_delivery, "0.norm2: no delivery to 0.experts; one would be right", ""),
    (deliver_twice, "delivery to 0.experts: is there twice", ""),
    (need_otherwise, "0.attn: SS > SP; SR > SP would be right", ""),
    (deliver_from_elsewhere, "delivery to 0.experts: from S", "at 0.norm2"),
    (residual_of_addends, "0.norm1: the residual is SP; SR or SS would be right", ""),
    (residual_over_groups, "0.norm1: the residual is RR; SR or SS would be right", ""),
    (carry_before_the_first, "0.norm1: no residual is there", ""),
    (fuse_first, "settle before 0.norm1: fused; only the last sum", ""),
    (fuse_no_sum, "settle before 0.norm2: fused, but its last move is no sum", ""),
    (fuse_before_another, "settle before 1.norm1: fused; only the last sum", ""),
    (move_inside_a_block, "settle before 0.norm1: dispatch(0) S", "is no move between blocks"),
    (run_beside, "delivery to 0.attn: beside, but there is nothing", ""),
    (move_that_does_not_follow, "delivery to 0.experts: slice(1) SR>SS is no move", "from RR"),
]
DISPATCHED: list[tuple[Edit, str, str]] = [
    (
        residual_changes_unmoved,
        "model.layers.",
        "the residual: the moves lead from SR to SR; to SS",
    ),
    (carry_from_elsewhere, "model.layers.", "the residual is moved from SS; from SR would be"),
    (carry_twice, "model.layers.", "the residual is moved twice; once would be right"),
    (carry_fused, "model.layers.", "the residual itself is moved fused"),
    (add_in_another_order, "settle before model.layers.", "experts + model.layers."),
    (settle_one_by_one, "settle before model.layers.", "experts + model.layers."),
    (send_other_bundles, "model.layers.", "top_k=2"),
    (send_in_another_format, "model.layers.", "'nvfp4'"),
    (bring_nothing_back, "model.layers.", "combine(0,1) SS>SS"),
    (move_nothing_inside, "model.layers.", "SS > SS; SS > SS with dispatch(0,1) SS>SS"),
    (move_inside_twice, "inner moves of model.layers.", "is there twice"),
    (move_inside_another, "inner moves of model.embed_tokens: the model has no block", ""),
    (read_nowhere, "settle before model.layers.99.input_layernorm: the model has no such", ""),
]


@pytest.mark.parametrize(
    ("chain", "document", "edit", "place", "right"),
    [
        pytest.param(chain, document, *row, id=row[0].__name__)
        for chain, document, rows in ((CHAIN, DOCUMENT, HAND_MADE), (A2A, A2A_DOCUMENT, DISPATCHED))
        for row in rows
    ],
)
def test_what_would_not_count_each_contribution_once_is_refused_by_place(
    chain: Chain, document: Any, edit: Edit, place: str, right: str
) -> None:
    document = deepcopy(document)
    edit(document)
    with pytest.raises(PlacementError) as refused:
        pinned(document, chain, CUDA)
    said = str(refused.value)
    assert said.startswith(f"plan: regime equal-8: {place}")
    assert right in said
    assert "\n" not in said


def regime(document: Any, number: int = 0) -> Any:
    return document["regimes"][number]


WRONG: list[tuple[Edit, str]] = [
    (lambda d: d.update(layout="tp8"), "plan: layout is 'tp8', not tp4,dp2,ep4,dense2 as here"),
    (lambda d: d.update(world=8), "plan: world is 8, not 4 as here"),
    (lambda d: d["mesh"].update(axes=[4]), "plan: mesh: axes is [4], not [2, 2] as here"),
    (lambda d: d.pop("regimes"), "plan: 'regimes' is missing"),
    (lambda d: d.update(regimes={}), "plan: regimes is {}, not a list"),
    (lambda d: d.update(regimes=[]), "the plan has no equal regime; at least one would be right"),
    (lambda d: d.update(regimes=d["regimes"][:2]), "the plan has no ragged regime"),
    (lambda d: d["regimes"].reverse(), "regime equal-8: comes behind equal-512; ascending"),
    (lambda d: d["regimes"].append(7), "plan: regimes[4] is 7, not an object"),
    (lambda d: d.update(colour="red"), "plan: 'colour' is none of world, layout"),
    (lambda d: regime(d).update(name="equal-9"), "equal-9: name is 'equal-9', not equal-8"),
    (lambda d: regime(d).update(rows=0), "equal-8: rows is 0, not a whole number from 1 to"),
    (lambda d: regime(d).update(rows=10**400), "equal-8: rows is 1000"),
    (lambda d: regime(d).update(rows=True), "equal-8: rows is True, not a whole number"),
    (lambda d: regime(d).update(equal=1), "equal-8: equal is 1, not true or false"),
    (lambda d: regime(d).update(residual="RR"), "equal-8: residual is 'RR', not S"),
    (lambda d: regime(d)["settles"][0].pop("before"), "settles[0]: 'before' is missing"),
    (lambda d: regime(d)["settles"][0].update(gives="SX"), "0.norm1: gives: placement 'SX'"),
    (lambda d: regime(d)["settles"][0].update(gives="S"), "0.norm1: gives is 'S', not one letter"),
    (lambda d: regime(d)["settles"][0].update(producers="embed"), "producers is 'embed', not a"),
    (lambda d: regime(d)["settles"][0].update(fused="no"), "fused is 'no', not true or false"),
    (
        lambda d: regime(d)["settles"][0]["moves"][0].update(op="sum"),
        "op is 'sum', not one of all_",
    ),
    (lambda d: regime(d)["settles"][0]["moves"][0].update(axes=[]), "a move takes a run of mesh"),
    (lambda d: regime(d)["settles"][0]["moves"][0].update(to="RR"), "moves[0]: all_reduce over"),
    (lambda d: regime(d)["deliveries"][0].update(fused=True), "'fused' is none of consumer, res"),
    (lambda d: regime(d)["deliveries"][0].update(consumer="0.a"), "delivery to 0.a: the model has"),
]


@pytest.mark.parametrize(("edit", "said"), WRONG, ids=[said for _, said in WRONG])
def test_another_shape_or_layout_is_refused_by_place(edit: Edit, said: str) -> None:
    document = deepcopy(DOCUMENT)
    edit(document)
    with pytest.raises(IsomoeError) as refused:
        pinned(document, CHAIN, CUDA)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ragged_regimes_of_one_group_are_refused() -> None:
    chain = model(Mesh.of(Parallelism(tp_size=2)))
    document = printed(make_plan(chain, CUDA))
    regime(document, -1).update(name="ragged-8", rows=8, equal=False)
    with pytest.raises(PlacementError, match="regime ragged-8: there is one attention group"):
        pinned(document, chain, CUDA)


def test_what_is_predicted_or_printed_beside_a_plan_is_not_read() -> None:
    document = deepcopy(DOCUMENT) | {"model": 3, "memory": None, "machine": "another"}
    for path, _, key in nodes(document):
        if key in UNREAD and "mesh" not in path:
            parent_of(document, path)[key] = "anything"
    for one in document["regimes"]:
        one["alternatives"] = "anything"
    found = pinned(document, CHAIN, FUSING)
    assert found == pinned(DOCUMENT, CHAIN, FUSING)
    assert list(map(does, found.regimes)) == list(map(does, PLAN.regimes))


UNREAD = {"machine", "predicted_us", "bytes_per_row", "beats"}
Where = tuple[str | int, ...]


def nodes(value: Any, path: Where = ()) -> Iterator[tuple[Where, Any, str | int]]:
    """Every value below the root that is read, with where it is; of unread ones the topmost."""
    below = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(below):
        yield (*path, key), item, key
        if isinstance(item, dict | list) and key not in UNREAD:
            yield from nodes(item, (*path, key))


def parent_of(document: Any, path: Where) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def wrong_values(value: Any) -> Iterator[Any]:
    """Of another type, or of the same and not what it was."""
    others: list[Any] = [None, [], {}, "", 1.5]
    yield from (other for other in others if other != value)
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, -value - 1)
        case str():
            yield from ("residual", value + "x", value[::-1] + "S")
        case list():
            yield from ([*value, item] for item in value)
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        case dict():
            yield {**value, "extra": 1}
            yield from ({k: v for k, v in value.items() if k != one} for one in value)


@pytest.mark.parametrize(
    ("chain", "document"),
    [
        (CHAIN, DOCUMENT | {"regimes": [DOCUMENT["regimes"][0], DOCUMENT["regimes"][2]]}),
        (A2A, A2A_DOCUMENT),
    ],
    ids=["hand-made", "a2a"],
)
def test_no_field_can_be_changed_by_itself(chain: Chain, document: Any) -> None:
    """Nor dropped, but for the marks that a sum is fused, or a block runs beside another."""
    edited, edits = deepcopy(document), 0
    first = [path for path, _, _ in nodes(document) if path[:2] != ("regimes", 1)]
    for path in first:
        parent, key = parent_of(edited, path), path[-1]
        if key in UNREAD:
            continue
        kept = parent[key]
        for wrong in wrong_values(kept):
            if means_as_much(key, kept, wrong):
                continue
            parent[key] = wrong
            edits += 1
            said = refusal(edited, chain)
            assert said is not None, f"{path}: {wrong!r} instead of {kept!r} was followed"
            assert said.startswith(("plan: ", "the plan has no ", "regime "))
            assert "\n" not in said
        parent[key] = kept
    assert edited == document
    assert edits > 1000


def means_as_much(key: str | int, kept: Any, wrong: Any) -> bool:
    if kept == wrong:
        return True
    if isinstance(kept, dict) and isinstance(wrong, dict):
        return set(wrong) < set(kept) and set(kept) - set(wrong) <= {*UNREAD, "fused", "beside"}
    return key in ("fused", "beside") and wrong is False


def refusal(document: Any, chain: Chain) -> str | None:
    try:
        pinned(document, chain, CUDA)
    except IsomoeError as error:
        return str(error)
    return None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["SS", "SR", "SP", "PP", "RR", "CR", "all_gather", "0.attn", "residual"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.data())
def test_an_edited_document_is_a_right_plan_or_refused(data: st.DataObject) -> None:
    chain, document = data.draw(st.sampled_from([(CHAIN, DOCUMENT), (A2A, A2A_DOCUMENT)]))
    document = deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        every = list(nodes(document))
        if not every:
            break
        path, value, _ = data.draw(st.sampled_from(every))
        parent, key = parent_of(document, path), path[-1]
        match data.draw(st.sampled_from(["drop", "edit", "double", "take"])):
            case "drop":
                del parent[key]
            case "double" if isinstance(parent, list):
                parent.insert(data.draw(st.integers(0, len(parent))), deepcopy(value))
            case "take":  # what stands elsewhere in the document
                parent[key] = deepcopy(data.draw(st.sampled_from(every))[1])
            case _:
                parent[key] = data.draw(JSON)
    said = refusal(document, chain)
    if said is None:
        assert_right(pinned(document, chain, CUDA), chain)
    else:
        assert "\n" not in said


def assert_right(plan: Plan, chain: Chain) -> None:
    """Each contribution comes to the next read once, by letters alone."""
    for form in {True, bool(not chain.mesh.attn_dp)}:
        rows = [bound.regime.rows for bound in plan.regimes if bound.regime.equal == form]
        assert rows == sorted(set(rows))
        assert rows
    for bound in plan.regimes:
        inner, carried = dict(bound.inner), None
        written = {chain.embedding.name: str(bound.embedding_gives)}
        for read, asked in zip(bound.reads, chain.reads, strict=True):
            assert (read.name, read.selects_rows) == (asked.name, asked.selects_rows)
            assert set(read.residual) <= {"S", "R"}
            assert read.residual.row_axes >= len(chain.mesh.attn_dp)
            if carried is None:
                assert read.carry is None
            else:
                assert read.carry is not None
                assert led(read.carry.route.moves, carried) == read.residual
            assert sorted(n for s in read.settles for n in s.producers) == sorted(written)
            for one in read.settles:
                assert {written[name] for name in one.producers} == {str(one.gives)}
                assert led(one.route.moves, str(one.gives)) == read.residual
                if one.route.fused:
                    assert carried is not None
                    assert one is read.settles[-1]
                    assert one.route.moves[-1].op in ("all_reduce", "reduce_scatter")
            assert [d.consumer for d in read.deliveries] == [b.name for b in asked.consumers]
            for way, block in zip(read.deliveries, asked.consumers, strict=True):
                assert led(way.route.moves, read.residual) == way.needs
                runs = [(v.needs, v.gives, v.inner) for v in block.variants]
                assert (way.needs, way.gives, inner.get(block.name, ())) in runs
            carried = str(read.residual)
            written = {d.consumer: str(d.gives) for d in read.deliveries}


def led(moves: tuple[Any, ...], here: str) -> str:
    """Where moves between blocks lead."""
    for move in moves:
        assert move.before == here
        assert move.op in ("all_reduce", "reduce_scatter", "all_gather", "slice")
        turned = {here[axis] + move.after[axis] for axis in move.axes}
        assert len(turned) == 1
        assert turned <= LEGAL_TURNS[move.op] - {"CR"}
        here = str(move.after)
    return here


def test_a_file_may_hold_all_that_the_command_prints(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"model": "m", "memory": {"dtype": "bfloat16"}, **DOCUMENT}))
    assert read_pinned(file, CHAIN, CUDA) == pinned(DOCUMENT, CHAIN, CUDA)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        (b"", "not readable as JSON (Expecting value"),
        (b"{", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"9" * 5000, "not readable as JSON"),
        (b"[]", "plan is [], not an object"),
        (b"null", "plan is None, not an object"),
        (b"{}", "plan: 'world' is missing"),
    ],
)
def test_a_file_without_a_plan_is_one_line(tmp_path: Path, text: bytes | None, said: str) -> None:
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError) as refused:
        read_pinned(file, CHAIN, CUDA)
    assert str(refused.value).startswith(f"{file}: {said}")
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_file_with_a_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable as JSON"):
        read_pinned(tmp_path, CHAIN, CUDA)


def test_a_wrong_plan_in_a_file_is_refused_by_file_and_place(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    document = deepcopy(DOCUMENT)
    drop_delivery(document)
    file.write_text(json.dumps(document))
    with pytest.raises(PlacementError) as refused:
        read_pinned(file, CHAIN, CUDA)
    assert str(refused.value).startswith(f"{file}: plan: regime equal-8: 0.norm2: no delivery to")
