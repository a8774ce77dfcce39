"""Mutants are caught: by the proof on every family that has the part, and by numbers.

The list of mutants is the product's own, so a new one is tested unasked.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from isomoe.config import Device, DType, EngineConfig
from isomoe.engine import LLM, SamplingParams
from isomoe.errors import ConfigError, IsomoeError, PlacementError
from isomoe.layout import Parallelism
from isomoe.models import (
    FAMILIES,
    CausalLM,
    HFConfig,
    build,
    family_of,
    fits,
    known_configs,
    layouts,
)
from isomoe.parity.inject import injectable, instrument_of
from isomoe.prove import MUTANTS, expressible, find_mutant
from isomoe.prove.corpus import Level
from isomoe.prove.levels import levels
from isomoe.prove.miniature import checkpoint, miniature
from isomoe.prove.mutants import Mutant, Needs, When
from prove.mutant_steps import STEPS, Ranks, Seen, Step, parted, writers

MODELS = sorted({mutant.model for mutant in MUTANTS})
LATER = {"missing-reduce", "layout-from-shape"}
"""The proof stops at the first rank that sees anything, which need not be at the first read."""
QUICK = (
    "double-reduce",
    "double-reduce-dense-ragged",
    "double-reduce-equal",
    "missing-reduce-small-steps",
    "replicated-shared-expert",
    "sharded-shared-expert-on-own-rows",
    "norm-on-partial",
    "norm-of-own-heads",
    "norm-counts-copies",
    "layout-from-shape",
    "padding-leaks",
    "expert-bias-on-every-rank",
    "unweighted-expert-bias",
    "conditional-collective",
    "overwritten-input",
)

by_name = {"ids": lambda mutant: mutant.name}


@pytest.mark.parametrize("mutant", MUTANTS, **by_name)
def test_the_type_check_or_the_proof_sees_it_where_it_is_said_to_act(mutant: Mutant) -> None:
    found = levels(mutant)
    assert found.finding is not None
    assert found.type_check == (mutant.code == "M10")
    assert found.expected
    assert not found.blocks or mutant.block in found.blocks or mutant.name in LATER


def test_the_historical_double_reduce_is_blamed_on_the_experts() -> None:
    found = levels(find_mutant("sglang-23731"))
    assert (found.model, found.layout) == ("arith-moe", "tp2,dp2,ep2")
    assert found.proof
    assert found.blocks == {"experts"}
    assert found.expected == (Level.STATIC, Level.COUNT)


def test_a_model_without_the_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="qwen3_moe lacks a shared expert"):
        levels(find_mutant("double-reduce-shared"), miniature("arith-moe"))


@pytest.mark.parametrize("needs", Needs)
def test_each_part_is_found_in_some_family_and_the_shared_expert_not_in_all(needs: Needs) -> None:
    having = [
        name
        for name, config in known_configs().items()
        if any(needs.is_in(block) for block in build(config, Parallelism()).blocks())
    ]
    assert having
    assert (needs is Needs.NOTHING) == (len(having) == len(known_configs()))


@cache
def of_family(family: type[CausalLM]) -> HFConfig:
    """One config that ships."""
    return next(config for config in known_configs().values() if family_of(config) is family)


def seen_on(mutant: Mutant, config: HFConfig, tried: Iterator[Parallelism]) -> bool:
    return any(levels(mutant, config, layout).finding is not None for layout in tried)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_it_is_seen_in_every_family_that_has_the_part(family: type[CausalLM]) -> None:
    """On two axes of two, and on an axis of three, where factors of two cannot cancel."""
    config = of_family(family)
    threes = [p for p in layouts(family, config, 6, 3) if p.tp_size in (3, 6)]
    for mutant in MUTANTS:
        if not expressible(mutant.name, [config]):
            continue
        layout = Parallelism.parse(mutant.layout)
        if mutant.name == "norm-counts-copies":  # more ranks than the published KV heads
            layout, threes_here = Parallelism(tp_size=16), []
        else:
            threes_here = threes
        if fits(family, config, layout):
            assert levels(mutant, config, layout).finding is not None, (mutant.name, str(layout))
        if threes_here:
            assert seen_on(mutant, config, iter(threes_here)), (mutant.name, "an axis of three")


@pytest.mark.parametrize("model", ["glm-4.5-air", "gpt-oss-20b", "minimax-m2"])
def test_it_is_seen_in_published_shapes(model: str) -> None:
    config = known_configs()[model]
    for mutant in MUTANTS:
        layout = Parallelism.parse(mutant.layout)
        if mutant.name == "norm-counts-copies":  # more ranks than the published KV heads
            layout = Parallelism(tp_size=16)
        has_more = mutant.needs is not Needs.NOTHING or mutant.name in QUICK
        if has_more and expressible(mutant.name, [config]):
            assert fits(family_of(config), config, layout)
            assert levels(mutant, config, layout).finding is not None, mutant.name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each model on which a mutant is shown."""
    root = tmp_path_factory.mktemp("miniatures")
    return {model: checkpoint(model, root / model) for model in MODELS}


@cache
def clean(folder: Path, layout: Parallelism) -> tuple[CausalLM, dict[Step, Seen]]:
    ranks = Ranks(folder, layout)
    return ranks.models[0], {step: ranks.run(step) for step in STEPS}


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, marks=() if mutant.name in QUICK else pytest.mark.slow)
        for mutant in MUTANTS
    ],
    **by_name,
)
def test_numbers_part_first_behind_the_block_that_it_names(
    mutant: Mutant, folders: dict[str, Path]
) -> None:
    """With real weights, on simulated ranks, in the steps in which it is said to act."""
    folder, layout = folders[mutant.model], Parallelism.parse(mutant.layout)
    model, seen = clean(folder, layout)
    if mutant.code == "M10":
        with pytest.raises(PlacementError, match="a norm and what follows it"):
            Ranks(folder, layout, mutant)
        return
    ranks = Ranks(folder, layout, mutant)
    reads, ended = [], 0
    for step in STEPS:
        try:
            reads += parted(seen[step], ranks.run(step))
        except (IsomoeError, RuntimeError):
            ended += 1
    assert reads or ended
    if reads:
        assert mutant.block in writers(model, min(reads))


@pytest.mark.parametrize(
    ("name", "acts", "rests"),
    [
        ("double-reduce-equal", ((3,), (3,)), ((4,), (1,))),
        ("double-reduce-ragged", ((4,), (1,)), ((3,), (3,))),
        ("double-reduce-large-steps", ((9, 3), (12,)), ((3,), (3,))),
        ("missing-reduce-small-steps", ((3,), (3,)), ((9, 3), (12,))),
        ("layout-from-shape", ((6,), ()), ((4,), (1,))),
    ],
)
def test_a_mutant_of_some_steps_rests_in_the_others(
    name: str,
    acts: tuple[tuple[int, ...], ...],
    rests: tuple[tuple[int, ...], ...],
    folders: dict[str, Path],
) -> None:
    mutant = find_mutant(name)
    assert mutant.when is not When.ALWAYS
    folder, layout = folders[mutant.model], Parallelism.parse(mutant.layout)
    _, seen = clean(folder, layout)
    ranks = Ranks(folder, layout, mutant)
    for lengths, differs in ((acts, True), (rests, False)):
        step = next(step for step in STEPS if step.lengths == lengths)
        assert any(parted(seen[step], ranks.run(step))) == differs


def test_clean_ranks_do_not_part(folders: dict[str, Path]) -> None:
    layout = Parallelism.parse("tp2,dp2,ep2")
    _, seen = clean(folders["arith-moe"], layout)
    again = Ranks(folders["arith-moe"], layout)
    for step in STEPS:
        assert not list(parted(seen[step], again.run(step)))


def test_a_nan_is_seen(folders: dict[str, Path]) -> None:
    """In a row that is held; rows of other ranks are not looked at."""
    _, seen = clean(folders["arith-moe"], Parallelism.parse("tp2,dp2,ep2"))
    step = seen[STEPS[1]]
    for row, differs in ((0, True), (5, False)):  # of rank 0, of rank 1
        first = step.reads[0][0]
        values = first.values.clone()
        values[row, 0] = torch.nan
        reads = [[replace(first, values=values), *step.reads[0][1:]], *step.reads[1:]]
        assert bool(list(parted(step, replace(step, reads=reads)))) == differs


def scores(folder: Path, layout: str, instrument: str | None = None) -> list[float]:
    """The log-probabilities of a prompt's tokens, from the real engine."""
    config = EngineConfig(
        model_path=str(folder),
        parallelism=Parallelism.parse(layout),
        dtype=DType.FLOAT32,
        device=Device.CPU,
        max_total_tokens=1024,
        instrument=instrument,
    )
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
    with LLM.from_config(config) as llm:
        (output,) = llm.generate([[7 * place % 600 + 5 for place in range(20)]], params)
    return [token.logprob for token in output.prompt_logprobs or () if token is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["double-reduce", "attention-declared-replicated", "vllm-rbln-960", "torchtitan-4245"],
)
def test_the_engine_loads_and_runs_what_a_defective_one_would(
    name: str, folders: dict[str, Path]
) -> None:
    """In the stream, in the chain, in the model."""
    mutant = find_mutant(name)
    folder = folders[mutant.model]
    instrument = instrument_of(name, miniature(mutant.model))
    right, wrong = scores(folder, "tp1"), scores(folder, "tp2", instrument)
    assert len(right) == len(wrong) == 19
    assert max(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 0.01


@pytest.mark.parametrize("model", [model for model in MODELS if model != "arith-moe"])
def test_a_miniature_is_made_of_the_blocks_of_its_model(model: str) -> None:
    small, published = miniature(model), known_configs()[model]
    kinds = [
        {(type(block), block.spec.kind) for block in build(config, Parallelism()).blocks()}
        for config in (small, published)
    ]
    assert kinds[0] == kinds[1]


def test_the_engine_takes_all_but_those_that_wait_or_need_padding() -> None:
    refused = {mutant.name for mutant in MUTANTS} - set(injectable())
    assert refused == {
        "padding-leaks",
        "rank-decides",
        "idle-rank-returns",
        "conditional-collective",
        "fused-sum-declined-and-lost",  # nothing is fused over Gloo
        "fused-sum-without-consumer",
        "summed-before-fused-sum",
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("conditional-collective", "wait for one another for ever"),
        ("sglang-43547", "unknown"),
        ("vllm-43547", "wait for one another for ever"),
        ("megatron-lm-844", "not planted: training"),
        ("sglang-26016", "not planted: one row map gives all counts"),
        ("double-reduce-shared", "the model lacks a shared expert"),
    ],
)
def test_an_injection_that_cannot_be_says_why(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        instrument_of(name, miniature("arith-moe"))


def test_an_injection_by_historic_id_is_that_of_the_mutant() -> None:
    path = instrument_of("sglang-23731", miniature("arith-moe"))
    assert path == "isomoe.prove.mutants:double_reduce"
