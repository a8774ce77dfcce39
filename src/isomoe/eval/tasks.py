"""The tasks. A new one is a class in `TASKS`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isomoe.errors import ConfigError
from isomoe.eval.scoring import flexible_answer, normalized, strict_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and its reference answer, which ends in `#### ` and the number."""

    question: str
    answer: str

    @property
    def number(self) -> str:
        """What an answer is compared with."""
        return normalized(self.answer.rpartition("####")[2])


class Task:
    """Questions that are answered by a number, in GSM8K's form.

    Attributes:
        name: as typed.
        num_fewshot: solved problems before each question, unless told otherwise.
        max_tokens: of an answer, unless told otherwise.
        stop: texts that end an answer.
        strict: finds the number in an answer of the demanded form; the first group.
    """

    name: str
    num_fewshot: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    strict: re.Pattern[str]

    def default_data(self, folder: Path) -> Path | None:
        """The problems that the checkpoint in `folder` is scored on; None if they must be given."""
        return None

    def prompt(self, problem: Problem, fewshot: Sequence[Problem] = ()) -> str:
        """The question after the solved ones."""
        solved = [f"Question: {one.question}\nAnswer: {one.answer}" for one in fewshot]
        return "\n\n".join([*solved, f"Question: {problem.question}\nAnswer:"])

    def is_right(self, problem: Problem, text: str) -> tuple[bool, bool]:
        """Whether the answer is right by the strict rule, and by the flexible one."""
        wanted = problem.number
        return strict_answer(text, self.strict) == wanted, flexible_answer(text) == wanted


class Arith(Task):
    """The bundled checkpoint's held-out problems. Strict: the last line is `#### 42`."""

    name = "arith"
    num_fewshot = 0
    max_tokens = 160
    strict = re.compile(r"(?:^|\n)#### (-?\d+)\s*\Z")

    def default_data(self, folder: Path) -> Path | None:
        """The file that ships with the model."""
        from isomoe.weights import bundled_checkpoint

        own = folder / "heldout.jsonl"
        return own if own.is_file() else bundled_checkpoint() / own.name


class GSM8K(Task):
    """GSM8K (Cobbe et al. 2021) as lm-evaluation-harness scores it (its task gsm8k, version 3).

    Its prompt form, separators, stop texts and both of its extractions. The solved problems are
    the first ones of a file, where the harness draws them.
    """

    name = "gsm8k"
    num_fewshot = 5
    max_tokens = 256
    stop = ("Question:", "</s>", "<|im_end|>")
    strict = re.compile(r"#### (\-?[0-9\.\,]+)")


TASKS: tuple[Task, ...] = (Arith(), GSM8K())


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: if there is none; lists them.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise ConfigError(f"--task {name}: known are {', '.join(task.name for task in TASKS)}")


def read_problems(file: Path) -> list[Problem]:
    """The problems of a file in GSM8K's published format, one JSON object a line.

    Raises:
        ConfigError: if it cannot be read, or a line is not of that format.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable ({error})") from None
    problems = [
        _problem(line, f"{file}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not problems:
        raise ConfigError(f"{file}: has no problem")
    return problems


def _problem(line: str, where: str) -> Problem:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be an object with question and answer")
    for key in ("question", "answer"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ConfigError(f"{where}: {key!r} must be a text that is not empty")
    problem = Problem(question=entry["question"], answer=entry["answer"])
    if "####" not in problem.answer or not re.search(r"\d", problem.number):
        raise ConfigError(f"{where}: the answer does not end in '#### ' and a number")
    return problem
