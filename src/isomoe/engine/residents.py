"""The requests that a rank holds, followed from step to step. Host state only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from isomoe.engine.diffusion import UNKNOWN, Draft
from isomoe.engine.draw import BlockDraw, Draw
from isomoe.engine.step import GroupStep, Joined, Request, Schedule
from isomoe.models import BlockDiffusion


@dataclass(slots=True, eq=False)
class Resident:
    """A request on this rank that appends one token after the other.

    Attributes:
        slot: its row in the block tables.
        num_pages: its entries there.
        tokens: prompt and output, as far as the host knows them.
        computed: tokens whose keys are cached.
    """

    request: Request
    slot: int
    num_pages: int
    tokens: list[int]
    computed: int

    def ids(self, count: int) -> list[int]:
        """The tokens of its next `count` rows."""
        return self.tokens[self.computed : self.computed + count]

    def advance(self, count: int, drawn: int) -> None:
        """Its next `count` rows have run; tokens are drawn from the last `drawn` of them."""
        self.computed += count

    def draw(self, wanted: int, drawn: int) -> Draw:
        """What it asks of the logits of the rows that have just run."""
        return Draw(self.request, self.tokens, self.computed - wanted, wanted, drawn)


@dataclass(slots=True, eq=False)
class BlockResident(Resident):
    """A request on this rank that fills in a block at a time.

    Its open block's rows are run again until their tokens are final.
    """

    diffusion: BlockDiffusion
    draft: Draft = field(init=False)

    def __post_init__(self) -> None:
        self.draft = Draft(self.tokens, self.diffusion.block_size)

    def ids(self, count: int) -> list[int]:
        mask = self.diffusion.mask_token_id
        final = self.tokens[self.computed : min(self.draft.start, self.computed + count)]
        return (final + [mask if token == UNKNOWN else token for token in self.draft.block])[:count]

    def advance(self, count: int, drawn: int) -> None:
        self.computed += count - drawn

    def draw(self, wanted: int, drawn: int) -> Draw:
        return BlockDraw(self.request, self.tokens, self.computed, wanted, drawn, self.draft)


class TableChange(NamedTuple):
    """Pages that take places in a block table, from `place` on."""

    slot: int
    place: int
    pages: Sequence[int]


class Residents:
    """All of them, and the schedule that they follow.

    Args:
        most: how many there may be at once.
        diffusion: None if the model appends one token after the other.

    Attributes:
        schedule: of the current step.
        members: those with rows in it, in row order.
    """

    def __init__(self, most: int, diffusion: BlockDiffusion | None = None) -> None:
        self.schedule = Schedule()
        self._diffusion = diffusion
        self.members: list[Resident] = []
        self._by_id: dict[int, Resident] = {}
        self._slots = list(range(most - 1, -1, -1))

    def take(self, group: GroupStep) -> list[TableChange]:
        """Brings requests and schedule up to date; what changed in the block tables."""
        changes = []
        for request_id in group.left:
            self._slots.append(self._by_id.pop(request_id).slot)
        for joined in group.joined:
            member = self._admitted(joined, self._slots.pop())
            self._by_id[joined.request.request_id] = member
            changes.append(TableChange(member.slot, 0, joined.pages))
        for request_id, place, page in group.table:
            member = self._by_id[request_id]
            member.num_pages = max(member.num_pages, place + 1)
            changes.append(TableChange(member.slot, place, (page,)))
        if group.schedule is not None:
            self.schedule = group.schedule
            self.members = [self._by_id[request_id] for request_id in group.schedule.request_ids]
        return changes

    def advance(self) -> None:
        """Counts the tokens of the current step as computed."""
        schedule = self.schedule
        for member, tokens, drawn in zip(
            self.members, schedule.num_tokens, schedule.samples, strict=True
        ):
            member.advance(tokens, drawn)

    def draws(self) -> list[Draw]:
        """What the current step asks of the logits, once it is counted as computed."""
        return [
            member.draw(wanted, drawn)
            for member, wanted, drawn in zip(
                self.members, self.schedule.num_logits, self.schedule.samples, strict=True
            )
            if wanted
        ]

    def _admitted(self, joined: Joined, slot: int) -> Resident:
        request, size = joined.request, len(joined.pages)
        tokens = [*request.prompt_token_ids, *joined.output_ids]
        if self._diffusion is None:
            return Resident(request, slot, size, tokens, joined.computed)
        return BlockResident(request, slot, size, tokens, joined.computed, self._diffusion)
