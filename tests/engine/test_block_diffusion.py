"""Block diffusion through the engine, against the published loops written out."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from families import llada2, sdar_moe
from families.case import Oracle
from families.reference_block_diffusion import (
    Rule,
    decode,
    sdar_sequential,
    sdar_static,
    sglang_low_confidence,
)
from families.reference_block_diffusion import (
    llada2 as llada2_rule,
)
from isomoe.config import Device, EngineConfig
from isomoe.engine import LLM, SamplingParams, model_info
from isomoe.engine.diffusion import BlockDiffusing
from isomoe.engine.generation import NOTHING
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.outputs import FinishReason
from isomoe.engine.step import Request
from isomoe.errors import ConfigError, RequestError

BLOCK, MASK = sdar_moe.BLOCK, sdar_moe.MASK_ID
PAGE = 2 * BLOCK
PROMPTS = [
    list(range(10, 10 + 2 * BLOCK)),  # whole blocks
    list(range(20, 21 + BLOCK)),  # one token over
    [7] * (2 * BLOCK - 1),  # one token short
    [9, MASK, MASK, 12, MASK],  # the mask token, literally
    [3],
]
NEW = 2 * BLOCK + 1
RULES = [
    pytest.param({}, sglang_low_confidence(0.95), id="default"),
    pytest.param({"confidence_threshold": 0.02}, sglang_low_confidence(0.02), id="low threshold"),
    pytest.param(
        {"denoising_strategy": "dynamic", "denoising_steps": 2, "confidence_threshold": 0.02},
        llada2_rule(BLOCK, 2, 0.02),
        id="dynamic",
    ),
    pytest.param(
        {"denoising_strategy": "static", "denoising_steps": 3}, sdar_static(BLOCK, 3), id="static"
    ),
    pytest.param(
        {"denoising_strategy": "sequential", "denoising_steps": 2},
        sdar_sequential(BLOCK, 2),
        id="sequential",
    ),
]


def llm(folder: Path, **options: object) -> LLM:
    sizes = {"page_size": PAGE, "chunked_prefill_size": BLOCK, "max_total_tokens": 512}
    return LLM(str(folder), device="cpu", dtype="float32", **(sizes | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    folder = tmp_path_factory.mktemp("sdar")
    return folder, sdar_moe.CASES[0].save(folder)


@pytest.fixture(scope="module")
def shared(sdar: tuple[Path, Oracle]) -> Iterator[LLM]:
    with llm(sdar[0]) as engine:
        yield engine


@pytest.fixture
def engine(shared: LLM) -> LLM:
    """One that remembers nothing."""
    assert shared.core.scheduler.flush_cache()
    return shared


def check(
    engine: LLM,
    oracle: Oracle,
    asked: dict[str, object],
    rule: Rule,
    are_cached: bool = False,
) -> None:
    params = SamplingParams(
        max_tokens=NEW,
        temperature=0.0,
        ignore_eos=True,
        logprobs=2,
        **asked,  # type: ignore[arg-type]
    )
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        expected = decode(oracle, prompt, rule, block=BLOCK, mask_id=MASK, new_tokens=NEW)
        assert list(output.token_ids) == expected.ids
        assert output.finish_reason is FinishReason.LENGTH
        assert output.cached_tokens == (len(prompt) // PAGE * PAGE if are_cached else 0)
        assert [token.logprob for token in output.logprobs or ()] == [
            pytest.approx(logprob, abs=1e-3) for logprob in expected.logprobs
        ]


@pytest.mark.parametrize(("asked", "rule"), RULES)
def test_a_schedule_fixes_what_the_published_loop_fixes(
    engine: LLM, sdar: tuple[Path, Oracle], asked: dict[str, object], rule: Rule
) -> None:
    """Requests of one batch are in prefill, at different steps and in other blocks."""
    _, oracle = sdar
    check(engine, oracle, asked, rule)
    check(engine, oracle, asked, rule, are_cached=True)  # whole pages of whole blocks


@pytest.mark.parametrize(
    "layout",
    [
        {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2},
        pytest.param({"tp_size": 4, "ep_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_real_ranks_fix_the_same(sdar: tuple[Path, Oracle], layout: dict[str, int]) -> None:
    folder, oracle = sdar
    with llm(folder, **layout) as engine:
        check(engine, oracle, {"confidence_threshold": 0.02}, sglang_low_confidence(0.02))


def test_requests_that_were_retracted_begin_their_block_again(sdar: tuple[Path, Oracle]) -> None:
    folder, oracle = sdar
    with llm(folder, max_total_tokens=4 * PAGE) as engine:
        scheduler = engine.core.scheduler
        scheduler.limits = replace(scheduler.limits, headroom_tokens=0)
        check(engine, oracle, {}, sglang_low_confidence(0.95))
        assert scheduler.num_retracted


def test_an_end_token_in_mid_block_ends_the_answer_there(
    engine: LLM, sdar: tuple[Path, Oracle]
) -> None:
    _, oracle = sdar
    rule = sglang_low_confidence(0.95)
    whole = decode(oracle, PROMPTS[0], rule, block=BLOCK, mask_id=MASK, new_tokens=NEW)
    place, stop = next(
        (place, token)
        for place, token in enumerate(whole.ids)
        if place % BLOCK in range(1, BLOCK - 1) and token not in whole.ids[:place]
    )
    params = SamplingParams(
        max_tokens=NEW, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,)
    )
    (output,) = engine.generate(PROMPTS[:1], params)
    assert list(output.token_ids) == [*whole.ids[:place], stop]
    assert output.finish_reason is FinishReason.STOP


def test_sampled_answers_repeat_with_their_seed(engine: LLM) -> None:
    found = [
        [
            output.token_ids
            for output in engine.generate(
                PROMPTS, SamplingParams(max_tokens=NEW, temperature=1.0, seed=seed)
            )
        ]
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": ((5, 1.0),)}, "logit_bias"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"json_schema": '{"type": "object"}'}, "json_schema"),
        ({"regex": "a+"}, "regex"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"denoising_steps": BLOCK + 1}, "denoising_steps"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    engine: LLM, asked: dict[str, object], named: str
) -> None:
    with pytest.raises(RequestError, match=f"^{named}"):
        engine.generate(PROMPTS[:1], SamplingParams(**asked))  # type: ignore[arg-type]


def test_a_gpu_is_refused(sdar: tuple[Path, Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_info, "_lacks_for_cuda", lambda: None)
    with pytest.raises(ConfigError, match="do not run on GPUs yet; --device cpu works"):
        ModelInfo.of(EngineConfig(model_path=str(sdar[0]), device=Device.CUDA))


def test_a_checkpoint_s_default_that_it_cannot_do_is_left_out_with_a_line(
    sdar: tuple[Path, Oracle], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(sdar[0], tmp_path, dirs_exist_ok=True)
    defaults = {"repetition_penalty": 1.1, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    with caplog.at_level(logging.WARNING):
        info = ModelInfo.of(EngineConfig(model_path=str(tmp_path), device=Device.CPU))
    assert info.sampling_defaults == {"top_k": 20}
    (said,) = caplog.messages
    assert "repetition_penalty 1.1 is left out" in said


def test_a_model_that_appends_tokens_has_no_schedule(tmp_path: Path) -> None:
    from families import mixtral

    mixtral.CASES[0].save(tmp_path)
    with LLM(str(tmp_path), device="cpu") as engine, pytest.raises(RequestError, match="denois"):
        engine.generate([[1, 2]], SamplingParams(denoising_strategy="static"))  # type: ignore[arg-type]


def test_pages_hold_whole_blocks(tmp_path: Path) -> None:
    llada2.CASES[0].save(tmp_path)
    with pytest.raises(ConfigError, match="page-size"):
        llm(tmp_path, page_size=12, chunked_prefill_size=8)


def test_an_answer_to_a_step_before_it_was_retracted_is_left_out() -> None:
    """A scheduler may be ahead of what it was told by a step."""
    request = Request(
        request_id=0,
        prompt_token_ids=(3,),
        params=SamplingParams(max_tokens=NEW),
        max_tokens=NEW,
        stop_ids=frozenset(),
    )
    text = BlockDiffusing(request, BLOCK)
    text.rows(BLOCK, BLOCK)
    text.rewind()
    assert text.take([5] * BLOCK, []) == NOTHING
    assert text.tokens == [3]
    text.rows(BLOCK, BLOCK)
    assert text.take([6] * BLOCK, []).token_ids == (6,) * (BLOCK - 1)
