"""The bisection on the real engine: it names planted defects, and nothing on clean layouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest

from isomoe.config import Device, DType, EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError, PlacementError
from isomoe.parity.bisect import Bisection, Defect, Kind, Side, bisect, side_of
from isomoe.parity.bisect.passes import Pass
from isomoe.parity.probe import Scale
from isomoe.parity.targets.base import Progress, TargetError
from isomoe.prove import MUTANTS
from isomoe.prove.miniature import checkpoint
from isomoe.prove.mutants import Mutant, find_mutant

LENGTHS = (74, 60, 48, 76)
SLOW = [
    mutant
    for mutant in MUTANTS
    if mutant.runs_in_engine and mutant.name not in ("double-reduce", "missing-reduce-attention")
]
ENDS = {
    "norm-on-partial": (PlacementError, "a norm and what follows it may not run on a partial sum"),
    "gather-from-other-group": (TargetError, r"rank \d .* raised PlacementError"),
    "gather-of-full-rows": (TargetError, r"rank \d .* raised PlacementError"),
    "hidden-counts-for-logits": (TargetError, r"rank \d .* raised RuntimeError: Split sizes"),
}
"""Those that do not begin, or do not end, and what they say."""


@contextmanager
def quiet(what: str) -> Iterator[Progress | None]:
    yield None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def config_of(model: str, folder: Path, dtype: DType) -> tuple[EngineConfig, ModelInfo]:
    path = checkpoint(model, folder / model)
    config = EngineConfig(model_path=str(path), device=Device.CPU, dtype=dtype)
    return config, ModelInfo.of(config)


@cache
def baseline(model: str, folder: Path, dtype: DType) -> Side:
    """One rank; it remembers what it saw."""
    return side_of("tp1", *config_of(model, folder, dtype), quiet)


def run(model: str, folder: Path, dtype: DType, other: str) -> Bisection:
    config, info = config_of(model, folder, dtype)
    random = Random(3)
    prompts = [tuple(random.randrange(1, info.vocab_size) for _ in range(n)) for n in LENGTHS]
    return bisect(baseline(model, folder, dtype), side_of(other, config, info, quiet), prompts)


def named(mutant: Mutant, folder: Path, dtype: DType) -> Bisection:
    return run(mutant.model, folder, dtype, f"{mutant.layout}+{mutant.name}")


def test_a_double_reduce_is_named_with_its_block_and_ratio(folder: Path) -> None:
    culprit = named(find_mutant("double-reduce"), folder, DType.BFLOAT16).culprit
    assert culprit is not None
    assert (culprit.kind, culprit.layer, culprit.block_kind) == (Kind.BLOCK, 0, "experts")
    assert (culprit.guess, culprit.rows) == (Defect.DOUBLE_REDUCE, "all")
    assert culprit.ratio == pytest.approx(2.0, abs=0.05)
    assert "summed again over 2 ranks" in culprit.sentence


def test_a_missing_reduce_is_named_where_it_is_missed(folder: Path) -> None:
    found = run("arith-moe", folder, DType.BFLOAT16, "tp2+missing-reduce-attention")
    culprit = found.culprit
    assert culprit is not None
    assert (culprit.kind, culprit.layer, culprit.block_kind) == (Kind.READ, 0, "attention")
    assert (culprit.guess, culprit.placement) == (Defect.MISSING_REDUCE, "P -> R")


def test_a_layer_that_is_one_percent_off_is_named_in_bf16(folder: Path) -> None:
    config, info = config_of("arith-moe", folder, DType.BFLOAT16)
    probe = Scale(block="model.layers.2.mlp.experts", factor=1.01)
    scaled = side_of("tp1", replace(config, instrument=probe.path), info, quiet)
    prompts = [tuple(range(start, start + 60)) for start in (20, 100, 180, 260)]
    culprit = bisect(baseline("arith-moe", folder, DType.BFLOAT16), scaled, prompts).culprit
    assert culprit is not None
    assert (culprit.block, culprit.guess) == (probe.block, Defect.BIAS_OR_SCALE)
    assert culprit.ratio == pytest.approx(1.01, abs=0.003)


def test_clean_layouts_and_transformers_leave_no_culprit(folder: Path) -> None:
    for other in ("tp1", "tp2,dp2,ep2", "hf:"):
        found = run("arith-moe", folder, DType.BFLOAT16, other)
        assert found.culprit is None, found.sentence
        assert found.batches is Pass.TOGETHER
        assert len(found.curve) == 9
        assert all(point.rows == sum(LENGTHS) for point in found.curve[:-1])


def test_a_defect_is_named_against_transformers_too(folder: Path) -> None:
    config, info = config_of("arith-moe", folder, DType.BFLOAT16)
    probe = Scale(block="model.layers.2.self_attn", factor=2.0)
    scaled = side_of("tp1", replace(config, instrument=probe.path), info, quiet)
    prompts = [tuple(range(start, start + 60)) for start in (20, 100, 180, 260)]
    hf = side_of("hf:", config, info, quiet)
    culprit = bisect(hf, scaled, prompts).culprit
    assert culprit is not None
    assert (culprit.block, culprit.guess) == (probe.block, Defect.BIAS_OR_SCALE)
    reverse = bisect(scaled, hf, prompts).culprit
    assert reverse is not None
    assert reverse.layer == 2
    assert reverse.ratio == pytest.approx(0.5, abs=0.05)


def test_two_transformers_models_or_no_prompt_are_refused(folder: Path) -> None:
    config, info = config_of("arith-moe", folder, DType.BFLOAT16)
    hf, tp1 = side_of("hf:", config, info, quiet), side_of("tp1", config, info, quiet)
    with pytest.raises(ConfigError, match="one of them must be a layout"):
        bisect(hf, hf, [(1, 2, 3)])
    with pytest.raises(ConfigError, match="no prompt"):
        bisect(tp1, tp1, [()])
    with pytest.raises(ConfigError, match="name of a defect is missing"):
        side_of("tp2+", config, info, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT32])
@pytest.mark.parametrize("mutant", SLOW, ids=[mutant.name for mutant in SLOW])
def test_the_block_of_every_defect_that_runs_is_named(
    mutant: Mutant, dtype: DType, folder: Path
) -> None:
    if mutant.name in ENDS:
        error, says = ENDS[mutant.name]
        with pytest.raises(error, match=says):
            named(mutant, folder, dtype)
        return
    culprit = named(mutant, folder, dtype).culprit
    assert culprit is not None
    assert mutant.block in culprit.block_kind.split(" + "), culprit.sentence


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT32])
@pytest.mark.parametrize("layout", ["tp2", "tp2,ep2", "tp4,dp2,ep2", "tp4,dp4", "tp4,dp2,ep4"])
def test_clean_layouts_of_four_ranks_leave_no_culprit(
    layout: str, dtype: DType, folder: Path
) -> None:
    found = run("arith-moe", folder, dtype, layout)
    assert found.culprit is None, found.sentence
