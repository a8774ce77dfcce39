"""What a load generator measures of one request, and of many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request as its client saw it. Times are seconds.

    Attributes:
        sent: when it was sent, by a clock of the client's.
        arrivals: when each chunk with output came, by the same clock. A chunk may hold several
            tokens, or a part of one.
        ended: when its answer ended.
        prompt_tokens: of the prompt, as the server counts them; 0 if it does not.
        output_tokens: of the answer, as the server counts them; the number of chunks if it does
            not.
        cached_tokens: prompt tokens that the server found in its prefix cache, if it says so.
        is_counted: whether the server counted the tokens.
        error: why it failed; None if it did not.
    """

    sent: float
    arrivals: tuple[float, ...] = ()
    ended: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    is_counted: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is one token."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the times between chunks, as the field measures them."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]

    @property
    def e2e(self) -> float:
        """End-to-end latency."""
        return self.ended - self.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """A distribution of times, in seconds; percentiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self | None:
        """Of samples in any order; None if there are none."""
        if not samples:
            return None
        ordered = sorted(samples)
        return cls(
            mean=math.fsum(ordered) / len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Requests that were sent together.

    Attributes:
        outcomes: of each request.
        seconds: from the first request to the last answer.
        peak: the most requests that were open at once.
        cpu_seconds: what the load generator itself took.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float
    peak: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Runs, one after the other, as the field reports them. Latencies are of what succeeded.

    Attributes:
        completed: requests that succeeded.
        failed: requests that did not.
        first_error: why the first of them failed.
        seconds: of all runs.
        input_tokens: of prompts of what succeeded, as the server counts them.
        output_tokens: of answers.
        cached_tokens: prompt tokens that the server found in its prefix cache.
        is_counted: whether the server counted the tokens of every answer.
        peak: the most requests that were open at once.
        cpu_seconds: what the load generator itself took.
    """

    completed: int
    failed: int
    first_error: str | None
    seconds: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    is_counted: bool
    peak: int
    cpu_seconds: float
    ttft: Latency | None
    tpot: Latency | None
    itl: Latency | None
    e2e: Latency | None

    @classmethod
    def of(cls, *runs: Run) -> Self:
        """Of one or more runs."""
        outcomes = [outcome for run in runs for outcome in run.outcomes]
        done = [outcome for outcome in outcomes if outcome.error is None]
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        return cls(
            completed=len(done),
            failed=len(errors),
            first_error=errors[0] if errors else None,
            seconds=math.fsum(run.seconds for run in runs),
            input_tokens=sum(outcome.prompt_tokens for outcome in done),
            output_tokens=sum(outcome.output_tokens for outcome in done),
            cached_tokens=sum(outcome.cached_tokens for outcome in done),
            is_counted=all(outcome.is_counted for outcome in done),
            peak=max((run.peak for run in runs), default=0),
            cpu_seconds=math.fsum(run.cpu_seconds for run in runs),
            ttft=Latency.of([outcome.ttft for outcome in done]),
            tpot=Latency.of([tpot for outcome in done if (tpot := outcome.tpot) is not None]),
            itl=Latency.of([gap for outcome in done for gap in outcome.itl]),
            e2e=Latency.of([outcome.e2e for outcome in done]),
        )

    @property
    def request_throughput(self) -> float:
        """Requests a second."""
        return self.completed / self.seconds

    @property
    def output_throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds

    @property
    def total_throughput(self) -> float:
        """Tokens a second, of prompts and answers."""
        return (self.input_tokens + self.output_tokens) / self.seconds


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of ordered samples lie, interpolated linearly.

    Sample i of n stands for i / (n - 1), as in numpy's default method.
    """
    place = (len(ordered) - 1) * percent / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
