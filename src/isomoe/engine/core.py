"""The engine core: requests in, steps, tokens out."""

from dataclasses import dataclass, field

import torch

from isomoe.config import EngineConfig
from isomoe.engine.executor import Executor, LocalExecutor, Progress
from isomoe.engine.kv_cache import num_cache_pages
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.outputs import FinishReason, TokenLogprob
from isomoe.engine.processes import ProcessExecutor
from isomoe.engine.scheduler import Limits, Scheduler
from isomoe.engine.step import GroupOutput, Request
from isomoe.layout import MACHINES, make_plan
from isomoe.models import CausalLM, build


@dataclass(slots=True)
class Update:
    """What a step brought one request.

    Attributes:
        token_id: the new token, None where the step brought prompt logprobs alone.
        finish_reason: None if it goes on.
        logprob: the new token's, if asked for.
        prompt_logprobs: those of further prompt tokens, if asked for.
    """

    request_id: int
    token_id: int | None = None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class EngineCore:
    """One replica: a scheduler for all attention-DP groups, and the workers of all ranks.

    Construction starts the workers and loads the weights.

    Args:
        progress: told how the weights come in.

    Raises:
        ConfigError: if the settings fit neither one another nor the model.
        CheckpointError: if the checkpoint cannot be read.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.info = ModelInfo.of(config)
        # What can be refused is refused before any worker starts.
        model = build(self.info.hf_config, config.parallelism)
        self.plan = make_plan(model.chain, MACHINES[self.info.device])
        kind = LocalExecutor if config.parallelism.tp_size == 1 else ProcessExecutor
        self.executor: Executor = kind(config, self.info, progress)
        try:
            self.scheduler = Scheduler(self._limits(model), self.plan.choose)
            self.executor.allocate_cache(self.scheduler.limits.num_pages)
        except BaseException:
            self.shutdown()
            raise

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queues a request, to run from the next step on.

        Raises:
            RequestError: if the KV cache could never hold it.
        """
        self.scheduler.add(request)

    def remove(self, request_id: int) -> None:
        """Ends a request early."""
        self.scheduler.remove(request_id)

    def step(self) -> list[Update]:
        """Runs one step; what it brought, request by request. Nothing if there is no work.

        Raises:
            EngineDeadError: if a worker failed; nothing can be run afterwards.
        """
        step = self.scheduler.schedule()
        if step is None:
            return []
        outputs = self.executor.execute(step)
        advanced = self.scheduler.update(step, [output.token_ids for output in outputs])
        updates: list[Update] = []
        for part, output, advances in zip(step.groups, outputs, advanced, strict=True):
            mine = [Update(*advance) for advance in advances]
            if output.logprobs or output.prompt_logprobs:
                mine = _with_logprobs(mine, part.request_ids, part.samples, output)
            updates += mine
        return updates

    def shutdown(self) -> None:
        """Ends the workers. May be called twice."""
        self.executor.shutdown()

    def _limits(self, model: CausalLM) -> Limits:
        config = self.config
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        pages = num_cache_pages(
            max_total_tokens=config.max_total_tokens,
            page_size=config.page_size,
            bytes_per_page=sum(
                core.cache_bytes_per_page(config.page_size, dtype)
                for core in model.attention_cores()
            ),
            available_bytes=self.executor.available_bytes,
            max_running_requests=config.max_running_requests,
            context_length=self.info.context_length,
        )
        return Limits(
            attn_dp_size=config.parallelism.attn_dp_size,
            num_pages=pages,
            page_size=config.page_size,
            max_running_requests=config.max_running_requests,
            token_budget=config.chunked_prefill_size,
        )


def _with_logprobs(
    updates: list[Update],
    request_ids: tuple[int, ...],
    samples: tuple[bool, ...],
    output: GroupOutput,
) -> list[Update]:
    by_id = {update.request_id: update for update in updates}
    sampled = [request_id for request_id, drawn in zip(request_ids, samples, strict=True) if drawn]
    if output.logprobs:
        for request_id, logprob in zip(sampled, output.logprobs, strict=True):
            if request_id in by_id:
                by_id[request_id].logprob = logprob
    for request_id, scored in output.prompt_logprobs.items():
        if request_id not in by_id:
            by_id[request_id] = Update(request_id)
        by_id[request_id].prompt_logprobs = scored
    return list(by_id.values())
