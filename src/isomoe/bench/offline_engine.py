"""Runs workloads through an `LLM` of this process, and looks into its decode steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isomoe.bench.offline_workload import OfflineWorkload, Sample
from isomoe.blocks import ExpertWeights
from isomoe.engine import LLM, EngineCore, Request, SamplingParams
from isomoe.engine.executor import LocalExecutor
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.worker import Worker
from isomoe.errors import ConfigError, IsomoeError

_WARMUP_TOKENS = 32
_SETTLED = 3
"""So many steps of decode in a row, and all prompts are in."""
_FIRST_ID = 1 << 40
"""Request ids that the engine's own do not reach."""


def check_context(info: ModelInfo, workload: OfflineWorkload) -> None:
    """Refuses a workload whose requests are too long for the model.

    Raises:
        ConfigError: if one is.
    """
    longest, most = workload.context_length, info.context_length
    if longest > most:
        raise ConfigError(
            f"workload {workload.name}: needs a context of {longest} tokens, and the model's (or "
            f"--context-length) is {most}; a custom one would fit (--input-len, --output-len)"
        )


def check_cache(llm: LLM, workload: OfflineWorkload) -> None:
    """Refuses a workload of which the KV cache cannot even hold one request.

    Raises:
        ConfigError: if so.
    """
    limits, longest = llm.core.scheduler.limits, workload.context_length
    room = limits.num_pages * limits.page_size
    if longest > room:
        raise ConfigError(
            f"workload {workload.name}: needs {longest} tokens of KV cache for one request, and "
            f"there is room for {room}; --max-total-tokens or more memory would help"
        )


def warm_up(llm: LLM, workload: OfflineWorkload) -> None:
    """Runs the workload's prompts with short answers, so that nothing is compiled later."""
    outputs = [min(length, _WARMUP_TOKENS) for length in workload.output_lens]
    _seconds(llm, workload.prompts(llm.info.vocab_size, "warm-up"), outputs)


def run_once(llm: LLM, workload: OfflineWorkload, repeat: int) -> Sample:
    """One repeat, with prompts of its own.

    Raises:
        IsomoeError: if the engine fails.
    """
    prompts = workload.prompts(llm.info.vocab_size, f"repeat {repeat}")
    first = None
    if workload.figure.is_decode:
        # Once before the clock runs: what a CPU's libraries prepare for the sizes that these
        # prompts give each expert would count in the first time alone.
        ones = [1] * workload.num_requests
        _seconds(llm, prompts, ones)
        first = _seconds(llm, prompts, ones)
    return Sample(seconds=_seconds(llm, prompts, workload.output_lens), first_seconds=first)


def _seconds(llm: LLM, prompts: Sequence[Sequence[int]], output_lens: Sequence[int]) -> float:
    params = [_params(length) for length in output_lens]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    found, wanted = sum(len(output.token_ids) for output in outputs), sum(output_lens)
    if found != wanted:
        raise IsomoeError(f"the engine made {found} tokens, and {wanted} were asked for")
    return seconds


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)


def lone_worker(llm: LLM) -> Worker | None:
    """The worker of an engine that runs in this process; None if there are several ranks."""
    executor = llm.core.executor
    return executor.worker if isinstance(executor, LocalExecutor) else None


@contextmanager
def requests_of(llm: LLM, workload: OfflineWorkload) -> Iterator[EngineCore]:
    """The workload's requests, queued in the engine; ended early when the block is left."""
    core = llm.core
    prompts = workload.prompts(llm.info.vocab_size, "steps")
    ids = range(_FIRST_ID, _FIRST_ID + len(prompts))
    for request_id, prompt, length in zip(ids, prompts, workload.output_lens, strict=True):
        core.add(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                params=_params(length),
                max_tokens=length,
            )
        )
    try:
        yield core
    finally:
        for request_id in ids:
            core.remove(request_id)
        while core.has_work:
            core.step()


def reach_decode(core: EngineCore) -> bool:
    """Steps until nothing but decode has run for some steps; whether that came."""
    settled = 0
    while core.has_work and settled < _SETTLED:
        core.step()
        settled = settled + 1 if _only_decodes(core) else 0
    return settled == _SETTLED


def _only_decodes(core: EngineCore) -> bool:
    step = core.last_step
    rows = [rows for schedule in step.schedules for rows in schedule.num_tokens] if step else []
    return bool(rows) and set(rows) == {1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCount:
    """What the routers chose in some decode steps.

    Attributes:
        rows: of a step.
        steps: that were looked at.
        distinct: experts of a layer that any row chose, in the mean over layers and steps.
        busiest: pairs of the busiest expert of a layer over an even share, in the mean.
    """

    rows: int
    steps: int
    distinct: float
    busiest: float

    def to_json(self) -> dict[str, float]:
        """As plain numbers."""
        return {
            "rows": self.rows,
            "steps": self.steps,
            "distinct": round(self.distinct, 3),
            "busiest_over_even": round(self.busiest, 3),
        }


def count_experts(llm: LLM, workload: OfflineWorkload, steps: int) -> ExpertCount | None:
    """Runs some decode steps eagerly and counts the distinct experts of a layer.

    Returns None for models without experts, for several ranks, and where no step is decode alone.
    """
    worker = lone_worker(llm)
    leaves = (
        [leaf for leaf in worker.model.leaves() if isinstance(leaf, ExpertWeights)]
        if worker
        else []
    )
    if worker is None or not leaves:
        return None
    seen: list[Tensor] = []
    used_graphs = worker.use_graphs
    worker.use_graphs = False
    try:
        with requests_of(llm, workload) as core:
            if not reach_decode(core):
                return None
            with _recording(leaves, seen):
                done = 0
                while done < steps and core.has_work and _only_decodes(core):
                    core.step()
                    done += 1
    finally:
        worker.use_graphs = used_graphs
    return _counted(seen, leaves[0].num_experts, len(leaves))


@contextmanager
def _recording(leaves: Sequence[ExpertWeights], seen: list[Tensor]) -> Iterator[None]:
    """Each call of the experts leaves a copy of the ids that it was given."""
    for leaf in leaves:
        forward = leaf.forward

        def recorded(*args: Any, forward: Callable[..., Tensor] = forward) -> Tensor:
            seen.append(args[1].clone())
            return forward(*args)

        leaf.forward = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        for leaf in leaves:
            del leaf.forward


def _counted(seen: Sequence[Tensor], num_experts: int, layers: int) -> ExpertCount | None:
    distinct, busiest, rows = [], [], 0
    for ids in seen:
        pairs = ids[ids >= 0].cpu().long()
        if not pairs.numel():
            continue
        rows = int((ids >= 0).any(dim=1).sum())
        counts = torch.bincount(pairs, minlength=num_experts)
        distinct.append(int((counts > 0).sum()))
        busiest.append(float(counts.max()) * num_experts / pairs.numel())
    if not distinct:
        return None
    return ExpertCount(
        rows=rows,
        steps=len(distinct) // layers,
        distinct=sum(distinct) / len(distinct),
        busiest=sum(busiest) / len(busiest),
    )
