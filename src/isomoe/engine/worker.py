"""One rank: the model with its weights, the KV cache, and the requests of its attention group."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isomoe.blocks import Batch
from isomoe.comm import Communicator, LocalComm, torch_communicator
from isomoe.comm.rendezvous import join
from isomoe.config import EngineConfig, LoadFormat
from isomoe.engine.instrument import load_instrument
from isomoe.engine.kv_cache import CPU_CACHE_BYTES, pages_for
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.sampler import Draw, Sampler
from isomoe.engine.step import GroupOutput, GroupStep, Request, Schedule, StepShape
from isomoe.kernels import AttentionBatch
from isomoe.layout import MACHINES, LogitsRows, Seat, TokenRows, make_plan
from isomoe.models import build
from isomoe.stream import ResidualStream
from isomoe.weights import load_dummy, load_safetensors

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


@dataclass(slots=True, eq=False)
class _Running:
    """A request on this rank.

    Attributes:
        slot: its row in the block tables.
        num_pages: its entries there.
        tokens: prompt and output so far.
        computed: tokens whose keys are cached.
    """

    request: Request
    slot: int
    num_pages: int
    tokens: list[int]
    computed: int


class Worker:
    """One rank, from its weights to its answers.

    Construction loads the weights; `allocate_cache` must follow before the first step.

    Args:
        port: where the ranks meet; None for a lone rank.

    Raises:
        ConfigError: if the model cannot be laid out so.
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
        self.device = torch.device(info.device)
        self.wire_dtype = torch.float32
        self.model = build(info.hf_config, config.parallelism, rank)
        self.instrument = load_instrument(config.instrument)
        chain = self.model.chain
        if self.instrument is not None:
            chain = self.instrument.in_chain(chain)
        self.plan = make_plan(chain, MACHINES[self.device.type])
        self.seat: Seat = self.model.seat
        self._load(progress)
        self.comm = self._communicator(port)
        mesh = self.seat.mesh
        self.group_index = self.seat.index(mesh.attn_dp)
        self.answers = self.seat.index(mesh.attn_tp) == 0
        self._sampler = Sampler(self.comm, self.answers, info.grammars())
        self._running: dict[int, _Running] = {}
        self._slots = list(range(config.max_running_requests - 1, -1, -1))
        self._tables = torch.zeros(
            config.max_running_requests,
            pages_for(info.context_length, config.page_size),
            dtype=torch.int64,
            device=self.device,
        )
        self._schedule = Schedule()
        self._members: list[_Running] = []
        self._table: Tensor | None = None
        self._rows: tuple[StepShape, TokenRows, LogitsRows] | None = None

    def available_bytes(self) -> int:
        """Memory that the KV cache may take by default: a budget, not a measurement."""
        return CPU_CACHE_BYTES

    @torch.inference_mode()
    def allocate_cache(self, num_pages: int) -> None:
        """Makes the KV cache of every layer."""
        for core in self.model.attention_cores():
            core.allocate_cache(num_pages, self.config.page_size, self.dtype, self.device)

    @torch.inference_mode()
    def execute(self, shape: StepShape, group: GroupStep) -> GroupOutput | None:
        """Runs one step; the first rank of each attention group gets its answer."""
        self._take(group)
        batch = self._batch(shape)
        stream = ResidualStream(
            self.plan.regimes[shape.regime], self.comm, batch.rows, self.wire_dtype
        )
        if self.instrument is not None:
            self.instrument.in_stream(stream)
        logits = self.model.forward(batch, stream)
        draws = [
            Draw(member.request, member.tokens, member.computed - wanted, wanted, samples)
            for member, wanted, samples in zip(
                self._members, self._schedule.num_logits, self._schedule.samples, strict=True
            )
            if wanted
        ]
        return self._sampler.run(logits, draws)

    def _load(self, progress: Progress | None) -> None:
        for leaf in self.model.leaves():
            leaf.allocate(self.dtype, self.device)
        slices = self.model.weight_slices()
        if self.config.load_format is LoadFormat.DUMMY:
            load_dummy(slices, self.config.random_seed)
        else:
            load_safetensors(self.info.folder, slices, self.model.ignores, progress)
        for leaf in self.model.leaves():
            leaf.pack()
        if self.instrument is not None:
            self.instrument.in_model(self.model)

    def _communicator(self, port: int | None) -> Communicator:
        if port is None:
            return LocalComm(self.seat)
        mesh = self.seat.mesh
        join(port, self.seat.rank, mesh.size, self.device)
        # Sampled ids go from the first rank of an attention group to the others.
        own = {mesh.attn_tp} if mesh.attn_tp else set()
        return torch_communicator(self.seat, self.plan.runs() | own)

    def _take(self, group: GroupStep) -> None:
        """Brings the requests, their block tables and the schedule up to date."""
        for request_id in group.left:
            self._slots.append(self._running.pop(request_id).slot)
            self._sampler.forget(request_id)
        for joined in group.joined:
            request, pages = joined.request, joined.pages
            slot = self._slots.pop()
            self._running[request.request_id] = _Running(
                request=request,
                slot=slot,
                num_pages=len(pages),
                tokens=[*request.prompt_token_ids, *joined.output_ids],
                computed=joined.computed,
            )
            self._tables[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64)
        for request_id, place, page in group.table:
            member = self._running[request_id]
            member.num_pages = max(member.num_pages, place + 1)
            self._tables[member.slot, place] = page
        if group.schedule is not None:
            self._schedule = group.schedule
            self._members = [self._running[request_id] for request_id in group.schedule.request_ids]
        if group.schedule is not None or group.table:
            self._table = None

    def _batch(self, shape: StepShape) -> Batch:
        ids: list[int] = []
        context_lens: list[int] = []
        for member, tokens in zip(self._members, self._schedule.num_tokens, strict=True):
            stop = member.computed + tokens
            ids += member.tokens[member.computed : stop]
            member.computed = stop
            context_lens.append(stop)
        attention = AttentionBatch(
            query_lens=self._schedule.num_tokens,
            context_lens=tuple(context_lens),
            block_tables=self._block_tables(),
            page_size=self.config.page_size,
        )
        positions = attention.positions
        if shape.padded is not None:
            padding = shape.padded[self.group_index] - len(ids)
            ids += [0] * padding
            positions = torch.cat([positions, positions.new_zeros(padding)])
        rows, logits_rows = self._row_maps(shape)
        return Batch(
            ids=torch.tensor(ids, dtype=torch.int64, device=self.device),
            positions=positions,
            attention=attention,
            rows=rows,
            logits_rows=logits_rows,
            rank=self.seat.rank,
        )

    def _block_tables(self) -> Tensor:
        """The members' pages, kept while neither they nor their pages change."""
        if self._table is None:
            slots = [member.slot for member in self._members]
            width = max((member.num_pages for member in self._members), default=1)
            index = torch.tensor(slots, dtype=torch.int64, device=self.device)
            self._table = self._tables[index, :width]
        return self._table

    def _row_maps(self, shape: StepShape) -> tuple[TokenRows, LogitsRows]:
        """The step's row maps, kept while steps have the same shape."""
        if self._rows is None or self._rows[0] is not shape:
            rows = TokenRows.of(self.seat.mesh, shape.rows, shape.padded)
            self._rows = shape, rows, rows.select(shape.logits_rows)
        return self._rows[1], self._rows[2]
