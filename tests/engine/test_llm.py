"""`LLM` on one rank.

It gives what transformers gives: the same greedy tokens, the same log-probabilities of outputs and
prompts. A request's result does not depend on what else runs, nor on how its prompt is cut.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from isomoe.engine import LLM, FinishReason, RequestOutput, SamplingParams

PROMPTS: list[list[int]] = [[1, 2, 3], [5, 9, 5, 9] * 10, [7], [9, 10, 11, 12, 13]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=2)
TOLERANCE = 1e-4
"""Sums of fp32 in another order."""


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), device="cpu") as llm:
        yield llm


def same(one: Sequence[RequestOutput], other: Sequence[RequestOutput]) -> None:
    """Asserts equal tokens and equal logprobs of every kind."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.token_ids == b.token_ids
        assert a.finish_reason == b.finish_reason
        for left, right in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert (left is None) == (right is None)
            for x, y in zip(left or (), right or (), strict=True):
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    assert x.token_id == y.token_id
                    assert x.logprob == pytest.approx(y.logprob, abs=TOLERANCE)


def reference_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    llm: LLM, checkpoint: tuple[Path, Any]
) -> None:
    model = checkpoint[1]
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        inputs = torch.tensor([prompt])
        with torch.inference_mode():
            expected = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert list(output.token_ids) == expected[0, len(prompt) :].tolist()
        every = reference_logprobs(model, [*prompt, *output.token_ids])
        assert output.logprobs is not None
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert output.finish_reason == "length"
        found = [*output.prompt_logprobs[1:], *output.logprobs]
        assert len(found) == len(prompt) + GREEDY.max_tokens - 1
        for row, token, top in zip(
            every, found, [2] * (len(prompt) - 1) + [3] * GREEDY.max_tokens, strict=False
        ):
            assert token is not None
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
            values = row.topk(top).values.tolist()
            assert [value for _, value in token.top] == pytest.approx(values, abs=TOLERANCE)
            for one, value in token.top:
                assert value == pytest.approx(float(row[one]), abs=TOLERANCE)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(llm: LLM) -> None:
    alone = [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    same(alone, llm.generate(PROMPTS, GREEDY))


def test_seeded_sampling_does_not_depend_on_the_rest_of_the_batch(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, top_k=50, seed=seed)
        for seed in range(len(PROMPTS))
    ]
    together = llm.generate(PROMPTS, params)
    for prompt, one, output in zip(PROMPTS, params, together, strict=True):
        assert llm.generate([prompt], one)[0].token_ids == output.token_ids
    greedy = llm.generate(PROMPTS, SamplingParams(max_tokens=10, temperature=0.0))
    assert [one.token_ids for one in together] != [one.token_ids for one in greedy]


def test_unseeded_draws_differ_between_requests_but_not_between_runs(folder: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0)
    runs = []
    for _ in range(2):
        with LLM(str(folder), device="cpu", random_seed=3) as llm:
            runs.append([out.token_ids for out in llm.generate([[1, 2]] * 3, params)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_chunked_prefill_changes_nothing(llm: LLM, folder: Path) -> None:
    with LLM(str(folder), device="cpu", chunked_prefill_size=7, max_running_requests=3) as chunked:
        same(chunked.generate(PROMPTS, GREEDY), llm.generate(PROMPTS, GREEDY))


def test_a_page_size_of_one_and_a_full_cache_change_nothing(llm: LLM, folder: Path) -> None:
    with LLM(str(folder), device="cpu", page_size=1, max_total_tokens=60) as small:
        same(small.generate(PROMPTS, GREEDY), llm.generate(PROMPTS, GREEDY))


AHEAD = [
    GREEDY,
    SamplingParams(max_tokens=9, temperature=0.8, seed=4, logprobs=0),
    SamplingParams(max_tokens=7, temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5),
    SamplingParams(max_tokens=11, temperature=0.0, min_tokens=3, stop_token_ids=(5, 9, 60)),
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunked_prefill_size": 5, "page_size": 1, "max_total_tokens": 60},
        {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2},
    ],
    ids=["plain", "crowded", "two ranks"],
)
def test_scheduling_ahead_changes_nothing(folder: Path, settings: dict[str, int]) -> None:
    """As on GPUs: the next step is under way before the last one's tokens are known."""
    with LLM(str(folder), device="cpu", **settings) as one:  # type: ignore[arg-type]
        expected = one.generate(PROMPTS, AHEAD)
        one.core._depth = 2
        same(one.generate(PROMPTS, AHEAD), expected)
        same(one.generate(PROMPTS[::-1], AHEAD[::-1]), expected[::-1])


def test_max_tokens_0_only_scores(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = llm.generate([PROMPTS[1]], params)
    (whole,) = llm.generate([PROMPTS[1]], GREEDY)
    assert output.token_ids == ()
    assert output.finish_reason is FinishReason.LENGTH
    assert output.prompt_logprobs is not None
    assert whole.prompt_logprobs is not None
    assert [one and one.logprob for one in output.prompt_logprobs] == pytest.approx(
        [one and one.logprob for one in whole.prompt_logprobs], abs=TOLERANCE
    )


def test_a_stop_token_ends_the_output_and_is_part_of_it(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[3], SamplingParams(max_tokens=12, temperature=0.0))
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    (output,) = llm.generate(PROMPTS[3], params)
    assert output.token_ids == free.token_ids[: first + 1]
    assert output.finish_reason == "stop"


def test_the_context_length_ends_the_output(folder: Path) -> None:
    with LLM(str(folder), device="cpu", context_length=10) as llm:
        (output,) = llm.generate([1] * 7, SamplingParams(max_tokens=50, temperature=0.0))
    assert len(output.token_ids) == 3
    assert output.finish_reason == "length"


def test_a_single_prompt_gives_a_list_of_one_and_none_gives_none(llm: LLM) -> None:
    assert len(llm.generate([1, 2, 3])) == 1
    assert llm.generate([]) == []


def test_progress_counts_finished_requests(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    llm.generate(
        PROMPTS,
        SamplingParams(max_tokens=2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_dummy_weights_need_a_config_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with LLM(str(tmp_path), device="cpu", load_format="dummy", dtype="bfloat16") as llm:
        (output,) = llm.generate([1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0))
    assert len(output.token_ids) == 4


def test_text_stop_texts_and_chat(text_folder: Path) -> None:
    with LLM(str(text_folder), device="cpu") as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        (free,) = llm.generate("Question: how many?", params)
        assert free.prompt == "Question: how many?"
        assert free.text == llm.tokenizer.decode(free.token_ids)
        stop = free.text[3:6]
        cut = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=("never", stop))
        (output,) = llm.generate("Question: how many?", cut)
        assert output.text == free.text[: free.text.index(stop)]
        assert output.finish_reason == "stop"
        assert len(output.token_ids) < len(free.token_ids)
        chat = llm.tokenizer.chat([{"role": "user", "content": "hello"}])
        assert chat.endswith("<|im_start|>assistant\n")
        assert llm.info.eos_token_ids == {0}
        assert not llm.core.has_work


def test_the_instrument_is_called(llm: LLM, folder: Path) -> None:
    with LLM(str(folder), device="cpu", instrument="planted:blunts_the_norm") as other:
        changed = other.generate(PROMPTS, GREEDY)
    assert changed[0].logprobs != llm.generate(PROMPTS, GREEDY)[0].logprobs
