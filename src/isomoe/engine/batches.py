"""From the requests of a step to the batch that the model takes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from isomoe.blocks import Batch
from isomoe.engine.residents import Residents, TableChange
from isomoe.engine.step import StepShape
from isomoe.kernels import AttentionBatch
from isomoe.layout import LogitsRows, Seat, TokenRows


class Batches(ABC):
    """Forms a rank's batches; holds the block tables on its device.

    Args:
        seat: the rank.
        residents: the requests on it.
        page_size: tokens of a page.
    """

    def __init__(self, seat: Seat, residents: Residents, page_size: int) -> None:
        self.seat = seat
        self.residents = residents
        self.page_size = page_size
        self.group = seat.index(seat.mesh.attn_dp)
        self._rows: tuple[StepShape, TokenRows, LogitsRows] | None = None

    @abstractmethod
    def update(self, changes: Sequence[TableChange], renewed: bool) -> None:
        """Brings the block tables up to date.

        Args:
            renewed: whether the step has another schedule than the last one.
        """

    @abstractmethod
    def form(self, shape: StepShape) -> Batch:
        """The batch of the residents' current step, which is not yet counted as computed."""

    def row_maps(self, shape: StepShape) -> tuple[TokenRows, LogitsRows]:
        """The step's row maps, kept while steps have the same shape."""
        if self._rows is None or self._rows[0] is not shape:
            rows = TokenRows.of(self.seat.mesh, shape.rows, shape.padded)
            self._rows = shape, rows, rows.select(shape.logits_rows)
        return self._rows[1], self._rows[2]


class CpuBatches(Batches):
    """For the plain-torch kernels, which want every request's pages one after the other.

    Args:
        max_requests, max_pages: the size of the block tables.
    """

    def __init__(
        self, seat: Seat, residents: Residents, page_size: int, max_requests: int, max_pages: int
    ) -> None:
        super().__init__(seat, residents, page_size)
        self._tables = torch.zeros(max_requests, max_pages, dtype=torch.int64)
        self._table: Tensor | None = None

    def update(self, changes: Sequence[TableChange], renewed: bool) -> None:
        for slot, place, pages in changes:
            self._tables[slot, place : place + len(pages)] = torch.tensor(pages, dtype=torch.int64)
        if renewed or changes:
            self._table = None

    def form(self, shape: StepShape) -> Batch:
        residents = self.residents
        ids: list[int] = []
        context_lens: list[int] = []
        for member, tokens in zip(residents.members, residents.schedule.num_tokens, strict=True):
            ids += member.ids(tokens)
            context_lens.append(member.computed + tokens)
        attention = AttentionBatch(
            query_lens=residents.schedule.num_tokens,
            context_lens=tuple(context_lens),
            block_tables=self._block_tables(),
            page_size=self.page_size,
            state_slots=tuple([member.slot for member in residents.members]),
        )
        positions = attention.positions
        if shape.padded is not None:
            padding = shape.padded[self.group] - len(ids)
            ids += [0] * padding
            positions = torch.cat([positions, positions.new_zeros(padding)])
        rows, logits_rows = self.row_maps(shape)
        return Batch(
            ids=torch.tensor(ids, dtype=torch.int64),
            positions=positions,
            attention=attention,
            rows=rows,
            logits_rows=logits_rows,
            rank=self.seat.rank,
        )

    def _block_tables(self) -> Tensor:
        """The members' pages, kept while neither they nor their pages change."""
        if self._table is None:
            members = self.residents.members
            width = max((member.num_pages for member in members), default=1)
            slots = torch.tensor([member.slot for member in members], dtype=torch.int64)
            self._table = self._tables[slots, :width]
        return self._table
