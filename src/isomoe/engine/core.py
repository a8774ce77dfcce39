"""The engine core: requests in, steps, tokens out."""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from operator import add

import torch

from isomoe.config import EngineConfig
from isomoe.engine.diffusion import BlockDiffusing
from isomoe.engine.executor import Executor, LocalExecutor, Progress
from isomoe.engine.generation import Autoregressive, Generation
from isomoe.engine.kv_cache import num_cache_pages
from isomoe.engine.laid_out import laid_out, planned
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.outputs import Update
from isomoe.engine.processes import ProcessExecutor
from isomoe.engine.scheduler import Limits, Scheduler
from isomoe.engine.step import MAX_SCORED_ROWS, GroupOutput, Request, Step
from isomoe.errors import ConfigError
from isomoe.layout import Op
from isomoe.models import CausalLM, family_of

_LOG = logging.getLogger(__name__)


class EngineCore:
    """One replica: a scheduler for all attention-DP groups, and the workers of all ranks.

    Construction starts the workers and loads the weights.

    Args:
        progress: told how the weights come in.

    Attributes:
        last_step: what `step` ran last.

    Raises:
        ConfigError: if the settings fit neither one another nor the model.
        CheckpointError: if the checkpoint cannot be read.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.info = ModelInfo.of(config)
        # What can be refused is refused before any worker starts.
        model = laid_out(config, self.info)
        self.plan = planned(config, self.info, model.chain)
        kind = LocalExecutor if config.parallelism.tp_size == 1 else ProcessExecutor
        self.last_step: Step | None = None
        self._under_way: deque[Step] = deque()
        self._depth = 2 if config.overlaps(self.info.device) else 1
        self.executor: Executor = kind(config, self.info, progress)
        try:
            self.scheduler = Scheduler(self._limits(model), self.plan.choose, self._generation())
            limits = self.scheduler.limits
            self.executor.allocate_cache(limits.num_pages, limits.graph_rows)
        except BaseException:
            self.shutdown()
            raise

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running, or a step under way."""
        return self.scheduler.has_work or bool(self._under_way)

    def add(self, request: Request) -> None:
        """Queues a request, to run from the next step on.

        Raises:
            RequestError: if the KV cache could never hold it.
        """
        self.scheduler.add(request)

    def remove(self, request_id: int) -> None:
        """Ends a request early."""
        self.scheduler.remove(request_id)

    def check_alive(self) -> None:
        """Raises EngineDeadError if a worker has ended; for when no step would notice."""
        self.executor.check_alive()

    def step(self) -> list[Update]:
        """Sees one step to its end; what it brought, request by request. Nothing without work.

        Where scheduling overlaps with running, the next step is under way by then.

        Raises:
            EngineDeadError: if a worker failed; nothing can be run afterwards.
        """
        while len(self._under_way) < self._depth:
            ahead = self.scheduler.schedule()
            if ahead is None:
                break
            self.executor.launch(ahead)
            self._under_way.append(ahead)
        step = self.last_step = self._under_way.popleft() if self._under_way else None
        if step is None:
            return []
        outputs = self.executor.collect()
        updates: list[Update] = []
        for output, mine in zip(outputs, self.scheduler.update(step, outputs), strict=True):
            updates += _with_prompt_logprobs(mine, output) if output.prompt_logprobs else mine
        return updates

    def expert_load(self) -> list[list[int]]:
        """How often each expert was chosen so far: [layers][E], empty for a layer without experts.

        Steps under way count; it waits for them.

        Raises:
            ConfigError: if it is not recorded.
            EngineDeadError: if a worker failed; nothing can be run afterwards.
        """
        if not self.config.record_expert_load:
            raise ConfigError("the experts' load is not recorded; record_expert_load=True does it")
        total: dict[int, list[int]] = {}
        for found in self.executor.expert_load():
            for layer, counts in found.items():
                seen = total.setdefault(layer, [0] * len(counts))
                total[layer] = list(map(add, seen, counts))
        layers = family_of(self.info.hf_config).num_layers(self.info.hf_config)
        return [total.get(layer, []) for layer in range(layers)]

    def shutdown(self) -> None:
        """Ends the workers. May be called twice."""
        self.executor.shutdown()

    def _limits(self, model: CausalLM) -> Limits:
        config = self.config
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        pages = num_cache_pages(
            max_total_tokens=config.max_total_tokens,
            page_size=self.info.page_size,
            bytes_per_page=self.info.page_size
            * sum(memory.cache_bytes_per_token(dtype) for memory in model.memories()),
            available_bytes=self.executor.available_bytes,
            max_running_requests=config.max_running_requests,
            context_length=self.info.context_length,
        )
        chunk, most = config.prefill_limits(self.info.device)
        # A state cannot be cut back to a prefix.
        has_states = any(memory.state_bytes() for memory in model.memories())
        if has_states and not config.disable_radix_cache:
            _LOG.info("no prefixes are cached: linear attention keeps a state, not pages")
        return Limits(
            attn_dp_size=config.parallelism.attn_dp_size,
            num_pages=pages,
            page_size=self.info.page_size,
            max_running_requests=config.max_running_requests,
            chunked_prefill_size=chunk,
            max_prefill_tokens=most,
            prefix_cache=not (config.disable_radix_cache or has_states),
            max_scored_rows=max(MAX_SCORED_ROWS, self._block_size),
            graph_rows=self._graph_rows(),
        )

    @property
    def _block_size(self) -> int:
        """Rows that a request draws from at once."""
        return 1 if self.info.diffusion is None else self.info.diffusion.block_size

    def _generation(self) -> Callable[[Request], Generation]:
        if self.info.diffusion is None:
            return Autoregressive
        return partial(BlockDiffusing, block_size=self._block_size)

    def _graph_rows(self) -> tuple[int, ...]:
        """The numbers of rows that steps are captured for, on devices that can."""
        config = self.config
        if config.disable_cuda_graph or not self.executor.can_capture:
            return ()
        if config.instrument is not None:  # sees the stream of each step, and a replay has none
            return ()
        ladder = graph_ladder(min(config.cuda_graph_max_bs, config.max_running_requests))
        return tuple(takewhile(lambda rows: not self._exchanges(rows), ladder))

    def _exchanges(self, rows: int) -> bool:
        """Whether rows go to their experts in steps of so many in each group: how many will arrive
        is not known before, so such a step cannot be captured."""
        plan = self.plan.regimes[self.plan.choose((rows,) * self.config.parallelism.attn_dp_size)]
        return any(move.op is Op.DISPATCH for move in plan.moves())


def graph_ladder(most: int) -> tuple[int, ...]:
    """Numbers of rows up to `most`: steps that waste little, and are not too many to keep."""
    found = [rows for rows in (1, 2, 4, *range(8, 65, 8), *range(80, most, 16)) if rows < most]
    return (*found, most)


def _with_prompt_logprobs(updates: list[Update], output: GroupOutput) -> list[Update]:
    by_id = {update.request_id: update for update in updates}
    for request_id, scored in output.prompt_logprobs.items():
        if request_id not in by_id:
            by_id[request_id] = Update(request_id)
        by_id[request_id].prompt_logprobs = tuple(scored)
    return list(by_id.values())
