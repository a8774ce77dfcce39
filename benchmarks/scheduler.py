"""How long the scheduler takes to form a step, without a model and without workers.

A replica in full use: 1,024 running requests over 8 attention-DP groups, in decode, while some end
and others take their place in every step. A step is formed, its messages to the workers are made
(what goes over the pipes, in bytes), and made-up tokens are taken in.

    python benchmarks/scheduler.py [--requests 1024] [--groups 8] [--json]
"""

import argparse
import gc
import json
import pickle
import random
import statistics
import time

from isomoe.engine import Request, SamplingParams
from isomoe.engine.messages import WorkerStep
from isomoe.engine.scheduler import Limits, Scheduler

WARM_UP = 200
STEPS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1024, help="running at once")
    parser.add_argument("--groups", type=int, default=8, help="attention-DP groups")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    args = parser.parse_args()
    limits = Limits(
        attn_dp_size=args.groups,
        num_pages=20_000,
        page_size=16,
        max_running_requests=args.requests // args.groups,
        chunked_prefill_size=2048,
        max_prefill_tokens=2048,
    )
    scheduler = Scheduler(limits, choose=len)
    rng = random.Random(0)
    added = 0

    def arrive() -> None:
        nonlocal added
        length, output = rng.randint(100, 600), rng.randint(100, 600)
        prompt = tuple(rng.randrange(150_000) for _ in range(length))
        params = SamplingParams(max_tokens=output)
        request = Request(
            request_id=added, prompt_token_ids=prompt, params=params, max_tokens=output
        )
        scheduler.add(request)
        added += 1

    gc.freeze()  # as the engine process does once it is loaded
    rows: list[dict[str, float]] = []
    shape = None
    for index in range(WARM_UP + STEPS):
        while scheduler.num_waiting < 64:
            arrive()
        began = time.perf_counter()
        step = scheduler.schedule()
        assert step is not None
        formed = time.perf_counter()
        new = None if step.shape is shape else step.shape
        shape = step.shape
        size = sum(len(pickle.dumps(WorkerStep(shape=new, group=group))) for group in step.groups)
        sent = time.perf_counter()
        tokens = [[1] * sum(schedule.samples) for schedule in step.schedules]
        answered = time.perf_counter()
        ended = sum(
            advance.finish_reason is not None
            for part in scheduler.update(step, tokens)
            for advance in part
        )
        done = time.perf_counter()
        if index >= WARM_UP:
            rows.append(
                {
                    "form_ms": (formed - began) * 1e3,
                    "messages_ms": (sent - formed) * 1e3,
                    "update_ms": (done - answered) * 1e3,
                    "step_ms": (sent - began + done - answered) * 1e3,
                    "message_bytes": size,
                    "running": sum(scheduler.num_running),
                    "ended": ended,
                }
            )
    table = {name: spread([row[name] for row in rows]) for name in rows[0]}
    print(f"{STEPS} steps, {args.groups} groups; {'':14}median       p99       max")
    for name, (median, p99, most) in table.items():
        print(f"{name:>40} {median:12.3f} {p99:9.3f} {most:9.3f}")
    if args.json:
        print(json.dumps({"requests": args.requests, "groups": args.groups, **table}))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 99th percentile and maximum."""
    return statistics.median(values), statistics.quantiles(values, n=100)[98], max(values)


if __name__ == "__main__":
    main()
