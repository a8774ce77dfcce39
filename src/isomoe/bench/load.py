"""Sends requests at a rate, with a bound on how many are open, and gathers what came of them."""

import asyncio
import time
from collections.abc import Callable, Sequence

from isomoe.bench.client import OpenAIClient
from isomoe.bench.metrics import Outcome, Run
from isomoe.bench.workload import BenchRequest, arrivals

Progress = Callable[[int, int], None]
"""Called with (requests finished, requests in all)."""


async def send_all(
    client: OpenAIClient,
    requests: Sequence[BenchRequest],
    *,
    max_concurrency: int | None = None,
    request_rate: float = float("inf"),
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Sends every request once, in order, and waits for the answers.

    Args:
        max_concurrency: the most requests that are open at once; a request's time starts when it
            is sent, not when it begins to wait for its turn. None is without bound.
        request_rate: requests a second of a Poisson process.
        seed: of their arrivals.
    """
    slots = asyncio.Semaphore(max_concurrency or len(requests))
    outcomes: list[Outcome | None] = [None] * len(requests)
    open_requests = peak = done = 0

    async def send(index: int) -> None:
        nonlocal open_requests, peak, done
        open_requests += 1
        peak = max(peak, open_requests)
        try:
            outcomes[index] = await client.measure(requests[index])
        finally:
            open_requests -= 1
            slots.release()
        done += 1
        if progress is not None:
            progress(done, len(requests))

    began, cpu_began = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for index, at in zip(range(len(requests)), arrivals(request_rate, seed), strict=False):
            wait = began + at - time.perf_counter()
            if wait > 0.0:
                await asyncio.sleep(wait)
            await slots.acquire()
            group.create_task(send(index))
    return Run(
        outcomes=tuple(outcome for outcome in outcomes if outcome is not None),
        seconds=time.perf_counter() - began,
        peak=peak,
        cpu_seconds=time.process_time() - cpu_began,
    )
