"""What a load generator sends: prompts, how long their answers are, and when they leave."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from isomoe.errors import ConfigError

Prompt = str | tuple[int, ...]
"""Text, or token ids."""

_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water "
    "been"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request.

    Attributes:
        prompt: text or token ids.
        max_tokens: the most tokens of the answer; exactly so many where end tokens are ignored.
    """

    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Random prompts, the same for the same fields.

    Attributes:
        num_prompts: of a wave.
        input_len: tokens of a prompt's own part.
        output_len: tokens of an answer.
        range_ratio: each length is a whole number drawn uniformly from
            floor(len * (1 - ratio)) to ceil(len * (1 + ratio)), and at least 1.
        shared_prefix_len: tokens that all prompts of all waves begin with, besides their own.
        waves: how often num_prompts requests are sent, each time with fresh own parts.
        seed: of all draws.

    Raises:
        ConfigError: if a field is out of range; names its flag.
    """

    num_prompts: int = 128
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    shared_prefix_len: int = 0
    waves: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--num-prompts", self.num_prompts, 1),
            ("--input-len", self.input_len, 1),
            ("--output-len", self.output_len, 1),
            ("--shared-prefix-len", self.shared_prefix_len, 0),
            ("--waves", self.waves, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{flag} {value}: must be at least {least}")
        if not 0.0 <= self.range_ratio < 1.0:
            raise ConfigError(f"--range-ratio {self.range_ratio}: must be from 0 to below 1")

    def wave(self, index: int, vocab_size: int | None) -> list[BenchRequest]:
        """The requests of one wave.

        Args:
            vocab_size: prompts are token ids below it; None makes them of words, about one a token.
        """
        return self._requests(f"wave {index}", self.num_prompts, vocab_size)

    def warmup(self, count: int, vocab_size: int | None) -> list[BenchRequest]:
        """Requests of the same lengths that share no prompt, nor its beginning, with a wave."""
        return self._requests("warm-up", count, vocab_size)

    def _requests(self, part: str, count: int, vocab_size: int | None) -> list[BenchRequest]:
        draws = Random(f"{self.seed}, {part}")
        shared = draws if part == "warm-up" else Random(f"{self.seed}, shared prefix")
        prefix = _tokens(shared, self.shared_prefix_len, vocab_size)
        requests = []
        for _ in range(count):
            own = _tokens(draws, self._length(self.input_len, draws), vocab_size)
            prompt = _prompt([*prefix, *own])
            max_tokens = self._length(self.output_len, draws)
            requests.append(BenchRequest(prompt=prompt, max_tokens=max_tokens))
        return requests

    def _length(self, mean: int, draws: Random) -> int:
        low = math.floor(mean * (1.0 - self.range_ratio))
        high = math.ceil(mean * (1.0 + self.range_ratio))
        return max(1, draws.randint(low, high))


def read_dataset(path: str, output_len: int) -> list[BenchRequest]:
    """The prompts of a file with one `{"prompt": ...}` a line: text, or a list of token ids.

    Raises:
        ConfigError: if it cannot be read; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path}: not readable ({error})") from None
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            prompt = tuple(prompt)
        if not isinstance(prompt, str | tuple) or not prompt:
            raise ConfigError(f'--dataset {path}: line {number} is not like {{"prompt": "a text"}}')
        requests.append(BenchRequest(prompt=prompt, max_tokens=output_len))
    if not requests:
        raise ConfigError(f"--dataset {path}: no prompts")
    return requests


def arrivals(request_rate: float, seed: int) -> Iterator[float]:
    """When each request may leave, in seconds from the start.

    Args:
        request_rate: requests a second of a Poisson process; infinity lets all leave at once.
    """
    draws = Random(f"{seed}, arrivals")
    at = 0.0
    while True:
        yield at
        at += draws.expovariate(request_rate) if math.isfinite(request_rate) else 0.0


def _tokens(draws: Random, count: int, vocab_size: int | None) -> Sequence[int | str]:
    return draws.choices(_WORDS if vocab_size is None else range(vocab_size), k=count)


def _prompt(tokens: Sequence[int | str]) -> Prompt:
    ids = tuple(token for token in tokens if isinstance(token, int))
    return ids or " ".join(map(str, tokens))
