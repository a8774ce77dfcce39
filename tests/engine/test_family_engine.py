"""Every family through the whole engine: chunks of prompts beside decodes, states, prefixes."""

import logging
from pathlib import Path

import pytest
import torch

from families import bailing_moe_linear, deepseek_v2, gpt_oss, llada2, minimax_m2
from families.answers import check_answers, family_cases, prompts
from families.case import Case
from isomoe.engine import LLM, SamplingParams


def llm(folder: Path, **options: object) -> LLM:
    sizes = {"page_size": 8, "chunked_prefill_size": 8, "max_total_tokens": 512}
    return LLM(str(folder), device="cpu", dtype="float32", **(sizes | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", family_cases(), ids=lambda case: case.name)
def test_a_family_answers_as_its_oracle_does(case: Case, tmp_path: Path) -> None:
    oracle = case.save(tmp_path)
    with llm(tmp_path) as engine:
        check_answers(engine, oracle, most=1e-3)


def test_two_ranks_with_states_answer_as_the_oracle_does(tmp_path: Path) -> None:
    oracle = bailing_moe_linear.CASES[0].save(tmp_path)
    with llm(tmp_path, tp_size=2, ep_size=2) as engine:
        check_answers(engine, oracle, most=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(bailing_moe_linear.CASES[0], id="states"),
        pytest.param(minimax_m2.CASES[0], id="a sum inside"),
        pytest.param(deepseek_v2.CASES[0], id="latents"),
        pytest.param(gpt_oss.CASES[0], id="expert biases"),
        pytest.param(llada2.CASES[0], id="blocks"),
    ],
)
def test_real_ranks_answer_as_the_oracle_does(case: Case, tmp_path: Path) -> None:
    oracle = case.save(tmp_path)
    with llm(tmp_path, tp_size=4, attn_dp_size=2, ep_size=2) as engine:
        check_answers(engine, oracle, most=1e-3)


@pytest.mark.parametrize(
    ("case", "cached"),
    [
        *((case, (0, 0, 0)) for case in bailing_moe_linear.CASES),
        (deepseek_v2.CASES[0], (0, 16, 8)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_known_prefix_is_computed_again_where_layers_have_states(
    case: Case, cached: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A state cannot be cut back to a prefix, and another request's is not ours; pages can."""
    oracle = case.save(tmp_path)
    prompt = prompts()[0]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
    with caplog.at_level(logging.INFO), llm(tmp_path) as engine:
        for text, found in zip((prompt, prompt, [*prompt[:12], 5, 6]), cached, strict=True):
            (output,) = engine.generate([text], params)
            assert output.cached_tokens == found
            expected = oracle(torch.tensor([*text, *output.token_ids[:-1]])).log_softmax(-1)
            for row, token in zip(expected[len(text) - 1 :], output.logprobs or (), strict=True):
                assert abs(float(row[token.token_id]) - token.logprob) < 1e-3
    assert ("no prefixes are cached" in caplog.text) == (not any(cached))
