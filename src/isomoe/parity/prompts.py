"""Which prompts a comparison runs on."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from isomoe.errors import ConfigError
from isomoe.parity.compare import Ids
from isomoe.tokenizer import Tokenizer

SHIPPED = 20
ANSWER_TOKENS = (60, 100)
"""Reference answers of the shipped questions: long enough for a drift to show."""
_RANDOM_TOKENS = (8, 48)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts as token ids.

    Attributes:
        source: where they come from, for the report.
    """

    source: str
    token_ids: tuple[Ids, ...]


def question_prompt(question: str) -> str:
    """A question as GSM8K's harnesses ask it, and as the bundled checkpoint was trained on."""
    return f"Question: {question}\nAnswer:"


def from_file(path: str, tokenizer: Tokenizer) -> Prompts:
    """One prompt a line: its text, or an object with "prompt", or with "question".

    A "prompt" is taken as it is; a "question" is put into `question_prompt`.

    Raises:
        ConfigError: if the file cannot be read, or has no prompt.
    """
    lines = _read(Path(path), f"--prompts {path}").splitlines()
    texts = [
        _text(line, f"--prompts {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not texts:
        raise ConfigError(f"--prompts {path}: no line that is not blank")
    ids = tuple([tokenizer.encode(text) for text in texts])
    return Prompts(source=path, token_ids=ids)


def shipped(file: Path, tokenizer: Tokenizer) -> Prompts:
    """20 questions of a held-out set whose reference answers run from 60 to 100 tokens.

    They are spread evenly over those answers, ordered by length and then by line.
    """
    least, most = ANSWER_TOKENS
    found: list[tuple[int, int, str]] = []
    for number, line in enumerate(_read(file, str(file)).splitlines()):
        problem = json.loads(line)
        length = len(tokenizer.encode(f" {problem['answer']}")) + 1  # the end token
        if least <= length <= most:
            found.append((length, number, problem["question"]))
    found.sort()
    if len(found) < SHIPPED:
        raise ConfigError(
            f"{file}: {len(found)} answers have {least} to {most} tokens, {SHIPPED} are needed; "
            "--prompts FILE or --random-prompts M would work"
        )
    chosen = [found[index * len(found) // SHIPPED] for index in range(SHIPPED)]
    ids = tuple([tokenizer.encode(question_prompt(question)) for _, _, question in chosen])
    return Prompts(source=file.name, token_ids=ids)


def random_ids(count: int, vocab_size: int, seed: int) -> Prompts:
    """Random tokens, 8 to 48 a prompt.

    Raises:
        ConfigError: if none is asked for.
    """
    if count < 1:
        raise ConfigError(f"--random-prompts {count}: must be at least 1")
    random = Random(seed)
    ids = tuple(
        [
            tuple([random.randrange(vocab_size) for _ in range(random.randint(*_RANDOM_TOKENS))])
            for _ in range(count)
        ]
    )
    return Prompts(source=f"random tokens, seed {seed}", token_ids=ids)


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: not readable ({error})") from None


def _text(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not readable as JSON ({error})") from None
    for key, form in (("prompt", str), ("question", question_prompt)):
        if key in entry:
            if not isinstance(entry[key], str) or not entry[key]:
                raise ConfigError(f"{where}: {key!r} must be a text that is not empty")
            return form(entry[key])
    raise ConfigError(f'{where}: has neither "prompt" nor "question"')
