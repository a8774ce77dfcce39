"""The planner: chains that it refuses, what it picks, and that nothing cheaper exists."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
from layout_oracles import LEGAL_TURNS, distances, legal_moves

from isomoe.errors import PlacementError
from isomoe.layout import (
    MACHINES,
    BlockSpec,
    Chain,
    CostModel,
    FittedLink,
    FusedSums,
    Machine,
    Mesh,
    Move,
    Op,
    Parallelism,
    Placement,
    Plan,
    Planner,
    Rate,
    ReadSpec,
    Regime,
    RegimePlan,
    Variant,
    make_plan,
    regimes,
)
from isomoe.layout.plan import BUCKETS
from support import placements

HIDDEN = 64
LAYOUTS = [
    Parallelism(tp_size=tp, attn_dp_size=dp, ep_size=ep, moe_dense_tp_size=dense)
    for tp, dp, ep, dense in [
        (1, 1, 1, None), (2, 1, 1, None), (2, 2, 2, None), (3, 3, 1, 1), (4, 2, 4, 2),
        (6, 2, 6, 3), (6, 3, 1, 2), (8, 4, 8, 2), (12, 3, 12, None), (16, 4, 8, 2),
    ]
]  # fmt: skip


def letters(mesh: Mesh, prefix: int, partial: tuple[int, ...] = ()) -> Placement:
    return Placement(
        "".join("S" if a < prefix else "P" if a in partial else "R" for a in range(len(mesh.axes)))
    )


def model(mesh: Mesh, layers: int = 1) -> Chain:
    """Attention, then experts beside a dense block whose rows may lie as the plan likes."""
    groups = len(mesh.attn_dp)
    attention = Variant(letters(mesh, groups), letters(mesh, groups, mesh.attn_tp))
    everywhere = Variant(letters(mesh, 0), letters(mesh, 0, mesh.all))
    dense = tuple(
        Variant(letters(mesh, k), letters(mesh, k, mesh.ffn_tp))
        for k in range(len(mesh.ffn_dp) + 1)
    )
    head = Placement("R" * len(mesh.lm_dp) + "C" * len(mesh.lm_tp))
    inner = (Move(Op.ALL_GATHER, mesh.all, head, letters(mesh, 0)),) if mesh.axes else ()
    reads: list[ReadSpec] = []
    for i in range(layers):
        block = BlockSpec(name=f"{i}.attn", kind="attention", variants=(attention,))
        reads.append(ReadSpec(name=f"{i}.norm1", consumers=(block,)))
        experts = BlockSpec(name=f"{i}.experts", kind="experts", variants=(everywhere,))
        shared = BlockSpec(name=f"{i}.dense", kind="dense", variants=dense)
        reads.append(ReadSpec(name=f"{i}.norm2", consumers=(experts, shared)))
    lm_head = BlockSpec(
        name="lm_head", kind="lm_head", variants=(Variant(letters(mesh, 0), head, inner),)
    )
    reads.append(ReadSpec(name="norm", consumers=(lm_head,), selects_rows=True))
    embedding = BlockSpec(
        name="embed", kind="embedding", variants=(Variant(None, attention.gives),)
    )
    return Chain(mesh=mesh, embedding=embedding, reads=tuple(reads), hidden_size=HIDDEN)


def microseconds(
    mesh: Mesh, machine: Machine, regime: Regime, op: str, run: tuple[int, ...], fewer: int
) -> float:
    """Alpha-beta by hand. fewer: row-sharded axes on the side that holds more rows."""
    if op == "slice":
        return machine.slice_us
    members = spread = 1
    for axis, size in enumerate(mesh.axes):
        members *= size if axis in run else 1
        spread *= size if axis >= run[0] else 1
    rows = float(regime.rows)
    for size in mesh.axes[:fewer]:
        rows /= size
    link = machine.within if spread <= machine.local_ranks else machine.across
    sent = rows * HIDDEN * machine.wire_bytes * (members - 1) / members
    assert isinstance(link, FittedLink)
    rate = getattr(link.equal if regime.equal else link.ragged, op)
    return float(rate.alpha_us + sent * (2 if op == "all_reduce" else 1) / rate.bytes_per_us)


def savings(
    mesh: Mesh, machine: Machine, regime: Regime, goal: str, to: dict[str, dict[str, float]]
) -> dict[str, float]:
    """What a fused last sum saves on the way to `goal`, by where the way begins."""
    if machine.fused is None:
        return {}
    found: dict[str, float] = {}
    for op, run, before, after in legal_moves(len(mesh.axes)):
        if after != goal or op not in ("all_reduce", "reduce_scatter"):
            continue
        members = spread = 1
        for axis, size in enumerate(mesh.axes):
            members *= size if axis in run else 1
            spread *= size if axis >= run[0] else 1
        held = float(regime.rows * HIDDEN * machine.wire_bytes)
        for size in mesh.axes[: before.count("S")]:
            held /= size
        if spread > machine.local_ranks or held > machine.fused.max_bytes:
            continue
        read = held * (members - 1)
        if op == "all_reduce":
            us = machine.fused.whole.alpha_us + read / machine.fused.whole.bytes_per_us
        else:
            rate = machine.fused.scattered
            us = rate.alpha_us + read / members / rate.bytes_per_us
        if not regime.equal:
            us = max(us, machine.fused.host_us)
        for start, there in to[before].items():
            if there < float("inf"):
                gain = to[goal][start] - (there + us)
                found[start] = max(found.get(start, 0.0), gain)
    return found


def least_cost(chain: Chain, machine: Machine, regime: Regime) -> float:
    """The cheapest choice of placements, by trying all of them."""
    mesh = chain.mesh
    axes = len(mesh.axes)

    def cost(op: str, run: tuple[int, ...], before: str, after: str) -> float:
        fewer = min(before.count("S"), after.count("S"))
        return microseconds(mesh, machine, regime, op, run, fewer)

    to = {goal: distances(axes, goal, cost) for goal in placements(axes, "SRP")}
    saved = {goal: savings(mesh, machine, regime, goal, to) for goal in placements(axes, "SR")}
    residuals = ["S" * k + "R" * (axes - k) for k in range(len(mesh.attn_dp), axes + 1)]
    picks = [product(residuals, *(b.variants for b in read.consumers)) for read in chain.reads]
    best = float("inf")
    for path in product(*map(list, picks)):
        total, carried, written = 0.0, None, {str(chain.embedding.variants[0].gives)}
        for residual, *variants in path:
            moved = written if carried is None else [*written, carried]
            total += sum(to[residual][gives] for gives in moved)
            if carried is not None:  # one of what was written may be summed as it is added
                total -= max(saved[residual].get(gives, 0.0) for gives in written)
            total += sum(to[str(needs)][residual] for needs in {v.needs for v in variants})
            carried, written = residual, {str(v.gives) for v in variants}
        best = min(best, total)
    return best


FUSES = {
    "some": FusedSums(
        whole=Rate(alpha_us=3.0, bytes_per_us=3e5),
        scattered=Rate(alpha_us=4.0, bytes_per_us=2e5),
        host_us=5.0,
        max_bytes=1 << 20,
    ),
    "none": None,
}


@pytest.mark.parametrize("fused", FUSES.values(), ids=FUSES)
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("layout", [p for p in LAYOUTS if p.tp_size <= 8], ids=str)
def test_no_choice_of_placements_is_cheaper(
    layout: Parallelism, machine: Machine, fused: FusedSums | None
) -> None:
    chain = model(Mesh.of(layout))
    machine = replace(machine, fused=fused)
    for bound in make_plan(chain, machine).regimes:
        expected = least_cost(chain, machine, bound.regime)
        # 1e-9: the same few sums in another order, in doubles.
        assert bound.predicted_us == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_plan_is_the_sum_of_its_moves_and_fits_end_to_end(
    layout: Parallelism, machine: Machine
) -> None:
    chain = model(Mesh.of(layout), layers=2)
    specs = {b.name: b for read in chain.reads for b in read.consumers}
    for bound in make_plan(chain, machine).regimes:
        total, written = 0.0, {"embed": bound.embedding_gives}
        carried = None
        assert [read.name for read in bound.reads] == [read.name for read in chain.reads]
        for read, asked in zip(bound.reads, chain.reads, strict=True):
            assert (read.carry is None) == (carried is None)
            assert set(str(read.residual)) <= {"S", "R"}
            assert read.residual.row_axes >= len(chain.mesh.attn_dp)
            assert sorted(p for s in read.settles for p in s.producers) == sorted(written)
            assert len({s.gives for s in read.settles}) == len(read.settles)
            for settle in read.settles:
                assert {written[p] for p in settle.producers} == {settle.gives}
            for part in ((read.carry,) if read.carry else ()) + read.settles:
                assert part.residual == read.residual
                assert_leads(part.route.moves, part.gives, read.residual)
                total += part.route.predicted_us
            if read.carry:
                assert read.carry.gives == carried
            assert [d.consumer for d in read.deliveries] == [b.name for b in asked.consumers]
            for d in read.deliveries:
                inner = dict(bound.inner).get(d.consumer, ())
                assert Variant(d.needs, d.gives, inner) in specs[d.consumer].variants
                assert_leads(d.route.moves, read.residual, d.needs)
            total += sum({d.needs: d.route.predicted_us for d in read.deliveries}.values())
            carried, written = read.residual, {d.consumer: d.gives for d in read.deliveries}
        # 1e-9: the same sums in another order, in doubles.
        assert bound.predicted_us == pytest.approx(total, rel=1e-9)
        assert bound.gives["embed"] == bound.embedding_gives


def assert_leads(moves: tuple[Move, ...], start: Placement, end: Placement) -> None:
    here = start
    for move in moves:
        assert move.before == here
        here = move.after
    assert here == end


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_beaten_route_is_no_cheaper_than_the_one_taken(
    layout: Parallelism, machine: Machine
) -> None:
    for bound in make_plan(model(Mesh.of(layout)), machine).regimes:
        for read in bound.reads:
            for part in (*read.settles, *read.deliveries):
                if part.route.beats:
                    assert part.route.beats.predicted_us >= part.route.predicted_us
                    differs = part.route.beats.moves[0] != part.route.moves[0]
                    assert differs or part.route.fused


def expert_moves(bound: RegimePlan) -> tuple[list[str], list[str]]:
    """(ops that settle the experts, ops that feed them) in layer 0."""
    settles = next(s for r in bound.reads for s in r.settles if "0.experts" in s.producers)
    fed = next(d for r in bound.reads for d in r.deliveries if d.consumer == "0.experts")
    return [str(m.op) for m in settles.route.moves], [str(m.op) for m in fed.route.moves]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_choices_have_one_key_if_and_only_if_they_make_the_same_moves(layout: Parallelism) -> None:
    chain = model(Mesh.of(layout), layers=2)
    named = [replace(read, name=f"another {read.name}") for read in chain.reads]
    wider = replace(chain, reads=tuple(named), hidden_size=16 * HIDDEN)
    found: dict[object, set[object]] = {}
    for planner in (Planner(chain), Planner(wider)):
        for machine, regime in product(MACHINES.values(), regimes(chain.mesh)):
            choice = planner.choose(machine, regime)
            bound = choice.bind()
            assert bound.regime == regime
            found.setdefault(choice.key, set()).add((regime.equal, bound.signature))
    does = [one for alike in found.values() for one in alike]
    assert all(len(alike) == 1 for alike in found.values())
    assert len(does) == len(set(does))


def test_choices_of_blocks_that_move_something_inside_are_told_apart() -> None:
    chain = model(Mesh.of(Parallelism(tp_size=4)))
    *reads, last = chain.reads
    (head,) = last.consumers
    variants = tuple(replace(variant, inner=()) for variant in head.variants)
    bare = replace(last, consumers=(replace(head, variants=variants),))
    regime = regimes(chain.mesh)[0]
    one, other = (
        Planner(c).choose(MACHINES["cpu"], regime).key
        for c in (chain, replace(chain, reads=(*reads, bare)))
    )
    assert one != other


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_with_dp_attention_experts_are_gathered_for_and_reduce_scattered_from(
    machine: Machine,
) -> None:
    mesh = Mesh.of(Parallelism(tp_size=2, attn_dp_size=2, ep_size=2))
    assert mesh.axes == (2,)
    for bound in make_plan(replace(model(mesh), hidden_size=2048), machine).regimes:
        settle = next(s for r in bound.reads for s in r.settles if "0.experts" in s.producers)
        assert (str(settle.gives), str(settle.residual)) == ("P", "S")
        assert str(bound.residual) == "S"
        summed, gathered = expert_moves(bound)
        assert gathered == ["all_gather"]
        # Of few rows the latencies decide: on GPUs an all-reduce starts a little faster.
        assert summed == ["reduce_scatter"] or (
            summed == ["all_reduce", "slice"] and bound.regime.rows < 32768
        )


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("tp", [2, 3, 8])
def test_pure_tensor_parallelism_all_reduces_few_rows(tp: int, machine: Machine) -> None:
    plan = make_plan(model(Mesh.of(Parallelism(tp_size=tp))), machine)
    small = plan.regimes[plan.choose([1])]
    assert str(small.residual) == "R"
    assert expert_moves(small) == (["all_reduce"], [])


def test_contributions_in_one_placement_take_one_chain_of_moves() -> None:
    bound = make_plan(model(Mesh.of(Parallelism(tp_size=3))), MACHINES["cuda"]).regimes[0]
    (settle,) = bound.reads[2].settles
    assert settle.producers == ("0.experts", "0.dense")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_regimes_cover_every_step_and_the_smallest_that_fits_is_chosen(layout: Parallelism) -> None:
    mesh = Mesh.of(layout)
    plan = make_plan(model(mesh), MACHINES["cpu"])
    groups = layout.attn_dp_size
    assert [bound.regime for bound in plan.regimes] == regimes(mesh)
    forms = {True} if groups == 1 else {True, False}
    assert {(r.rows, r.equal) for r in regimes(mesh)} == set(product(BUCKETS, forms))
    for per_group, extra in product([0, 1, 3, 70, 600, 5000, 10**6], [0, 1]):
        rows = [per_group] * (groups - 1) + [per_group + extra]
        regime = plan.regimes[plan.choose(rows)].regime
        assert regime.equal == (groups == 1 or extra == 0)
        fits = [bucket for bucket in BUCKETS if bucket >= sum(rows)]
        assert regime.rows == min(fits, default=max(BUCKETS))


MOVE_KEYS = {"op", "axes", "from", "to"}
SETTLE_KEYS = {
    "before", "producers", "gives", "residual", "moves", "bytes_per_row", "predicted_us",
}  # fmt: skip
DELIVERY_KEYS = {"consumer", "residual", "needs", "moves", "bytes_per_row", "predicted_us"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_regime_prints_what_the_issue_lists(layout: Parallelism) -> None:
    mesh = Mesh.of(layout)
    for bound in make_plan(model(mesh), MACHINES["cpu"]).regimes:
        shown = bound.to_json()
        assert set(shown) - {"predicted_us"} == {
            "name", "rows", "equal", "residual", "settles", "deliveries", "inner",
        }  # fmt: skip
        regime = bound.regime
        assert (shown["name"], shown["rows"], shown["equal"]) == (
            f"{'equal' if regime.equal else 'ragged'}-{regime.rows}",
            regime.rows,
            regime.equal,
        )
        for settle in shown["settles"]:
            assert set(settle) - {"beats"} == SETTLE_KEYS
            assert_moves(settle["moves"], mesh, settle["gives"], settle["residual"])
        settled = [name for settle in shown["settles"] for name in settle["producers"]]
        assert set(settled) - {"residual"} == {"embed", "0.attn", "0.experts", "0.dense"}
        assert [d["consumer"] for d in shown["deliveries"]] == [
            "0.attn", "0.experts", "0.dense", "lm_head",
        ]  # fmt: skip
        for delivery in shown["deliveries"]:
            assert set(delivery) - {"beats"} == DELIVERY_KEYS
            assert_moves(delivery["moves"], mesh, delivery["residual"], delivery["needs"])
        assert [entry["block"] for entry in shown["inner"]] == (["lm_head"] if mesh.axes else [])
        for entry in shown["inner"]:
            assert set(entry) == {"block", "moves"}
            first = entry["moves"][0]
            assert_moves(entry["moves"], mesh, first["from"], "R" * len(mesh.axes))


def assert_moves(moves: list[dict[str, object]], mesh: Mesh, start: str, end: str) -> None:
    here = start
    for move in moves:
        assert set(move) == MOVE_KEYS
        assert move["op"] in LEGAL_TURNS
        assert move["from"] == here
        assert move["axes"]
        assert set(move["axes"]) <= set(range(len(mesh.axes)))
        here = move["to"]
    assert here == end


def test_a_rank_s_bytes_are_those_of_a_ring() -> None:
    """3 ranks: two thirds of what is held to gather or scatter, twice that to all-reduce."""
    mesh = Mesh.of(Parallelism(tp_size=6, attn_dp_size=2))  # axes (2, 3)
    cost = CostModel(machine=MACHINES["cuda"], mesh=mesh, row_values=300)
    for op, before, after, expected in [
        (Op.ALL_REDUCE, "RP", "RR", 2 * 2 / 3 * 600),
        (Op.ALL_REDUCE, "SP", "SR", 2 * 2 / 3 * 600 / 2),
        (Op.REDUCE_SCATTER, "SP", "SS", 2 / 3 * 600 / 2),
        (Op.ALL_GATHER, "SS", "SR", 2 / 3 * 600 / 2),
        (Op.SLICE, "SR", "SS", 0.0),
    ]:
        move = Move(op, (1,), Placement(before), Placement(after))
        assert cost.sent_bytes_per_row(move) == pytest.approx(expected, rel=1e-12)
    both = Move(Op.REDUCE_SCATTER, (0, 1), Placement("PP"), Placement("SS"))
    assert cost.sent_bytes_per_row(both) == pytest.approx(5 / 6 * 600, rel=1e-12)


def test_a_group_that_leaves_the_node_uses_the_slower_link() -> None:
    mesh = Mesh.of(Parallelism(tp_size=16, attn_dp_size=2))  # axes (2, 8)
    cost = CostModel(machine=MACHINES["cuda"], mesh=mesh, row_values=HIDDEN)
    inside = Move(Op.ALL_REDUCE, (1,), Placement("RP"), Placement("RR"))
    between = Move(Op.ALL_REDUCE, (0,), Placement("PR"), Placement("RR"))
    across = MACHINES["cuda"].across
    assert isinstance(across, FittedLink)
    assert cost.microseconds(inside, 1, True) < across.equal.all_reduce.alpha_us
    assert cost.microseconds(between, 1, True) > across.equal.all_reduce.alpha_us


MESH = Mesh.of(Parallelism(tp_size=6, attn_dp_size=2))  # axes (2, 3)


def changed(block: str, needs: str | None, gives: str) -> Chain:
    """The model with one block that declares otherwise."""
    good = model(MESH)
    variant = Variant(None if needs is None else Placement(needs), Placement(gives))
    if block == "embed":
        return replace(good, embedding=replace(good.embedding, variants=(variant,)))
    reads = tuple(
        replace(
            read,
            consumers=tuple(
                replace(b, variants=(variant,)) if b.name == block else b for b in read.consumers
            ),
        )
        for read in good.reads
    )
    return replace(good, reads=reads)


@pytest.mark.parametrize(
    ("block", "needs", "gives", "message"),
    [
        ("0.experts", "RP", "PP", "0.experts: needs RP, axis 1 is P: a norm"),
        ("0.attn", "PR", "RR", "0.attn: needs PR, axis 0 is P: a norm"),
        ("0.dense", "SC", "SP", "0.dense: needs SC, axis 1 is C: features are only sharded"),
        ("0.attn", "SR", "SC", "0.attn: gives SC, axis 1 is C: features may not leave a block"),
        ("embed", None, "CR", "embed: gives CR, axis 0 is C: features may not leave a block"),
        (
            "0.experts",
            "RRR",
            "PPP",
            "0.experts: placement RRR has 3 letters, the mesh (2, 3)",
        ),
        ("0.dense", "SR", "S", "0.dense: placement S has 1 letters, the mesh (2, 3) has 2 axes"),
        ("embed", None, "", "embed: placement  has 0 letters"),
        ("0.attn", None, "SP", "0.attn: takes rows, but declares no placement for them"),
        ("lm_head", "RR", "PP", "lm_head: gives PP, a partial sum nobody would settle"),
    ],
)
def test_a_declaration_that_cannot_be_right_is_refused_by_block_axis_and_letter(
    block: str, needs: str | None, gives: str, message: str
) -> None:
    with pytest.raises(PlacementError) as refused:
        changed(block, needs, gives)
    assert str(refused.value).startswith(message)


def test_a_plan_names_every_run_that_needs_a_process_group() -> None:
    plan: Plan = make_plan(model(MESH), MACHINES["cuda"])
    communicating = {m.axes for bound in plan.regimes for m in bound.moves() if m.op != "slice"}
    assert communicating <= plan.runs()
    assert (0, 1) in plan.runs()  # the lm_head's inner gather


def test_layers_that_are_alike_have_one_signature() -> None:
    short, long = (make_plan(model(MESH, n), MACHINES["cuda"]).regimes[0] for n in (2, 2))
    assert short.signature == long.signature
    other = make_plan(model(MESH, 3), MACHINES["cuda"]).regimes[0]
    assert short.signature != other.signature


def test_the_layout_package_works_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['isomoe.comm'] = None\n"
        "from isomoe.layout import *\n"
        "assert Mesh.of(Parallelism.parse('tp8,dp4,ep8')).axes == (4, 2)\n"
        "print('works')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "works\n", done.stderr
