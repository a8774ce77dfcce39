"""The corpus of historic defects is complete: each row with its mutant or the reason why not.

What is said to be refused when somebody writes it is written here.
"""

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import test_architecture as architecture
from isomoe.comm import SimWorld
from isomoe.errors import ConfigError, IsomoeError, PlacementError
from isomoe.layout import (
    MACHINES,
    BlockSpec,
    Chain,
    Letter,
    Mesh,
    Move,
    Op,
    Parallelism,
    Placement,
    ReadSpec,
    Rows,
    TokenRows,
    Variant,
    cheapest,
    make_plan,
)
from isomoe.models import build
from isomoe.prove import MUTANTS, find_mutant
from isomoe.prove.corpus import Fate, Level, defect_of, defects, ids_of, operators, refusals
from isomoe.prove.miniature import miniature
from isomoe.prove.mutants import Mutant
from isomoe.prove.provenance import Tickets
from isomoe.prove.shares import faults_of
from isomoe.stream import ResidualStream
from prove import page

NAMES = {mutant.name for mutant in MUTANTS}
MESH = Mesh.of(Parallelism.parse("tp4,dp2,ep2"))


def test_all_107_rows_are_there_once() -> None:
    assert [defect.row for defect in defects()] == list(range(1, 108))
    ids = [name for defect in defects() for name in defect.ids]
    assert len(set(ids)) == len(ids)
    assert not set(ids) & NAMES


def test_each_row_is_planted_or_has_a_reason() -> None:
    for defect in defects():
        assert bool(defect.mutants) != bool(defect.reason), defect
        assert set(defect.mutants) <= NAMES, defect
        assert set(defect.operators) <= set(operators()), defect
        if defect.refusal is not None:
            assert defect.refusal in refusals(), defect


def test_most_rows_are_planted() -> None:
    fates = [defect.fate for defect in defects()]
    counts = {fate: fates.count(fate) for fate in Fate}
    assert counts == {Fate.PLANTED: 89, Fate.EXCLUDED: 4, Fate.OUT_OF_SCOPE: 14}


def test_a_planted_row_has_a_mutant_of_its_operator() -> None:
    for defect in defects():
        codes = {find_mutant(name).code for name in defect.mutants}
        assert not codes or codes & set(defect.operators), defect


def test_operators_are_those_of_the_corpus_and_say_who_sees_them() -> None:
    assert list(operators()) == [f"M{number:02}" for number in range(1, 30)]
    for code, operator in operators().items():
        assert operator.levels or code == "M28"
        if Level.STATIC in operator.levels and code != "M29":
            assert operator.refusals, f"{code}: nothing shows that it is refused"
    assert {mutant.code for mutant in MUTANTS} == set(operators()) - {"M28", "M29"}


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("sglang-23731", "double-reduce"),
        ("sglang-23729", "double-reduce"),
        ("sglang-24785", "double-reduce-dense-ragged"),
        ("vllm-49122", "double-reduce-shared"),
        ("paddle-35186", "bias-on-every-rank"),
    ],
)
def test_a_historic_id_names_the_mutant_that_plants_it(name: str, mutant: str) -> None:
    assert find_mutant(name).name == mutant
    defect = defect_of(name)
    assert defect is not None
    assert defect.ids[0] in ids_of(mutant)


def test_an_id_that_is_not_planted_says_why() -> None:
    with pytest.raises(ConfigError, match=r"'torchtitan-4332': not planted: training"):
        find_mutant("torchtitan-4332")


def chain(needs: str = "RR", gives: str = "PP", last: str = "RR") -> Chain:
    """An embedding, one block, and an lm_head."""
    placement = Placement
    head = BlockSpec(
        name="head", kind="lm_head", variants=(Variant(placement("RR"), placement(last)),)
    )
    block = BlockSpec(
        name="mlp", kind="experts", variants=(Variant(placement(needs), placement(gives)),)
    )
    return Chain(
        mesh=MESH,
        embedding=BlockSpec(
            name="embed", kind="embedding", variants=(Variant(None, placement("SP")),)
        ),
        reads=(
            ReadSpec(name="norm", consumers=(block,)),
            ReadSpec(name="last", consumers=(head,), selects_rows=True),
        ),
        hidden_size=8,
    )


def move(op: Op, axes: tuple[int, ...], before: str, letter: Letter) -> Move:
    return Move(op, axes, Placement(before), Placement(before).put(letter, axes))


def stream_with(mutated: Callable[[ResidualStream], None]) -> None:
    """Runs `mutated` on the stream of each rank, whose embedding has two rows a group."""
    import torch

    plan = make_plan(chain(), MACHINES["cpu"])
    rows = TokenRows.of(MESH, (2, 2))

    def rank_main(comm: Any) -> None:
        stream = ResidualStream(plan.regimes[plan.choose((2, 2))], comm, rows, torch.float32)
        stream.write("embed", torch.ones(2, 8))
        mutated(stream)

    SimWorld(MESH).run(rank_main)


def write_twice(stream: ResidualStream) -> None:
    import torch

    stream.write("embed", torch.ones(2, 8))


def write_own_rows(stream: ResidualStream) -> None:
    """What the experts gave for this rank's rows alone, where addends of all rows are due."""
    import torch

    class Same:
        def __call__(self, x: Any, /) -> Any:
            return x

        def after_adding(self, residual: Any, addend: Any) -> Any:
            return residual + addend, residual + addend

    stream.read(Same(), "norm")
    stream.write("mlp", torch.ones(2, 8))


def no_axes() -> None:
    import torch

    SimWorld(MESH).run(lambda comm: comm.broadcast(torch.ones(1)))  # type: ignore[call-arg]


def shares_of(mutant: str) -> None:
    """The shares of the block that a mutant changes, held against each other."""
    planted = find_mutant(mutant)
    layout = Parallelism.parse(planted.layout)
    models = [build(miniature(planted.model), layout, rank) for rank in range(layout.tp_size)]
    for model in models:
        planted.in_model(model)
    for blocks in zip(*(model.blocks() for model in models), strict=True):
        if blocks[0].spec.kind == planted.block:
            fault = faults_of(models[0].seat.mesh, list(blocks), Tickets())
            if fault is not None:
                raise PlacementError(fault)


def model_file(line: str, check: Callable[[], None]) -> None:
    """Adds a line to a model file, and asks the test of the architecture."""
    real = architecture.ROOT / "isomoe/models/mixtral.py"
    text = real.read_text()
    first = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    lines = text.splitlines()
    lines.insert(first.lineno - 1, line)

    class Changed(type(real)):  # type: ignore[misc]
        def read_text(self, *args: Any, **more: Any) -> str:
            return "\n".join(lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "FILES", [Changed(real)])
        check()


ATTEMPTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "second-reduction": (
        lambda: move(Op.ALL_REDUCE, (0, 1), "RR", Letter.R),
        PlacementError,
        "all_reduce over axes .* turns P to R; it cannot turn RR into RR",
    ),
    "contribution-written-twice": (
        lambda: stream_with(write_twice),
        PlacementError,
        "embed: wrote twice",
    ),
    "model-imports-comm": (
        lambda: model_file(
            "from isomoe.comm import Communicator",
            lambda: architecture.test_a_package_imports_only_what_lies_below_it("models"),
        ),
        AssertionError,
        "models/mixtral.py",
    ),
    "sum-over-copies": (
        lambda: move(Op.REDUCE_SCATTER, (1,), "SR", Letter.S),
        PlacementError,
        "turns P to S; it cannot turn SR into SS",
    ),
    "collective-without-axes": (no_axes, TypeError, "axes"),
    "scatter-without-sum": (
        lambda: move(Op.SLICE, (0, 1), "PP", Letter.S),
        PlacementError,
        "slice over axes .* turns R to S; it cannot turn PP into SS",
    ),
    "half-a-sum": (
        lambda: chain(needs=str(move(Op.ALL_REDUCE, (0,), "PP", Letter.R).after)),
        PlacementError,
        "mlp: needs RP, axis 1 is P",
    ),
    "sum-over-rows": (
        lambda: move(Op.ALL_REDUCE, (0,), "SR", Letter.R),
        PlacementError,
        "turns P to R; it cannot turn SR into RR",
    ),
    "copy-as-addend": (
        lambda: cheapest(Placement("RR"), Placement("PP"), lambda _: 1.0),
        PlacementError,
        "no move turns axis 0 from R into P",
    ),
    "share-counted-twice": (
        lambda: shares_of("replicated-shared-expert"),
        PlacementError,
        "are not the whole, once",
    ),
    "addend-of-own-rows": (
        lambda: stream_with(write_own_rows),
        PlacementError,
        "mlp: gives PP, 4 rows on rank 0, but wrote 2",
    ),
    "norm-on-addends": (
        lambda: chain(needs="PP"),
        PlacementError,
        "mlp: needs PP, axis 0 is P: a norm and what follows it may not run on a partial sum",
    ),
    "features-leave-a-block": (
        lambda: chain(gives="CC"),
        PlacementError,
        "mlp: gives CC, axis 0 is C: features may not leave a block",
    ),
    "row-map-of-wrong-length": (
        lambda: Rows(mesh=MESH, leaves=(1, 1)),
        PlacementError,
        "2 row counts for 4 ranks",
    ),
    "selected-row-of-another-group": (
        lambda: TokenRows.of(MESH, (2, 0)).select([(), (-1,)]),
        PlacementError,
        "row -1 of group 1 cannot be selected: it has 0 rows",
    ),
    "bias-counted-twice": (
        lambda: shares_of("bias-on-every-rank"),
        PlacementError,
        "is not added once",
    ),
    "model-branches-on-layout": (
        lambda: model_file(
            "REDUCES = lambda mesh: mesh.tp_size > 1",
            architecture.test_model_files_do_no_arithmetic_on_ranks_or_sizes_of_groups,
        ),
        AssertionError,
        "tp_size > 1",
    ),
    "sum-left-to-nobody": (
        lambda: chain(last="PR"),
        PlacementError,
        "head: gives PR, a partial sum nobody would settle",
    ),
    "gather-of-copies": (
        lambda: move(Op.ALL_GATHER, (1,), "SR", Letter.R),
        PlacementError,
        "turns S to R or C to R; it cannot turn SR into SR",
    ),
}


@pytest.mark.parametrize("name", refusals())
def test_an_attempt_to_write_it_is_refused(name: str) -> None:
    attempt, error, message = ATTEMPTS[name]
    with pytest.raises(error, match=message):
        attempt()


def test_every_attempt_is_named_and_what_is_right_is_not_refused() -> None:
    assert set(ATTEMPTS) == set(refusals())
    make_plan(chain(), MACHINES["cpu"])
    stream_with(lambda stream: None)
    model_file("RIGHT = 1", architecture.test_models_know_neither_the_planner_nor_a_rank)
    clean = replace(find_mutant("bias-on-every-rank"), in_model=lambda model: None)
    assert isinstance(clean, Mutant)
    assert issubclass(PlacementError, IsomoeError)


def test_the_page_is_what_the_data_gives() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(text) == text, "PYTHONPATH=tests python -m prove.page"


def test_the_data_ships_with_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"prove/*.json"' in text
