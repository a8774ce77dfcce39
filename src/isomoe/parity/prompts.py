"""Which prompts a comparison runs on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

from isomoe.errors import ConfigError
from isomoe.parity.run import Ids, Prompt

DEFAULT_COUNT = 120
"""Enough for a layer that is 1% off, in 100 tokens each: docs/parity.md."""
ANSWER_TOKENS = (60, 100)
"""Reference answers of a checkpoint's own questions: long enough for a drift to show."""
SHIPPED = Path(str(resources.files("isomoe.parity"))) / "prompts.jsonl"
"""Texts for any model: languages, code, mathematics, and a few long ones."""
_RANDOM_TOKENS = (8, 48)

Encode = Callable[[str], Sequence[int]]
"""A tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts, and where they come from, for the report."""

    source: str
    prompts: tuple[Prompt, ...]

    def encoded(self, encode: Encode) -> "Prompts":
        """The same, with the token ids of their texts."""
        return Prompts(
            source=self.source,
            prompts=tuple(
                prompt._replace(token_ids=tuple(encode(prompt.text))) if prompt.text else prompt
                for prompt in self.prompts
            ),
        )


def question_prompt(question: str) -> str:
    """A question as GSM8K's harnesses ask it, and as the bundled checkpoint was trained on."""
    return f"Question: {question}\nAnswer:"


def from_file(path: str, count: int | None = None) -> Prompts:
    """One prompt a line: its text, or an object with "prompt", or with "question".

    A "prompt" is taken as it is; a "question" is put into `question_prompt`; a "kind" names its
    sort.

    Args:
        count: only so many, the first ones.

    Raises:
        ConfigError: if the file cannot be read, or has no prompt.
    """
    return Prompts(source=path, prompts=_lines(Path(path), f"--prompts {path}")[:count])


def shipped(count: int) -> Prompts:
    """The texts that ship with isomoe, every kind in turn."""
    found = _lines(SHIPPED, SHIPPED.name)
    return Prompts(source="prompts that ship with isomoe", prompts=found[:count])


def questions(file: Path, encode: Encode, count: int) -> Prompts:
    """Questions of a checkpoint's held-out set whose reference answers run from 60 to 100 tokens.

    They are spread evenly over those answers, ordered by length and then by line.

    Raises:
        ConfigError: if there are not so many.
    """
    least, most = ANSWER_TOKENS
    found: list[tuple[int, int, str]] = []
    for number, line in enumerate(_read(file, str(file)).split("\n"), 1):
        if not line.strip():
            continue
        question, answer = _problem(line, f"{file}, line {number}")
        length = len(encode(f" {answer}")) + 1  # the end token
        if least <= length <= most:
            found.append((length, number, question))
    found.sort()
    if len(found) < count:
        raise ConfigError(
            f"{file}: {len(found)} answers have {least} to {most} tokens, {count} are wanted; "
            f"--num-prompts {len(found)}, --prompts FILE or --random-prompts M would work"
        )
    chosen = [found[index * len(found) // count] for index in range(count)]
    texts = [question_prompt(question) for _, _, question in chosen]
    prompts = tuple(Prompt(tuple(encode(text)), text, "question") for text in texts)
    return Prompts(source=file.name, prompts=prompts)


def random_ids(count: int, vocab_size: int, seed: int) -> Prompts:
    """Random tokens, 8 to 48 a prompt.

    Raises:
        ConfigError: if none is asked for.
    """
    if count < 1:
        raise ConfigError(f"--random-prompts {count}: must be at least 1")
    random = Random(seed)

    def drawn() -> Ids:
        return tuple(random.randrange(vocab_size) for _ in range(random.randint(*_RANDOM_TOKENS)))

    prompts = tuple(Prompt(drawn(), kind="random") for _ in range(count))
    return Prompts(source=f"random tokens, seed {seed}", prompts=prompts)


def _lines(file: Path, where: str) -> tuple[Prompt, ...]:
    prompts = tuple(
        _prompt(line, f"{where}, line {number}")
        for number, line in enumerate(_read(file, where).split("\n"), 1)
        if line.strip()
    )
    if not prompts:
        raise ConfigError(f"{where}: no line that is not blank")
    return prompts


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: not readable ({error})") from None


def _problem(line: str, where: str) -> tuple[str, str]:
    """Question and answer."""
    try:
        entry = json.loads(line)
        question, answer = entry["question"], entry["answer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        question = answer = None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ConfigError(
            f'{where}: is no object with the texts "question" and "answer"; --prompts FILE or '
            "--random-prompts M would do without that file"
        )
    return question, answer


def _prompt(line: str, where: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(None, line)
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as JSON ({error})") from None
    for key, form in (("prompt", str), ("question", question_prompt)):
        if key in entry:
            if not isinstance(entry[key], str) or not entry[key]:
                raise ConfigError(f"{where}: {key!r} must be a text that is not empty")
            return Prompt(None, form(entry[key]), str(entry.get("kind", "")))
    raise ConfigError(f'{where}: has neither "prompt" nor "question"')
