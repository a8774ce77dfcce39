"""The proof over many models and layouts, on all cores."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch

from isomoe.layout import Parallelism
from isomoe.layout.parallelism import divisors
from isomoe.models import HFConfig, family_of, layouts
from isomoe.prove.finding import Finding, Stats
from isomoe.prove.mutants import find_mutant
from isomoe.prove.paths import on_path_of, paths
from isomoe.prove.runner import prove
from isomoe.prove.subject import Subject

Progress = Callable[[int, int], None]
"""Called with (jobs done, jobs in all); layouts of as many ranks and groups are one job."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a campaign checked, and the first violation if there was one."""

    stats: Stats
    finding: Finding | None
    models: int


def prove_models(
    configs: Mapping[str, HFConfig],
    max_ranks: int,
    mutant: str | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
    all_paths: bool = False,
) -> Report:
    """Proves every valid layout of every model, or stops at the first violation.

    What may share plans is proven together, so that what is equal runs once.

    Args:
        mutant: a known defect to plant; the campaign must then find a violation.
        processes: how many to use; all cores by default.
        all_paths: every way between attention and experts on each layout, not the plain one alone.
    """
    jobs = _jobs(max_ranks)
    stats = Stats()
    for done, (part, finding) in enumerate(
        _results(jobs, configs, mutant, processes, all_paths), 1
    ):
        stats.add(part)
        if progress is not None:
            progress(done, len(jobs))
        if finding is not None:
            return Report(stats, finding, len(configs))
    return Report(stats, None, len(configs))


_Job = tuple[int, int]
"""How many ranks, in how many attention-DP groups: layouts to be proven together."""


def _jobs(max_ranks: int) -> list[_Job]:
    """Few ranks first."""
    return [(ranks, groups) for ranks in range(1, max_ranks + 1) for groups in divisors(ranks)]


def _results(
    jobs: list[_Job],
    configs: Mapping[str, HFConfig],
    mutant: str | None,
    processes: int | None,
    all_paths: bool,
) -> Iterator[tuple[Stats, Finding | None]]:
    cores = processes or len(os.sched_getaffinity(0))
    if cores == 1 or mutant is not None or jobs[-1][0] < 8:
        for job in jobs:
            yield _prove_job(job, configs, mutant, all_paths)
        return
    pool = ProcessPoolExecutor(cores, mp_context=get_context("spawn"))
    try:
        # Large layouts first: the last job to end is then a short one.
        chunks = [
            pool.submit(_prove_job, job, dict(configs), mutant, all_paths) for job in reversed(jobs)
        ]
        for future in as_completed(chunks):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prove_job(
    job: _Job, configs: Mapping[str, HFConfig], mutant: str | None, all_paths: bool
) -> tuple[Stats, Finding | None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: threads only get in each other's way
    collects = gc.isenabled()
    gc.disable()  # looking for cycles took a third of the time; they go when the job is done
    try:
        stats = Stats()
        planted = find_mutant(mutant) if mutant is not None else None
        subjects = _subjects(job, configs, _ways(mutant, all_paths))
        for part, finding in prove(subjects, planted, fuses_all=all_paths):
            stats.add(part)
            if finding is not None:
                return stats, finding
        return stats, None
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


_Ways = Callable[[Parallelism], Iterable[Parallelism]]


def _ways(mutant: str | None, all_paths: bool) -> _Ways:
    """What is made of each layout: itself, each path on it, or the path that a mutant acts on."""
    if mutant is not None:
        path = Parallelism.parse(find_mutant(mutant).layout)
        return lambda layout: on_path_of(path, layout)
    return paths if all_paths else lambda layout: (layout,)


def _subjects(job: _Job, configs: Mapping[str, HFConfig], ways: _Ways) -> Iterator[Subject]:
    """Every model on every layout of a job that fits it."""
    ranks, groups = job
    for name, config in configs.items():
        one_rank = Subject.of(name, config, Parallelism())
        family = family_of(config)
        for layout in layouts(family, config, ranks, ranks, groups):
            for path in ways(layout) if family.has_sparse(config) else (layout,):
                yield replace(one_rank, layout=path)


def expressible(mutant: str, configs: Iterable[HFConfig]) -> bool:
    """Whether any of the models has the part that a mutant changes."""
    needs = find_mutant(mutant).needs
    return any(
        needs.is_in(block)
        for config in configs
        for block in Subject.of("", config, Parallelism()).build().blocks()
    )
