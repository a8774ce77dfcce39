"""The GPU's way through the engine, on whatever is here.

Without a GPU, Triton's interpreter runs the kernels on the CPU: batches, kernels, sampling and
overlapped scheduling are then those of a GPU, and only captured graphs are not.
"""

from dataclasses import replace
from pathlib import Path

import pytest

import gpu_interpreter  # noqa: F401 - first of all
from gpu_support import ON_GPU
from isomoe.engine import LLM, SamplingParams
from isomoe.kernels import dispatch

PROMPTS = [[5, 9, 2, 7, 7, 1, 30, 4, 11], [3, 1]]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose kernels are Triton's."""
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "interpreted", True)
    return "cuda" if ON_GPU else "cpu"


def llm(folder: Path, device: str, **changes: object) -> LLM:
    sizes = {"page_size": 4, "chunked_prefill_size": 8, "max_total_tokens": 512, "dtype": "float32"}
    return LLM(str(folder), device=device, **(sizes | changes))  # type: ignore[arg-type]


def test_the_kernels_of_a_gpu_give_the_plain_ones_answers(folder: Path, on_triton: str) -> None:
    dispatch.interpreted = False
    with llm(folder, "cpu") as plain:
        expected = plain.generate(PROMPTS, GREEDY)
    dispatch.interpreted = not ON_GPU
    with llm(folder, on_triton) as engine:
        engine.core._depth = 2
        engine.core.scheduler.limits = replace(engine.core.scheduler.limits, graph_rows=(1, 2, 4))
        found = engine.generate(PROMPTS, GREEDY)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
