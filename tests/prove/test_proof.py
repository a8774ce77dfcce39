"""The proof holds for what we ship, fails for every known defect, and says what it found.

A guard is worth what it catches: the list of mutants is the product's own, so a new one is tested
unasked.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor

from isomoe.blocks import Attention, Block, Embedding, LmHead, Ownership, SparseMoe, WideNormCore
from isomoe.blocks.embedding import vocabulary_part
from isomoe.cli.main import main
from isomoe.comm.sim import SimComm
from isomoe.layout import (
    MACHINES,
    Letter,
    Move,
    Parallelism,
    Placement,
    RegimePlan,
    Seat,
    make_plan,
)
from isomoe.models import CausalLM, known_configs
from isomoe.prove import (
    MUTANTS,
    Finding,
    Stats,
    find_mutant,
    prove_models,
)
from isomoe.prove.campaign import _subjects
from isomoe.prove.cases import Case
from isomoe.prove.levels import levels
from isomoe.prove.runner import prove
from isomoe.prove.subject import PROOF_VOCAB, Subject
from isomoe.prove.subject import build as subject_build
from isomoe.prove.world import World
from isomoe.stream import Norm, ResidualStream

CONFIGS = known_configs()
SMALL = {"qwen3-moe-mixed": CONFIGS["qwen3-moe-mixed"]}


Command = Callable[..., tuple[int, Any, str]]


def prove_one(subject: Subject, mutant: str | None = None) -> tuple[Stats, Finding | None]:
    """All that was checked of one layout, and the violation if there is one."""
    planted = find_mutant(mutant) if mutant is not None else None
    stats, found = Stats(), None
    for part, finding in prove([subject], planted):
        stats.add(part)
        found = found or finding
    return stats, found


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `isomoe prove ... --json`: exit code, document, what went to stderr."""

    def run(*words: str) -> tuple[int, Any, str]:
        try:
            code = main(["prove", *words, "--json"])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, errors = capsys.readouterr()
        return code, json.loads(out) if out else None, errors

    return run


def test_every_shipped_model_holds_on_every_layout_of_up_to_4_ranks() -> None:
    report = prove_models(CONFIGS, 4, processes=1)
    assert report.finding is None, report.finding
    assert report.models == len(CONFIGS)
    stats = report.stats
    assert stats.layouts > 1400
    assert stats.regimes > 10 * stats.layouts
    assert stats.proven_as_equal == stats.regimes - stats.plans
    # What is left when each distinct step and share is run once.
    assert stats.shares > 100
    assert stats.steps >= stats.plans > 50
    assert stats.moves > 700
    assert stats.contributions > 10_000


STEPPED = ("qwen3-moe-mixed", "qwen2-57b-a14b", "minimax-m2", "gpt-oss-20b", "step-3.5-flash")
"""Dense layers; shared experts that are sharded by their width; moves inside attention; biases;
layers of several head counts."""


@pytest.mark.parametrize(
    "job", [(8, 1), (8, 2), pytest.param((8, 4), marks=pytest.mark.slow)], ids=str
)
def test_every_step_of_every_plan_is_one_that_was_run(
    job: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: set[object] = set()
    check = World.check

    def recorded(world: World, plan: RegimePlan, case: Case, stats: Stats) -> Finding | None:
        ran.update(steps_of(plan))
        return check(world, plan, case, stats)

    monkeypatch.setattr(World, "check", recorded)
    subjects = [
        subject
        for subject in _subjects(job, {name: CONFIGS[name] for name in STEPPED}, lambda one: (one,))
        if subject.layout.moe_dense_tp_size in (None, 1, 2)
    ]
    for _, finding in prove(subjects):
        assert finding is None, finding
    assert len({subject.build().seat.mesh.axes for subject in subjects}) > 1
    for subject in subjects:
        chain = subject.build().chain
        for machine in MACHINES.values():
            for plan in make_plan(chain, machine).regimes:
                for step in steps_of(plan):
                    assert step in ran, (subject.name, str(subject.layout), plan.regime.name, step)


def steps_of(plan: RegimePlan) -> Iterator[object]:
    """What happens from read to read, by the ranks that differ and the ranks that communicate."""
    mesh = plan.mesh

    def apart(axes: tuple[int, ...]) -> object:
        """The ranks that agree on some axes."""
        found: dict[object, list[int]] = {}
        for rank in range(mesh.size):
            found.setdefault(tuple(mesh.index(rank, (axis,)) for axis in axes), []).append(rank)
        return tuple(sorted(map(tuple, found.values())))

    def held(placement: Placement) -> object:
        return tuple(apart(placement.where(letter)) for letter in Letter)

    def moved(moves: tuple[Move, ...]) -> object:
        return tuple(
            (m.op, tuple(mesh.groups(m.axes)), held(m.before), held(m.after)) for m in moves
        )

    inner = {block: (plan.kinds[block], moved(moves)) for block, moves in plan.inner if moves}
    before: object = None
    wrote: dict[str, object] = {plan.embedding: held(plan.embedding_gives)}
    for read in plan.reads:
        carry = read.carry and moved(read.carry.route.moves)
        settles = [
            ([wrote[name] for name in s.producers], moved(s.route.moves)) for s in read.settles
        ]
        after = held(read.residual)
        yield plan.regime.equal, before, carry, repr(settles), after, read.selects_rows
        before = after
        wrote = {
            d.consumer: (
                moved(d.route.moves),
                held(d.needs),
                held(d.gives),
                inner.get(d.consumer),
            )
            for d in read.deliveries
        }
    yield plan.regime.equal, before, repr(list(wrote.values()))


@pytest.mark.parametrize(
    "layout", ["tp12,dp3,ep3", "tp3,dp3,dense1", "tp6,dp3,ep6,dplm", "tp6,dp3,ep3,dense2"]
)
def test_axes_of_three_hold(layout: str) -> None:
    config = SMALL["qwen3-moe-mixed"]
    stats, finding = prove_one(Subject.of("mixed", config, Parallelism.parse(layout)))
    assert finding is None, finding
    assert stats.steps > 0


@pytest.mark.parametrize(
    ("mutant", "level"), [("double-reduce", 2), ("sglang-23731", 2), ("norm-on-partial", 1)]
)
def test_a_mutant_ends_a_campaign(mutant: str, level: int) -> None:
    """tests/prove/test_mutants.py has them all."""
    report = prove_models(SMALL, 4, mutant)
    assert report.finding is not None
    assert report.finding.level == level


def test_the_historical_double_reduce_is_counted_twice_where_rows_are_reduce_scattered() -> None:
    config = CONFIGS["qwen3-30b-a3b"]
    subject = Subject.of("qwen3-30b-a3b", config, Parallelism.parse("tp2,dp2,ep2"))
    _, finding = prove_one(subject, "double-reduce")
    assert finding is not None
    assert finding.block == "model.layers.1.input_layernorm"
    assert (finding.rank, finding.row) == (0, 0)
    columns = 2 * config["moe_intermediate_size"]  # the proof gives a token two experts
    assert finding.counts["model.layers.0.mlp.experts"] == (2 * columns, columns)
    assert finding.counts["model.layers.0.self_attn.o_proj"] == (4096, 4096)


def test_a_missing_reduce_is_counted_in_the_rank_s_own_columns() -> None:
    subject = Subject.of("30b", CONFIGS["qwen3-30b-a3b"], Parallelism.parse("tp4"))
    _, finding = prove_one(subject, "missing-reduce")
    assert finding is not None
    assert finding.counts["model.embed_tokens"] == (1, 1)
    assert finding.counts["model.layers.0.self_attn.o_proj"] == (4096 // 4, 4096)


def test_a_mutant_of_rows_that_cancels_on_two_ranks_is_seen_on_three() -> None:
    subject = Subject.of("mixed", SMALL["qwen3-moe-mixed"], Parallelism.parse("tp3,dp3,ep3"))
    _, finding = prove_one(subject, "ragged-offsets")
    assert finding is not None
    assert finding.message == "not the row it should be"


def test_diverging_schedules_are_named_instead_of_waited_for() -> None:
    subject = Subject.of("30b", CONFIGS["qwen3-30b-a3b"], Parallelism.parse("tp2,dp2"))
    _, finding = prove_one(subject, "rank-decides")
    assert finding is not None
    assert "differ: " in finding.message
    assert "all_to_all" in finding.message


def test_a_fused_sum_must_leave_the_residual_that_it_leaves_where_it_is_declined() -> None:
    def in_stream(stream: ResidualStream) -> None:
        fused = stream._fused

        def forgetful(move: Move, addend: Tensor, total: Tensor, norm: Norm) -> Any:
            after, normed = fused(move, addend, total, norm)
            return total if cast(SimComm, stream.comm).fuses else after, normed

        stream._fused = forgetful  # type: ignore[method-assign]

    mutant = replace(find_mutant("summed-before-fused-sum"), in_stream=in_stream)
    finding = levels(mutant).finding
    assert finding is not None
    assert "where it is made" in finding.message


def test_equal_plans_are_proven_once_and_said_so() -> None:
    config, layout = CONFIGS["qwen3-30b-a3b"], Parallelism.parse("tp2,ep2")
    once, _ = prove_one(Subject.of("a", config, layout))
    twice = Stats()
    for part, finding in prove(Subject.of(name, config, layout) for name in "ab"):
        assert finding is None
        twice.add(part)
    assert once.steps > 0
    assert twice.steps == once.steps
    assert twice.proven_as_equal == once.proven_as_equal + once.regimes


def owns_the_first(block: Block, seat: Seat) -> None:
    if isinstance(block, SparseMoe):
        own = block.ownership
        block.ownership = Ownership(own.location, 0, own.stop - own.first)
        block.experts.held = block.ownership.held


def holds_whole_width(block: Block, seat: Seat) -> None:
    if isinstance(block, SparseMoe):
        block.experts.width = (0, block.experts.intermediate_size)


def embeds_over_all_ranks(block: Block, seat: Seat) -> None:
    if isinstance(block, Embedding):
        block.lookup.part = vocabulary_part(seat, seat.mesh.all, "embedding", PROOF_VOCAB)


def shifts_the_head(block: Block, seat: Seat) -> None:
    if isinstance(block, LmHead):
        (part,) = block.project.parts
        block.project.parts = (replace(part, start=part.start + 1, stop=part.stop + 1),)


def counts_copies(block: Block, seat: Seat) -> None:
    for leaf in block.leaves():
        if isinstance(leaf, WideNormCore):
            leaf.copies = 1


def keeps_the_bias(block: Block, seat: Seat) -> None:
    if isinstance(block, Attention) and block.output.has_bias:
        block.output.bias_here = True


SHARES = [
    (owns_the_first, "qwen3-30b-a3b", "tp4,dp2,ep2", "the columns of the experts"),
    (holds_whole_width, "qwen3-30b-a3b", "tp2", "the columns of the experts"),
    (embeds_over_all_ranks, "qwen3-30b-a3b", "tp4,dp2", "rank 2 holds another part"),
    (shifts_the_head, "qwen3-30b-a3b", "tp2", "the vocabulary on all ranks"),
    (counts_copies, "minimax-m2", "tp16", "the heads behind"),
    (keeps_the_bias, "gpt-oss-20b", "tp2", "is not added once"),
]


@pytest.mark.parametrize(
    ("spoil", "model", "layout", "said"), SHARES, ids=[one[0].__name__ for one in SHARES]
)
def test_a_model_that_shards_otherwise_is_not_taken_for_one_that_is_proven(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Block, Seat], None],
    model: str,
    layout: str,
    said: str,
) -> None:
    """Its plans are those of the right one, which came first; what its ranks hold is not."""
    right = Subject.of("right", CONFIGS[model], Parallelism.parse(layout))
    build_right = subject_build

    def wrong(*args: Any) -> CausalLM:
        found = build_right(*args)
        for block in found.blocks():
            spoil(block, found.seat)
        return found

    def subjects() -> Iterator[Subject]:
        yield right
        monkeypatch.setattr("isomoe.prove.subject.build", wrong)
        yield replace(right, name="wrong")

    found = [finding for _, finding in prove(subjects()) if finding is not None]
    assert found[0].model == "wrong"
    assert said in found[0].message
    assert ", , " not in str(found[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0, not a count"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0, not a count"),
        ({"num_attention_heads": None}, "'num_attention_heads' is None, not a count"),
        ({"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0, not a count"),
        ({"num_experts_per_tok": 999}, "999 experts a token of 128"),
    ],
)
def test_a_model_that_fits_no_layout_is_refused_and_not_vacuously_proven(
    command: Command, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIGS["qwen3-30b-a3b"], **change}))
    code, report, errors = command("--max-ranks", "2", "--model-path", str(file))
    assert (code, report) == (2, None)
    assert said in errors


def test_a_model_without_routed_experts_has_one_path() -> None:
    config = CONFIGS["qwen3-moe-mixed"]
    dense = {"dense": config | {"mlp_only_layers": list(range(config["num_hidden_layers"]))}}
    plain, every = (prove_models(dense, 4, all_paths=asked) for asked in (False, True))
    assert plain.finding is every.finding is None
    assert plain.stats.layouts == every.stats.layouts > 10


def test_in_more_than_one_process_the_counts_are_the_same() -> None:
    one = prove_models(SMALL, 4, processes=1)
    two = prove_models(SMALL, 4, processes=2)
    assert one.finding is None
    assert one.stats.layouts > 10
    assert one.stats == two.stats


def test_the_command_ends_with_zero_when_it_holds_and_one_when_it_does_not(
    command: Command,
) -> None:
    code, report, _ = command("--max-ranks", "2")
    assert (code, report["holds"], report["violation"]) == (0, True, None)
    code, report, _ = command("--max-ranks", "2", "--mutant", "double-reduce")
    assert (code, report["holds"]) == (1, False)
    assert report["violation"]["layout"] == "tp2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mutant", "no-such"), "mutant 'no-such': known are double-reduce"),
        (("--mutant", "double-reduce-shared"), "no block of arith-moe has the part"),
        (("--max-ranks", "0"), "--max-ranks 0: must be from 1"),
        (("--all-models", "--model-path", "x"), "exclude one another"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two(
    command: Command, words: tuple[str, ...], said: str
) -> None:
    code, report, errors = command(*words)
    assert (code, report) == (2, None)
    assert said in errors
    assert errors.count("\n") == 1


def test_mutants_are_listed(command: Command) -> None:
    code, listed, _ = command("--list-mutants")
    assert code == 0
    assert [entry["name"] for entry in listed] == [mutant.name for mutant in MUTANTS]
