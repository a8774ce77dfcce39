"""The workloads of `isomoe bench offline`: what is asked of the engine, and what it is told by."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from isomoe.bench.device import DeviceLimits
from isomoe.bench.floors import ModelCounts, Work
from isomoe.errors import ConfigError, IsomoeError


class Figure(StrEnum):
    """The one number that a workload is told by; the value is its unit."""

    TOKEN_TIME = "ms/token"
    DECODE_RATE = "decode tokens/s"
    INPUT_RATE = "input tokens/s"
    OUTPUT_RATE = "output tokens/s"

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a time."""
        return self is Figure.TOKEN_TIME

    @property
    def is_decode(self) -> bool:
        """Whether it leaves the prefill out: the time of one output token is taken away."""
        return self in (Figure.TOKEN_TIME, Figure.DECODE_RATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One repeat.

    Attributes:
        seconds: of the whole workload.
        first_seconds: of the same prompts with one output token each; None where not measured.
    """

    seconds: float
    first_seconds: float | None = None

    @property
    def decode_seconds(self) -> float:
        """What all tokens but the first took.

        Raises:
            IsomoeError: if more tokens took no more time.
        """
        assert self.first_seconds is not None
        if self.seconds <= self.first_seconds:
            raise IsomoeError(
                f"all tokens took {self.seconds:.3f} s and the first {self.first_seconds:.3f} s: "
                "the answers are too short to tell; a larger --output-len would do"
            )
        return self.seconds - self.first_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The best that the device could do.

    Attributes:
        work: of one decode step, or of all the workload where the figure is no decode's.
        seconds: the least time for it.
        value: the figure at that time.
    """

    work: Work
    seconds: float
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineWorkload:
    """Requests that are given to the engine at once.

    Attributes:
        name: W1 to W4, or custom.
        input_lens: tokens of each prompt.
        output_lens: tokens of each answer.
        figure: what it is told by.
    """

    name: str
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    figure: Figure

    @classmethod
    def custom(cls, num_requests: int, input_len: int, output_len: int) -> "OfflineWorkload":
        """Requests that are alike.

        Raises:
            ConfigError: if a number is out of range.
        """
        for flag, value in (
            ("--num-requests", num_requests),
            ("--input-len", input_len),
            ("--output-len", output_len),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value}: must be at least 1")
        return _alike("custom", num_requests, input_len, output_len)

    @property
    def num_requests(self) -> int:
        """Requests."""
        return len(self.input_lens)

    @property
    def context_length(self) -> int:
        """Tokens of the longest request, prompt and output."""
        pairs = zip(self.input_lens, self.output_lens, strict=True)
        return max(before + after for before, after in pairs)

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        count = f"{self.num_requests} request{'s' if self.num_requests > 1 else ''}"
        return f"{count}, {_spread(self.input_lens)} in, {_spread(self.output_lens)} out"

    def prompts(self, vocab_size: int, part: str) -> list[list[int]]:
        """Random token ids, the same for the same `part`."""
        draws = Random(f"{self.name}, {part}")
        return [draws.choices(range(vocab_size), k=length) for length in self.input_lens]

    def value(self, sample: Sample) -> float:
        """The figure of one repeat."""
        steps = max(self.output_lens) - 1
        if self.figure is Figure.INPUT_RATE:
            return sum(self.input_lens) / sample.seconds
        if self.figure is Figure.OUTPUT_RATE:
            return sum(self.output_lens) / sample.seconds
        seconds = sample.decode_seconds
        if self.figure is Figure.TOKEN_TIME:
            return 1e3 * seconds / steps
        return self.num_requests * steps / seconds

    def floor(
        self, counts: ModelCounts, limits: DeviceLimits, experts: float | None = None
    ) -> Floor:
        """What the device could do at best, with all requests running at once.

        Args:
            experts: distinct experts of a layer in a decode step, as measured; None expects them
                of an even choice.
        """
        if self.figure.is_decode:
            # The row of output token j sees the prompt and j - 1 tokens, for j from 2 on.
            work = Work.mean(
                [
                    counts.decode([before + number for before in self.input_lens], experts)
                    for number in range(1, max(self.output_lens))
                ]
            )
            seconds = work.seconds(limits)
            is_time = self.figure is Figure.TOKEN_TIME
            value = 1e3 * seconds if is_time else self.num_requests / seconds
            return Floor(work=work, seconds=seconds, value=value)
        work = counts.prefill(self.input_lens)
        seconds = work.seconds(limits)
        if self.figure is Figure.INPUT_RATE:
            return Floor(work=work, seconds=seconds, value=sum(self.input_lens) / seconds)
        for number in range(1, max(self.output_lens)):
            contexts = [
                before + number
                for before, after in zip(self.input_lens, self.output_lens, strict=True)
                if after > number
            ]
            step = counts.decode(contexts)
            work += step
            seconds += step.seconds(limits)
        return Floor(work=work, seconds=seconds, value=sum(self.output_lens) / seconds)

    def work_seconds(self, sample: Sample) -> float:
        """What the engine took for the floor's work."""
        if not self.figure.is_decode:
            return sample.seconds
        return sample.decode_seconds / (max(self.output_lens) - 1)

    def to_json(self) -> dict[str, object]:
        """Its sizes."""
        return {
            "name": self.name,
            "title": self.title,
            "requests": self.num_requests,
            "input_tokens": sum(self.input_lens),
            "output_tokens": sum(self.output_lens),
            "figure": str(self.figure),
            "lower_is_better": self.figure.lower_is_better,
        }


def standard_workloads() -> dict[str, OfflineWorkload]:
    """W1 to W4 by name, in the order in which they are worth running.

    W4's lengths come from Python's `random.Random(0)`: `randint(100, 1024)` for all prompts, then
    for all answers.
    """
    draws = Random(0)
    inputs, outputs = ([draws.randint(100, 1024) for _ in range(256)] for _ in range(2))
    found = (
        _alike("W1", 1, 128, 256),
        _alike("W2", 64, 512, 256),
        OfflineWorkload(
            name="W4",
            input_lens=tuple(inputs),
            output_lens=tuple(outputs),
            figure=Figure.OUTPUT_RATE,
        ),
        _alike("W3", 16, 4096, 1),
    )
    return {workload.name: workload for workload in found}


def _alike(name: str, num_requests: int, input_len: int, output_len: int) -> OfflineWorkload:
    if output_len == 1:
        figure = Figure.INPUT_RATE
    elif num_requests == 1:
        figure = Figure.TOKEN_TIME
    else:
        figure = Figure.DECODE_RATE
    return OfflineWorkload(
        name=name,
        input_lens=(input_len,) * num_requests,
        output_lens=(output_len,) * num_requests,
        figure=figure,
    )


def _spread(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
