"""The proof over many models and layouts, on all cores."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib import resources
from multiprocessing import get_context

import torch

from isomoe.layout import Parallelism
from isomoe.models import HFConfig, family_of, layouts
from isomoe.prove.mutants import find_mutant
from isomoe.prove.runner import Finding, Stats, Subject, prove

Progress = Callable[[int, int], None]
"""Called with (layouts done, layouts in all)."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a campaign checked, and the first violation if there was one."""

    stats: Stats
    finding: Finding | None
    models: int


def known_configs() -> dict[str, HFConfig]:
    """The config.json of every model that ships with the package, by name."""
    folder = resources.files("isomoe") / "models" / "configs"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            found[entry.name.removesuffix(".json")] = json.loads(entry.read_text("utf-8"))
    return found


def prove_models(
    configs: Mapping[str, HFConfig],
    max_ranks: int,
    mutant: str | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
) -> Report:
    """Proves every valid layout of every model, or stops at the first violation.

    What may share plans is proven together, so that what is equal runs once.

    Args:
        mutant: a known defect to plant; the campaign must then find a violation.
        processes: how many to use; all cores by default.
    """
    jobs = _jobs(configs, max_ranks)
    total, done = sum(map(len, jobs)), 0
    stats = Stats()
    for part, finding in _results(jobs, configs, mutant, processes):
        stats.add(part)
        done += part.layouts
        if progress is not None:
            progress(done, total)
        if finding is not None:
            return Report(stats, finding, len(configs))
    return Report(stats, None, len(configs))


_Job = tuple[tuple[Parallelism, str], ...]
"""Layouts and the names of models on them, to be proven together."""


def _jobs(configs: Mapping[str, HFConfig], max_ranks: int) -> list[_Job]:
    """Every layout of every model, small ones first; those that share plans in one job."""
    alike: dict[Parallelism, list[tuple[Parallelism, str]]] = defaultdict(list)
    for name, config in configs.items():
        for layout in layouts(family_of(config), config, max_ranks):
            alike[replace(layout, enable_dp_lm_head=False)].append((layout, name))
    order = sorted(alike, key=lambda layout: layout.tp_size)
    return [tuple(alike[layout]) for layout in order]


def _results(
    jobs: list[_Job], configs: Mapping[str, HFConfig], mutant: str | None, processes: int | None
) -> Iterator[tuple[Stats, Finding | None]]:
    cores = processes or len(os.sched_getaffinity(0))
    if cores == 1 or mutant is not None or len(jobs) < 32:
        for job in jobs:
            yield _prove_job(job, configs, mutant)
        return
    pool = ProcessPoolExecutor(cores, mp_context=get_context("spawn"))
    try:
        # Large layouts first: the last job to end is then a short one.
        chunks = [pool.submit(_prove_job, job, dict(configs), mutant) for job in reversed(jobs)]
        for future in as_completed(chunks):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prove_job(
    job: _Job, configs: Mapping[str, HFConfig], mutant: str | None
) -> tuple[Stats, Finding | None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: threads only get in each other's way
    try:
        stats, proven = Stats(), set[object]()
        planted = find_mutant(mutant) if mutant is not None else None
        for layout, name in job:
            part, finding = prove(Subject.of(name, configs[name], layout), planted, proven)
            stats.add(part)
            if finding is not None:
                return stats, finding
        return stats, None
    finally:
        torch.set_num_threads(threads)


def expressible(mutant: str, configs: Iterable[HFConfig]) -> bool:
    """Whether any of the models has the part that a mutant changes."""
    part = {"dense": "dense FFN", "shared": "shared expert", "bias": "bias"}
    wanted = [kind for word, kind in part.items() if word in mutant.split("-")]
    return not wanted or any(_has(config, wanted[0]) for config in configs)


def _has(config: HFConfig, kind: str) -> bool:
    if kind == "bias":
        return bool(config.get("attention_bias"))
    model = Subject.of("", config, Parallelism()).build()
    return any(block.spec.kind == kind for block in model.blocks())
