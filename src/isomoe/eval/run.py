"""Runs a task through the engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isomoe.engine import LLM, FinishReason, SamplingParams
from isomoe.eval.scoring import Share
from isomoe.eval.tasks import Problem, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a task went.

    Attributes:
        strict: by the demanded form.
        flexible: by the last number.
        cut: answers that were cut at the token limit.
        output_tokens: of all answers.
        seconds: of the generation, without the start.
    """

    strict: Share
    flexible: Share
    cut: int
    output_tokens: int
    seconds: float


def evaluate(
    llm: LLM,
    task: Task,
    problems: Sequence[Problem],
    fewshot: Sequence[Problem] = (),
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Answers every problem greedily and scores the answers.

    Raises:
        RequestError: if a prompt is too long for the model.
    """
    params = SamplingParams(
        max_tokens=task.max_tokens if max_tokens is None else max_tokens,
        temperature=0.0,
        stop=task.stop,
    )
    prompts = [task.prompt(problem, fewshot) for problem in problems]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, progress)
    seconds = time.perf_counter() - began
    right = [task.is_right(*each) for each in zip(problems, (o.text for o in outputs), strict=True)]
    return Result(
        strict=Share(right=sum(strict for strict, _ in right), total=len(right)),
        flexible=Share(right=sum(flexible for _, flexible in right), total=len(right)),
        cut=sum(output.finish_reason is FinishReason.LENGTH for output in outputs),
        output_tokens=sum(len(output.token_ids) for output in outputs),
        seconds=seconds,
    )
