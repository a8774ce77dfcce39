"""A measurement, warm-up included: waves of requests, or rounds against the offline engine."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from isomoe.bench.load import Progress, send_all
from isomoe.bench.metrics import Run
from isomoe.bench.offline import OfflineEngine, OfflineRun
from isomoe.bench.target import Target
from isomoe.bench.workload import BenchRequest, Workload
from isomoe.errors import ConfigError

Stage = Callable[[str], AbstractContextManager[Progress | None]]
"""Announces what is under way, and gives its progress bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What is sent, and how fast.

    Attributes:
        workload: random prompts; the warm-up is always of these.
        dataset: given prompts, sent once instead of random ones.
        max_concurrency: the most requests that are open at once; None is without bound.
        request_rate: requests a second of a Poisson process; infinity sends all at once.
        warmup: requests that are sent before and not counted.

    Raises:
        ConfigError: if a field is out of range; names its flag.
    """

    workload: Workload
    dataset: Sequence[BenchRequest] = ()
    max_concurrency: int | None = None
    request_rate: float = float("inf")
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency {self.max_concurrency}: must be at least 1")
        if not self.request_rate > 0.0:
            raise ConfigError(f"--request-rate {self.request_rate}: must be above 0")
        if self.warmup < 0:
            raise ConfigError(f"--warmup {self.warmup}: must be at least 0")

    def wave(self, index: int, vocab_size: int | None) -> Sequence[BenchRequest]:
        """The requests of one wave."""
        return self.dataset or self.workload.wave(index, vocab_size)


def measure_waves(
    runner: asyncio.Runner, target: Target, plan: LoadPlan, stage: Stage
) -> list[Run]:
    """Sends every wave, each after the answers of the one before it."""
    _warm_up(runner, target, plan, stage)
    waves = plan.workload.waves
    runs = []
    for index in range(waves):
        name = f"wave {index + 1} of {waves}" if waves > 1 else "requests"
        requests = plan.wave(index, target.vocab_size)
        runs.append(_send(runner, target, plan, requests, stage, name))
    return runs


def compare_offline(
    runner: asyncio.Runner,
    target: Target,
    plan: LoadPlan,
    offline: OfflineEngine,
    rounds: int,
    stage: Stage,
) -> tuple[list[OfflineRun], list[Run]]:
    """Lets the offline engine and the server answer the same requests, never at the same time.

    The requests of each round are a wave of the plan's: fresh, so that no cache knows them.
    """
    ignore_eos = target.client.ignore_eos
    offline.run(plan.workload.warmup(plan.warmup, target.vocab_size), ignore_eos)
    _warm_up(runner, target, plan, stage)
    offline_runs, runs = [], []
    for index in range(rounds):
        requests = plan.wave(index, target.vocab_size)
        name = f"round {index + 1} of {rounds}"
        with stage(f"{name}, offline"):
            offline_runs.append(offline.run(requests, ignore_eos))
        # Connections that idled meanwhile may be closed, or about to be.
        target.client.http.close()
        runs.append(_send(runner, target, plan, requests, stage, f"{name}, online"))
    return offline_runs, runs


def _warm_up(runner: asyncio.Runner, target: Target, plan: LoadPlan, stage: Stage) -> None:
    if plan.warmup:
        requests = plan.workload.warmup(plan.warmup, target.vocab_size)
        _send(runner, target, plan, requests, stage, "warm-up")


def _send(
    runner: asyncio.Runner,
    target: Target,
    plan: LoadPlan,
    requests: Sequence[BenchRequest],
    stage: Stage,
    name: str,
) -> Run:
    with stage(name) as progress:
        sending = send_all(
            target.client,
            requests,
            max_concurrency=plan.max_concurrency,
            request_rate=plan.request_rate,
            seed=plan.workload.seed,
            progress=progress,
        )
        return runner.run(sending)
