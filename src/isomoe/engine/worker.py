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
from isomoe.engine.step import GroupOutput, GroupStep, Joined, Request, StepShape
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
        slot: its row in the block table.
        num_pages: its entries there.
        tokens: prompt and output so far.
        computed: tokens whose keys are cached.
    """

    request: Request
    slot: int
    num_pages: int
    tokens: list[int]
    computed: int = 0


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
        self._sampler = Sampler(self.comm, self.answers)
        self._running: dict[int, _Running] = {}
        self._slots = list(range(config.max_running_requests - 1, -1, -1))
        self._tables = torch.zeros(
            config.max_running_requests,
            pages_for(info.context_length, config.page_size),
            dtype=torch.int64,
            device=self.device,
        )
        self._table: tuple[tuple[int, ...], Tensor] = ((), self._tables[:0])
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
        for request_id in group.left:
            self._slots.append(self._running.pop(request_id).slot)
        for joined in group.joined:
            self._join(joined)
        members = [self._running[request_id] for request_id in group.request_ids]
        batch = self._batch(shape, group, members)
        stream = ResidualStream(
            self.plan.regimes[shape.regime], self.comm, batch.rows, self.wire_dtype
        )
        if self.instrument is not None:
            self.instrument.in_stream(stream)
        logits = self.model.forward(batch, stream)
        draws = [
            Draw(member.request, member.tokens, member.computed - tokens, wanted, samples)
            for member, tokens, wanted, samples in zip(
                members, group.num_tokens, group.num_logits, group.samples, strict=True
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

    def _join(self, joined: Joined) -> None:
        slot = self._slots.pop()
        request, pages = joined.request, joined.pages
        tokens = list(request.prompt_token_ids)
        self._running[request.request_id] = _Running(request, slot, len(pages), tokens)
        self._tables[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64)

    def _batch(self, shape: StepShape, group: GroupStep, members: list[_Running]) -> Batch:
        ids: list[int] = []
        context_lens: list[int] = []
        for member, tokens in zip(members, group.num_tokens, strict=True):
            stop = member.computed + tokens
            ids += member.tokens[member.computed : stop]
            member.computed = stop
            context_lens.append(stop)
        attention = AttentionBatch(
            query_lens=group.num_tokens,
            context_lens=tuple(context_lens),
            block_tables=self._block_tables(group.request_ids, members),
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

    def _block_tables(self, request_ids: tuple[int, ...], members: list[_Running]) -> Tensor:
        """The members' pages, kept while the same requests run: theirs never change."""
        if self._table[0] != request_ids:
            slots = torch.tensor([m.slot for m in members], dtype=torch.int64, device=self.device)
            width = max((member.num_pages for member in members), default=1)
            self._table = request_ids, self._tables[slots, :width]
        return self._table[1]

    def _row_maps(self, shape: StepShape) -> tuple[TokenRows, LogitsRows]:
        """The step's row maps, kept while steps have the same shape."""
        if self._rows is None or self._rows[0] != shape:
            rows = TokenRows.of(self.seat.mesh, shape.rows, shape.padded)
            self._rows = shape, rows, rows.select(shape.logits_rows)
        return self._rows[1], self._rows[2]
