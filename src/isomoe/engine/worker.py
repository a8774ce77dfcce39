"""One rank: the model with its weights, the KV cache, and the requests of its attention group."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from isomoe.blocks import Batch, SparseMoe
from isomoe.comm import (
    CommExchange,
    Communicator,
    ExpertExchange,
    LocalComm,
    torch_communicator,
)
from isomoe.comm.deepep import open_deepep
from isomoe.comm.rendezvous import join, local_device
from isomoe.config import EngineConfig, LoadFormat, MoeWeightFormat
from isomoe.engine.batches import Batches, CpuBatches
from isomoe.engine.gpu_batches import GpuBatches
from isomoe.engine.gpu_memory import free_for_cache, must_fit
from isomoe.engine.graphs import DecodeGraphs
from isomoe.engine.instrument import load_instrument
from isomoe.engine.kv_cache import CPU_CACHE_BYTES, pages_for
from isomoe.engine.laid_out import deepep_settings, laid_out, planned
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.residents import Residents
from isomoe.engine.sampler import Answer, Sampler
from isomoe.engine.step import MAX_SCORED_ROWS, GroupStep, StepShape
from isomoe.kernels import on_gpu
from isomoe.layout import Seat, TokenRows
from isomoe.stream import ResidualStream
from isomoe.weights import load_dummy, load_safetensors

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


ExpertLoad = dict[int, list[int]]
"""For each layer with experts, [E] how often each was served."""


class Worker:
    """One rank, from its weights to its answers.

    Construction loads the weights; `allocate_cache` must follow before the first step.

    Args:
        port: where the ranks meet; None for a lone rank.

    Attributes:
        use_graphs: whether captured steps are replayed; measurements turn it off for a while.

    Raises:
        ConfigError: if the model cannot be laid out so, or does not fit into a GPU's memory.
        CheckpointError: if the weights cannot be read.
    """

    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        info: ModelInfo,
        rank: int = 0,
        port: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.info = info
        self.dtype: torch.dtype = getattr(torch, info.dtype)
        self.device = local_device(info.device, rank)
        self.wire_dtype = self.dtype if self.device.type == "cuda" else torch.float32
        self.model = laid_out(config, info, rank)
        self.instrument = load_instrument(config.instrument)
        chain = self.model.chain
        if self.instrument is not None:
            chain = self.instrument.in_chain(chain)
            self.instrument.in_model(self.model)  # may change what is loaded
        self.plan = planned(config, info, chain)
        self.seat: Seat = self.model.seat
        with must_fit("the weights", "more ranks, or a GPU that nobody else uses,"):
            self._load(progress)
        self._loads = {
            index: block.record_load(self.device)
            for index, layer in enumerate(self.model.layers)
            for block in layer.ffn
            if isinstance(block, SparseMoe) and config.record_expert_load
        }
        with must_fit("the states of linear attention", "a smaller --max-running-requests"):
            for memory in self.model.memories():
                memory.allocate_states(config.max_running_requests, self.device)
        self.comm = self._communicator(port)
        self._exchange = self._open_exchange()
        self._residents = Residents(config.max_running_requests, info.diffusion)
        self._batches = self._make_batches()
        keeps = isinstance(self._batches, GpuBatches)
        first = self.seat.index(self.seat.mesh.attn_tp) == 0
        self._sampler = Sampler(self.comm, first, info.grammars(), keeps_tokens=keeps)
        self._graphs: DecodeGraphs | None = None
        self.use_graphs = True

    @torch.inference_mode()
    def available_bytes(self) -> int:
        """Memory that the KV cache may take: measured on a GPU, a budget on a CPU."""
        if self.device.type != "cuda":
            return CPU_CACHE_BYTES
        fraction, ranks = self.config.mem_fraction_static, self.seat.mesh.size
        with must_fit("the largest step", "a smaller --max-prefill-tokens"):
            return free_for_cache(self.device, fraction, ranks, self._profile)

    @torch.inference_mode()
    def allocate_cache(self, num_pages: int, graph_rows: Sequence[int] = ()) -> None:
        """Makes the KV cache of every layer, and captures steps of so many rows."""
        with must_fit("the KV cache", "a smaller --mem-fraction-static or --max-total-tokens"):
            for memory in self.model.memories():
                memory.allocate_cache(num_pages, self.info.page_size, self.dtype, self.device)
        if graph_rows and self.device.type == "cuda":
            with must_fit("the captured steps", "a smaller --mem-fraction-static"):
                self._graphs = DecodeGraphs(self._static_forward, graph_rows)
        for load in self._loads.values():
            load.reset()  # what was run up to here served nobody

    @torch.inference_mode()
    def launch(self, shape: StepShape, group: GroupStep) -> Answer | None:
        """Starts one step; the first rank of each attention group gets its answer.

        On a GPU this returns while the step runs, and the next may be launched; on a CPU it runs
        the step.
        """
        for request_id in group.left:
            self._sampler.forget(request_id)
        changes = self._residents.take(group)
        self._batches.update(changes, group.schedule is not None)
        logits = self._run(shape)
        self._residents.advance()
        sampled = self._sampler.launch(logits, self._residents.draws())
        if sampled.ids is not None and isinstance(self._batches, GpuBatches):
            self._batches.sampled(sampled.ids)
        return sampled.answer

    def expert_load(self) -> ExpertLoad:
        """How often this rank has served each of the model's experts."""
        return {index: load.counts() for index, load in self._loads.items()}

    def _run(self, shape: StepShape) -> Tensor:
        """The step's logits."""
        if self._graphs is not None and shape.padded is not None and self.use_graphs:
            assert isinstance(self._batches, GpuBatches)
            return self._graphs.replay(self._batches.fill(shape))
        return self._forward(self._batches.form(shape), shape.regime)

    def _forward(self, batch: Batch, regime: int) -> Tensor:
        plan = self.plan.regimes[regime]
        stream = ResidualStream(plan, self.comm, batch.rows, self.wire_dtype, self._exchange)
        if self.instrument is not None:
            self.instrument.in_stream(stream)
        return self.model.forward(batch, stream)

    def _static_forward(self, held: int) -> Tensor:
        """A step of `held` rows a group that only decodes, on its static inputs."""
        assert isinstance(self._batches, GpuBatches)
        groups = self.seat.mesh.parallelism.attn_dp_size
        return self._forward(self._batches.static_batch(held), self.plan.choose((held,) * groups))

    def _profile(self) -> None:
        """The most demanding step that will come, as far as memory goes, on a cache of its own."""
        assert isinstance(self._batches, GpuBatches)
        config, mesh = self.config, self.seat.mesh
        groups = mesh.parallelism.attn_dp_size
        memories = self.model.memories()
        for memory in memories:
            memory.allocate_cache(1, self.info.page_size, self.dtype, self.device)
        chunk, most = config.prefill_limits(self.device.type)
        longest = min(chunk, self.info.context_length)
        prompts = [min(longest, most - at) for at in range(0, most, longest)]
        decodes = config.max_running_requests
        total = decodes + most
        logits_rows = min(decodes + MAX_SCORED_ROWS, total)
        rows = TokenRows.of(mesh, (total,) * groups)
        columns = torch.zeros(3, total, dtype=torch.int32, device=self.device)
        columns[1, decodes:] = torch.cat([torch.arange(length) for length in prompts])
        starts = torch.tensor([*accumulate(prompts, initial=decodes)], dtype=torch.int32)
        lens = tuple((length, length) for length in prompts)
        batch = Batch(
            ids=columns[2].long(),
            positions=columns[1],
            attention=self._batches.paged_rows(columns, decodes, lens, starts.to(self.device)),
            rows=rows,
            logits_rows=rows.select([range(total - logits_rows, total)] * groups),
            rank=self.seat.rank,
        )
        self._forward(batch, self.plan.choose((total,) * groups))
        for memory in memories:
            memory.allocate_cache(0, self.info.page_size, self.dtype, self.device)

    def _make_batches(self) -> Batches:
        config = self.config
        page_size = self.info.page_size
        max_pages = pages_for(self.info.context_length, page_size)
        sizes = (page_size, config.max_running_requests, max_pages)
        if on_gpu(torch.empty(0, device=self.device)):
            return GpuBatches(
                self.seat, self._residents, *sizes, self.info.context_length, self.device
            )
        return CpuBatches(self.seat, self._residents, *sizes)

    def _load(self, progress: Progress | None) -> None:
        for leaf in self.model.leaves():
            leaf.allocate(self.dtype, self.device)
        slices = self.model.weight_slices()
        if self.config.load_format is LoadFormat.DUMMY:
            load_dummy(slices, self.config.random_seed)
        else:
            load_safetensors(
                self.info.folder,
                slices,
                self.model.ignores,
                progress,
                canonical=self.model.canonical,
                quantization=self.info.quantization,
                rounds=self.config.moe_weight_format is MoeWeightFormat.FP8,
            )
        for leaf in self.model.leaves():
            leaf.pack()

    def _open_exchange(self) -> ExpertExchange | None:
        if not self.config.parallelism.exchanges:
            return None
        deepep = deepep_settings(self.config, self.info, self.model)
        if deepep is None:
            return CommExchange(self.comm)
        routed = [block for block in self.model.blocks() if isinstance(block, SparseMoe)]
        return open_deepep(self.comm, deepep, max(len(block.experts.held) for block in routed))

    def _communicator(self, port: int | None) -> Communicator:
        if port is None:
            return LocalComm(self.seat)
        mesh = self.seat.mesh
        join(port, self.seat.rank, mesh.size, self.device)
        # Sampled ids go from the first rank of an attention group to the others.
        runs = self.plan.runs() | ({mesh.attn_tp} if mesh.attn_tp else set())
        if self.instrument is not None:  # a defect may use any group
            runs |= {mesh.all[i:j] for i in mesh.all for j in range(i + 1, len(mesh.all) + 1)}
        fused = self.plan.machine.fused
        return torch_communicator(
            self.seat,
            runs,
            self.device,
            fused=self.plan.fused_runs(),
            fused_bytes=fused.max_bytes if fused else 0,
        )
