"""The proof holds for what we ship, fails for every known defect, and says what it found.

A guard is worth what it catches: the list of mutants is the product's own, so a new one is tested
unasked.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isomoe.blocks import SparseMoe
from isomoe.cli.main import main
from isomoe.layout import Parallelism
from isomoe.models.qwen3_moe import Qwen3Moe
from isomoe.prove import MUTANTS, Mutant, find_mutant, known_configs, prove_models
from isomoe.prove.runner import Subject, prove

CONFIGS = known_configs()
SMALL = {"qwen3-moe-mixed": CONFIGS["qwen3-moe-mixed"]}


Command = Callable[..., tuple[int, Any, str]]


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
    assert report.stats.layouts > 50
    assert report.stats.moves > 1000
    assert report.stats.contributions > 100_000


@pytest.mark.parametrize(
    "layout", ["tp12,dp3,ep3", "tp3,dp3,dense1", "tp6,dp3,ep6,dplm", "tp6,dp3,ep3,dense2"]
)
def test_axes_of_three_hold(layout: str) -> None:
    config = SMALL["qwen3-moe-mixed"]
    stats, finding = prove(Subject.of("mixed", config, Parallelism.parse(layout)))
    assert finding is None, finding
    assert stats.steps > 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant: Mutant) -> None:
    report = prove_models(CONFIGS, 8, mutant.name)
    assert report.finding is not None, f"{mutant.name} was not caught"
    assert report.finding.level == (1 if mutant.code == "M10" else 2)


def test_the_historical_double_reduce_is_counted_twice_where_rows_are_reduce_scattered() -> None:
    config = CONFIGS["qwen3-30b-a3b"]
    subject = Subject.of("qwen3-30b-a3b", config, Parallelism.parse("tp2,dp2,ep2"))
    _, finding = prove(subject, find_mutant("double-reduce"))
    assert finding is not None
    assert finding.block == "model.layers.1.input_layernorm"
    assert (finding.rank, finding.row) == (0, 0)
    columns = config["num_experts_per_tok"] * config["moe_intermediate_size"]
    assert finding.counts["model.layers.0.mlp.experts"] == (2 * columns, columns)
    assert finding.counts["model.layers.0.self_attn.o_proj"] == (4096, 4096)


def test_a_missing_reduce_is_counted_in_the_rank_s_own_columns() -> None:
    subject = Subject.of("30b", CONFIGS["qwen3-30b-a3b"], Parallelism.parse("tp4"))
    _, finding = prove(subject, find_mutant("missing-reduce"))
    assert finding is not None
    assert finding.counts["model.embed_tokens"] == (1, 1)
    assert finding.counts["model.layers.0.self_attn.o_proj"] == (4096 // 4, 4096)


def test_a_mutant_of_rows_that_cancels_on_two_ranks_is_seen_on_three() -> None:
    subject = Subject.of("mixed", SMALL["qwen3-moe-mixed"], Parallelism.parse("tp3,dp3,ep3"))
    _, finding = prove(subject, find_mutant("ragged-offsets"))
    assert finding is not None
    assert finding.message == "not the row it should be"


def test_diverging_schedules_are_named_instead_of_waited_for() -> None:
    subject = Subject.of("30b", CONFIGS["qwen3-30b-a3b"], Parallelism.parse("tp2,dp2"))
    _, finding = prove(subject, find_mutant("rank-decides"))
    assert finding is not None
    assert "differ: " in finding.message
    assert "all_to_all" in finding.message


def test_equal_plans_are_proven_once_and_said_so() -> None:
    config = CONFIGS["qwen3-30b-a3b"]
    proven: set[object] = set()
    first, _ = prove(Subject.of("a", config, Parallelism.parse("tp2,ep2")), None, proven)
    again, _ = prove(Subject.of("b", config, Parallelism.parse("tp2,ep2")), None, proven)
    assert first.steps > 0
    assert (again.steps, again.proven_as_equal) == (0, again.regimes)


def test_a_model_that_shards_otherwise_is_not_taken_for_one_that_is_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CONFIGS["qwen3-30b-a3b"]
    layout = Parallelism.parse("tp2")
    proven: set[object] = set()
    prove(Subject.of("right", config, layout), None, proven)
    experts = Qwen3Moe.experts

    def unsharded(self: Qwen3Moe, at: str) -> SparseMoe:
        block = experts(self, at)
        block.experts.width = (0, block.experts.intermediate_size)
        return block

    monkeypatch.setattr(Qwen3Moe, "experts", unsharded)
    _, finding = prove(Subject.of("wrong", config, layout), None, proven)
    assert finding is not None
    assert finding.counts["model.layers.0.mlp.experts"] == (12288, 6144)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0, not a count"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0, not a count"),
        ({"num_attention_heads": None}, "'num_attention_heads' is None, not a count"),
        ({"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0, not a count"),
        ({"num_experts_per_tok": 999}, "999 experts a token of 128"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints"),
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


def test_in_more_than_one_process_the_counts_are_the_same() -> None:
    one = prove_models(SMALL, 6, processes=1)
    two = prove_models(SMALL, 6, processes=2)
    assert one.finding is None
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
