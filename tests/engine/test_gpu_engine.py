"""The engine on a GPU with the bundled checkpoint, against the same engine on the CPU."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from isomoe.engine import LLM, SamplingParams
from isomoe.eval.run import evaluate
from isomoe.eval.tasks import TASKS, read_problems
from isomoe.parity.prompts import questions
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GREEDY = SamplingParams(max_tokens=100, temperature=0.0, logprobs=1)
CACHE = {"max_total_tokens": 20000}


def prompts() -> Sequence[Sequence[int]]:
    folder = bundled_checkpoint()
    chosen = questions(folder / "heldout.jsonl", Tokenizer(folder).encode, 20)
    return tuple(prompt.token_ids or () for prompt in chosen.prompts)


def answers(device: str, **settings: Any) -> list[tuple[tuple[int, ...], list[float]]]:
    with LLM(device=device, **(CACHE | settings)) as llm:
        outputs = llm.generate(prompts(), GREEDY)
    return [(one.token_ids, [token.logprob for token in one.logprobs or ()]) for one in outputs]


@pytest.fixture(scope="module")
def on_gpu() -> list[tuple[tuple[int, ...], list[float]]]:
    return answers("cuda")


def check_same(found: Any, expected: Any, most: float, least: int = 19) -> None:
    """At least `least` prompts have the same tokens, and these logprobs within `most` nats."""
    same = [(one, other) for one, other in zip(found, expected, strict=True) if one[0] == other[0]]
    assert len(same) >= least
    for one, other in same:
        assert max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) <= most


def test_the_cpu_gives_the_same_tokens(on_gpu: Any) -> None:
    check_same(on_gpu, answers("cpu"), most=0.1)


@pytest.mark.parametrize(
    "settings",
    [{"disable_cuda_graph": True}, {"disable_overlap_schedule": True}],
    ids=["without graphs", "without overlap"],
)
def test_how_steps_are_run_changes_no_bit(on_gpu: Any, settings: dict[str, bool]) -> None:
    check_same(on_gpu, answers("cuda", **settings), most=0.0, least=20)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp_size": 2},
        {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2},
        {"tp_size": 4, "attn_dp_size": 2, "ep_size": 4},
    ],
    ids=["tp2", "tp2,dp2,ep2", "tp4,dp2,ep4"],
)
def test_ranks_that_share_a_gpu_agree_with_one(on_gpu: Any, layout: dict[str, int]) -> None:
    check_same(on_gpu, answers("cuda", **layout), most=0.1)


def test_accuracy() -> None:
    task = TASKS[0]
    data = task.default_data(bundled_checkpoint())
    assert data is not None
    with LLM(device="cuda", max_total_tokens=100_000) as llm:
        result = evaluate(llm, task, read_problems(data)[:500])
    assert result.strict.right >= 495


SAMPLED = [
    SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=1),
    SamplingParams(max_tokens=24, temperature=0.7, top_k=20, min_p=0.02, seed=2, logprobs=3),
    SamplingParams(max_tokens=24, temperature=0.0, repetition_penalty=1.3),
    SamplingParams(max_tokens=0, prompt_logprobs=2),
]


def test_sampling_is_a_function_of_the_seed_and_follows_the_cpu() -> None:
    """In fp32, where the two round nearly alike."""
    several = list(prompts())[: len(SAMPLED)]
    with LLM(device="cuda", dtype="float32", **CACHE) as llm:
        first = llm.generate(several, SAMPLED)
        again = llm.generate(several, SAMPLED)
    with LLM(device="cpu", dtype="float32", **CACHE) as llm:
        cpu = llm.generate(several, SAMPLED)
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert [one.token_ids for one in first] == [one.token_ids for one in cpu]
    scored = zip(first[3].prompt_logprobs or (), cpu[3].prompt_logprobs or (), strict=True)
    for one, other in scored:
        if one is not None and other is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_a_grammar_is_followed_though_the_next_step_is_under_way() -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(max_tokens=24, temperature=0.0, regex="[0-9]{3}")
    with LLM(device="cuda", **CACHE) as llm:
        (output,) = llm.generate([prompts()[0]], params)
    assert output.text.isdigit()
    assert len(output.text) == 3


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_waits_for_the_gpu(no_synchronisation: None) -> None:
    """Prefill, mixed steps, decode with graphs, sampling: all under torch's check."""
    with LLM(device="cuda", chunked_prefill_size=64, **CACHE) as llm:
        params = [
            SamplingParams(max_tokens=20 + 3 * index, temperature=float(index % 2), ignore_eos=True)
            for index in range(20)
        ]
        expected = llm.generate(prompts(), params)
        torch.cuda.set_sync_debug_mode("error")
        found = llm.generate(prompts(), params)
        torch.cuda.set_sync_debug_mode("default")
    assert [len(one.token_ids) for one in found] == [len(one.token_ids) for one in expected]


def test_memory_stays_as_it_is_over_ten_thousand_steps() -> None:
    some = list(prompts())
    with LLM(device="cuda", chunked_prefill_size=64, **CACHE) as llm:

        def run(rounds: int) -> None:
            for number in range(rounds):
                params = [
                    SamplingParams(max_tokens=100 + (7 * index + number) % 150, ignore_eos=True)
                    for index in range(len(some))
                ]
                llm.generate(some, params)

        run(3)
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        run(40)  # some 250 steps each
        assert torch.cuda.memory_reserved() == reserved
        assert torch.cuda.memory_allocated() <= allocated + (1 << 20)
