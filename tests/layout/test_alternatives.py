"""What a plan was chosen from: each alternative is the cheapest under its restriction."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise, product

import pytest
from layout_oracles import distances
from test_layout_plan import LAYOUTS, least_cost, microseconds, model

from isomoe.errors import PlacementError
from isomoe.layout import (
    MACHINES,
    Alternative,
    Chain,
    Choice,
    FusedSums,
    Machine,
    Mesh,
    Parallelism,
    Placement,
    Planner,
    Rate,
    Regime,
    Variant,
    alternatives,
    make_plan,
    pinned,
)
from support import placements

SMALL = [p for p in LAYOUTS if 1 < p.tp_size <= 8]
ROWS = [8, 4096]
PLAIN = {name: replace(machine, fused=None) for name, machine in MACHINES.items()}


def fusing(alpha_us: float, max_bytes: int = 2**40) -> Machine:
    """A GPU with fused sums that take so long, whatever they send."""
    rate = Rate(alpha_us=alpha_us, bytes_per_us=1e18)
    return replace(
        MACHINES["cuda"],
        fused=FusedSums(whole=rate, scattered=rate, host_us=0.0, max_bytes=max_bytes),
    )


def wanted(chain: Chain) -> list[Regime]:
    forms = (True, False) if chain.mesh.attn_dp else (True,)
    return [Regime(rows=rows, equal=equal) for equal in forms for rows in ROWS]


def by_name(others: Iterable[Alternative]) -> dict[str, Alternative]:
    return {other.what: other for other in others}


def with_residual(chain: Chain, residual: str, machine: Machine, regime: Regime) -> float:
    """The cheapest choice of variants with the residual in one placement, by trying all of them."""
    axes = len(chain.mesh.axes)

    def cost(op: str, run: tuple[int, ...], before: str, after: str) -> float:
        fewer = min(before.count("S"), after.count("S"))
        return microseconds(chain.mesh, machine, regime, op, run, fewer)

    to = {goal: distances(axes, goal, cost) for goal in placements(axes, "SR")}
    blocks = [block for read in chain.reads for block in read.consumers]
    best = float("inf")
    for variants in product(*(block.variants for block in blocks)):
        chosen = dict(zip([block.name for block in blocks], variants, strict=True))
        total = to[residual][chain.embedding.variants[0].gives]
        for read in chain.reads:
            here = [chosen[block.name] for block in read.consumers]
            total += sum(to[needs][residual] for needs in {str(v.needs) for v in here})
            if read is not chain.reads[-1]:
                total += sum(to[residual][gives] for gives in {str(v.gives) for v in here})
        best = min(best, total)
    return best


@pytest.mark.parametrize("machine", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_of_those_with_one_residual_none_is_cheaper(layout: Parallelism, machine: Machine) -> None:
    chain = model(Mesh.of(layout))
    plan = make_plan(chain, machine, wanted(chain))
    axes = len(chain.mesh.axes)
    found = alternatives(chain, plan)
    for bound in plan.regimes:
        named = by_name(found[bound.regime])
        for prefix in range(len(chain.mesh.attn_dp), axes + 1):
            residual = "S" * prefix + "R" * (axes - prefix)
            least = with_residual(chain, residual, machine, bound.regime)
            us = bound.predicted_us
            if other := named.pop(f"residual {residual} everywhere", None):
                us = other.predicted_us
            else:
                assert {str(read.residual) for read in bound.reads} == {residual}
            # 1e-9: the same few sums in another order, in doubles.
            assert us == pytest.approx(least, rel=1e-9)


def only(chain: Chain, kind: str, variant: Variant) -> Chain:
    reads = []
    for read in chain.reads:
        blocks = [replace(b, variants=(variant,)) if b.kind == kind else b for b in read.consumers]
        reads.append(replace(read, consumers=tuple(blocks)))
    return replace(chain, reads=tuple(reads))


@pytest.mark.parametrize("machine", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_of_those_with_a_kind_of_block_in_one_variant_none_is_cheaper(
    layout: Parallelism, machine: Machine
) -> None:
    chain = model(Mesh.of(layout))
    plan = make_plan(chain, machine, wanted(chain))
    found = alternatives(chain, plan)
    (dense,) = {b.variants for read in chain.reads for b in read.consumers if b.kind == "dense"}
    for bound in plan.regimes:
        named = by_name(found[bound.regime])
        told = {f"dense {v.needs} > {v.gives} everywhere": v for v in dense}
        kinds = {what.partition(" ")[0] for what in named}
        assert kinds <= {"dense", "residual"}  # the other kinds have one variant each
        for what, variant in told.items():
            least = least_cost(only(chain, "dense", variant), machine, bound.regime)
            us = named[what].predicted_us if what in named else bound.predicted_us
            assert us == pytest.approx(least, rel=1e-9)
        assert sum(what in named for what in told) >= len(dense) - 1  # but for the plan's own


@pytest.mark.parametrize("machine", [*PLAIN.values(), fusing(3.0)], ids=[*PLAIN, "fusing"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_they_lose_by_what_they_cost_more_and_the_cheapest_come_first(
    layout: Parallelism, machine: Machine
) -> None:
    chain = model(Mesh.of(layout), layers=2)
    plan = make_plan(chain, machine)
    found = alternatives(chain, plan)
    assert list(found) == [bound.regime for bound in plan.regimes]
    for bound in plan.regimes:
        others = found[bound.regime]
        assert "the cheapest" not in by_name(others)
        assert len(by_name(others)) == len(others)
        for one, two in pairwise(others):
            assert one.predicted_us <= two.predicted_us
        for other in others:
            assert other.lost_by_us == other.predicted_us - bound.predicted_us
            # 1e-9 of the whole: sums in another order; of 1e8, where fused sums are favoured.
            assert other.lost_by_us >= -1e-9 * max(1.0, bound.predicted_us) - 1e-6
            assert other.to_json() == {
                "what": other.what,
                "predicted_us": round(other.predicted_us, 3),
                "lost_by_us": round(other.lost_by_us, 3),
            }


def test_one_rank_has_nothing_to_choose() -> None:
    chain = model(Mesh.of(Parallelism()))
    assert set(map(len, alternatives(chain, make_plan(chain, fusing(1.0))).values())) == {0}


def fused_by_hand(machine: Machine, regime: Regime) -> float:
    """Two ranks, every sum but the first fused: the cheapest residuals, by trying all of them."""
    mesh = Mesh.of(Parallelism(tp_size=2))
    assert machine.fused is not None

    def us(op: str) -> float:
        return microseconds(mesh, machine, regime, op, (0,), 0)

    summed = {"R": us("all_reduce"), "S": us("reduce_scatter")}
    fused = machine.fused.whole.alpha_us
    kept = {"RR": 0.0, "SS": 0.0, "RS": us("slice"), "SR": us("all_gather")}
    least = float("inf")
    for path in product("RS", repeat=3):  # attention, experts, lm_head: each needs R
        total = summed[path[0]] + 2 * fused
        total += sum(kept[one + two] for one, two in pairwise(path))
        total += sum(kept[one + "R"] for one in path)
        least = min(least, total)
    return least


@pytest.mark.parametrize("rows", ROWS)
def test_fused_sums_that_lose_are_told_with_what_they_lose_by(rows: int) -> None:
    chain = model(Mesh.of(Parallelism(tp_size=2)))
    regime = Regime(rows=rows, equal=True)
    machine = fusing(1000.0)
    plan = make_plan(chain, machine, [regime])
    assert not plan.regimes[0].fuses
    named = by_name(alternatives(chain, plan)[regime])
    assert "no fused sums" not in named
    # 1e-6 us: they are favoured by 1e6 us each while they are looked for.
    expected = pytest.approx(fused_by_hand(machine, regime), abs=1e-6)
    assert named["fused sums wherever they can be"].predicted_us == expected


@pytest.mark.parametrize("rows", ROWS)
def test_where_fused_sums_win_the_plan_without_is_told(rows: int) -> None:
    chain = model(Mesh.of(Parallelism(tp_size=2)))
    regime = Regime(rows=rows, equal=True)
    machine = fusing(1.0)
    plan = make_plan(chain, machine, [regime])
    assert plan.regimes[0].fuses
    assert plan.regimes[0].predicted_us == pytest.approx(fused_by_hand(machine, regime), rel=1e-9)
    named = by_name(alternatives(chain, plan)[regime])
    assert "fused sums wherever they can be" not in named
    without = make_plan(chain, replace(machine, fused=None), [regime]).regimes[0]
    assert named["no fused sums"].predicted_us == without.predicted_us


def test_fused_sums_that_would_be_declined_are_no_alternative() -> None:
    chain = model(Mesh.of(Parallelism(tp_size=2)))
    plan = make_plan(chain, fusing(1.0, max_bytes=1))
    for others in alternatives(chain, plan).values():
        assert not any("fused" in other.what for other in others)


def test_what_cannot_be_planned_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = model(Mesh.of(Parallelism(tp_size=4, attn_dp_size=2)))
    plan = make_plan(chain, MACHINES["cuda"])
    choose = Planner.choose

    def picky(self: Planner, machine: Machine, regime: Regime) -> Choice:
        if all(residual == "SS" for states in self._states[1:] for residual, _ in states):
            raise PlacementError("no chain of moves")
        return choose(self, machine, regime)

    before = {other.what for others in alternatives(chain, plan).values() for other in others}
    monkeypatch.setattr(Planner, "choose", picky)
    after = {other.what for others in alternatives(chain, plan).values() for other in others}
    assert before - after == {"residual SS everywhere"}


def test_a_pinned_plan_is_told_what_is_cheaper() -> None:
    chain = model(Mesh.of(Parallelism(tp_size=4, attn_dp_size=2)))
    regimes = wanted(chain)
    dear = Planner(chain, [Placement("SS")])
    document = make_plan(chain, MACHINES["cuda"], regimes).to_json()
    bound = [dear.choose(MACHINES["cuda"], regime).bind() for regime in regimes]
    plan = pinned(
        {**document, "regimes": [one.to_json() for one in bound]}, chain, MACHINES["cuda"]
    )
    cheapest = make_plan(chain, MACHINES["cuda"], regimes)
    found = alternatives(chain, plan)
    gains = 0
    for one, other in zip(cheapest.regimes, plan.regimes, strict=True):
        if one.signature != other.signature:
            named = by_name(found[other.regime])["the cheapest"]
            assert named.predicted_us == pytest.approx(one.predicted_us, rel=1e-9)
            assert named.lost_by_us < 0
            gains += 1
    assert gains
