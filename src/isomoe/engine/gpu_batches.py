"""Batches on a GPU: their inputs go there in one copy, and sampled tokens never leave it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from isomoe.blocks import Batch
from isomoe.engine.batches import Batches
from isomoe.engine.residents import Residents, TableChange
from isomoe.engine.step import StepShape
from isomoe.engine.transfer import to_device
from isomoe.kernels import PagedRows
from isomoe.layout import LogitsRows, Seat, TokenRows

_UNKNOWN = -1
"""Stands for a token that was sampled on the device and has not reached the host."""


class GpuBatches(Batches):
    """For the Triton kernels.

    A row is told by three numbers: its request's slot (-1 is padding), its position, and its token
    if the host knows it. Steps that only decode have static inputs, one for each number of rows,
    so that they can be captured.

    Args:
        max_requests, max_pages: the size of the block tables.
        max_context: the most tokens of a request.
    """

    def __init__(
        self,
        seat: Seat,
        residents: Residents,
        page_size: int,
        max_requests: int,
        max_pages: int,
        max_context: int,
        device: torch.device,
    ) -> None:
        super().__init__(seat, residents, page_size)
        self._device = device
        self._max_context = max_context
        self._no_slot = max_requests
        self._tables = torch.zeros(max_requests, max_pages, dtype=torch.int32, device=device)
        # The last token of each slot; one more, so that padding has something to read.
        self._last_tokens = torch.zeros(max_requests + 1, dtype=torch.int64, device=device)
        self._static: dict[int, Tensor] = {}

    def update(self, changes: Sequence[TableChange], renewed: bool) -> None:
        if not changes:
            return
        width = self._tables.shape[1]
        places: list[int] = []
        pages: list[int] = []
        for slot, place, new in changes:
            first = slot * width + place
            places += range(first, first + len(new))
            pages += new
        # A place may change twice in a step; the last change counts.
        last = dict(zip(places, pages, strict=True))
        moved = to_device([[*last], [*last.values()]], torch.int64, self._device)
        self._tables.view(-1).index_copy_(0, moved[0], moved[1].int())

    def form(self, shape: StepShape) -> Batch:
        if shape.padded is not None:
            return self.static_batch(self.fill(shape))
        slots, positions, ids = self._columns()
        lens = self.residents.schedule.num_tokens
        num_decodes = next((at for at, tokens in enumerate(lens) if tokens > 1), len(lens))
        rows, logits_rows = self.row_maps(shape)
        total = len(slots)
        prefills: list[tuple[int, int]] = []
        starts = [num_decodes]
        for member, tokens in zip(
            self.residents.members[num_decodes:], lens[num_decodes:], strict=True
        ):
            prefills.append((tokens, member.computed + tokens))
            starts.append(starts[-1] + tokens)
        given = to_device([*slots, *positions, *ids, *starts], torch.int32, self._device)
        columns = given[: 3 * total].view(3, total)
        attention = self.paged_rows(columns, num_decodes, tuple(prefills), given[3 * total :])
        return Batch(
            ids=self._ids(columns),
            positions=columns[1],
            attention=attention,
            rows=rows,
            logits_rows=logits_rows,
            rank=self.seat.rank,
        )

    def sampled(self, ids: Tensor) -> None:
        """Keeps the tokens that the current step has sampled. ids: [sampling requests] int64."""
        residents = self.residents
        slots = [
            member.slot
            for member, samples in zip(residents.members, residents.schedule.samples, strict=True)
            if samples
        ]
        self._last_tokens.index_copy_(0, to_device(slots, torch.int64, self._device), ids)

    def static_batch(self, held: int) -> Batch:
        """The batch of a step that only decodes, `held` rows in each group; `fill` fills it.

        Its tensors are made from the static inputs here and now: a capture records how.
        """
        static = self._inputs(held)
        columns = static[: 3 * held].view(3, held)
        groups = self.seat.mesh.parallelism.attn_dp_size
        counts = static[3 * held :].unsqueeze(1)
        real = (torch.arange(held, device=self._device) < counts).flatten()
        every = TokenRows.of(self.seat.mesh, (held,) * groups)
        return Batch(
            ids=self._ids(columns),
            positions=columns[1],
            attention=self.paged_rows(columns, held),
            rows=every,
            logits_rows=_all_rows(every, held),
            rank=self.seat.rank,
            real=real,
        )

    def paged_rows(
        self,
        columns: Tensor,
        num_decodes: int,
        prefills: tuple[tuple[int, int], ...] = (),
        starts: Tensor | None = None,
    ) -> PagedRows:
        """What attention gets of rows. columns: [3, rows] int32, slots and positions first."""
        return PagedRows(
            table_rows=columns[0],
            positions=columns[1],
            block_tables=self._tables,
            page_size=self.page_size,
            num_decodes=num_decodes,
            max_context=self._max_context,
            prefill_lens=prefills,
            prefill_starts=starts if prefills else None,
        )

    def fill(self, shape: StepShape) -> int:
        """Fills the static inputs of a step that only decodes; how many rows it has here."""
        assert shape.padded is not None
        held = shape.padded[self.group]
        slots, positions, ids = self._columns()
        padding = held - len(slots)
        slots += [-1] * padding
        positions += [0] * padding
        ids += [0] * padding
        given = [*slots, *positions, *ids, *shape.rows]
        host = torch.tensor(given, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._inputs(held).copy_(host, non_blocking=True)
        return held

    def _columns(self) -> tuple[list[int], list[int], list[int]]:
        """Each row's slot, position and token."""
        slots: list[int] = []
        positions: list[int] = []
        ids: list[int] = []
        residents = self.residents
        for member, tokens in zip(residents.members, residents.schedule.num_tokens, strict=True):
            first = member.computed
            if tokens == 1:
                slots.append(member.slot)
                positions.append(first)
                ids.append(member.tokens[first] if first < len(member.tokens) else _UNKNOWN)
            else:
                slots += [member.slot] * tokens
                positions += range(first, first + tokens)
                ids += member.tokens[first : first + tokens]
        return slots, positions, ids

    def _ids(self, columns: Tensor) -> Tensor:
        """[rows] int64: the token of each row, from the host or from the step before."""
        slots = torch.where(columns[0] < 0, self._no_slot, columns[0]).long()
        return torch.where(columns[2] < 0, self._last_tokens[slots], columns[2])

    def _inputs(self, held: int) -> Tensor:
        """The static inputs: slots, positions, tokens; and each group's rows without padding."""
        if held not in self._static:
            size = 3 * held + self.seat.mesh.parallelism.attn_dp_size
            self._static[held] = torch.zeros(size, dtype=torch.int32, device=self._device)
        return self._static[held]


def _all_rows(rows: TokenRows, held: int) -> LogitsRows:
    return rows.select([range(held)] * len(rows.groups))
