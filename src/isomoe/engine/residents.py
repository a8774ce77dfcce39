"""The requests that a rank holds, followed from step to step. Host state only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isomoe.engine.sampler import Draw
from isomoe.engine.step import GroupStep, Request, Schedule


@dataclass(slots=True, eq=False)
class Resident:
    """A request on this rank.

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


class TableChange(NamedTuple):
    """Pages that take places in a block table, from `place` on."""

    slot: int
    place: int
    pages: Sequence[int]


class Residents:
    """All of them, and the schedule that they follow.

    Args:
        most: how many there may be at once.

    Attributes:
        schedule: of the current step.
        members: those with rows in it, in row order.
    """

    def __init__(self, most: int) -> None:
        self.schedule = Schedule()
        self.members: list[Resident] = []
        self._by_id: dict[int, Resident] = {}
        self._slots = list(range(most - 1, -1, -1))

    def take(self, group: GroupStep) -> list[TableChange]:
        """Brings requests and schedule up to date; what changed in the block tables."""
        changes = []
        for request_id in group.left:
            self._slots.append(self._by_id.pop(request_id).slot)
        for joined in group.joined:
            request, pages = joined.request, joined.pages
            slot = self._slots.pop()
            self._by_id[request.request_id] = Resident(
                request=request,
                slot=slot,
                num_pages=len(pages),
                tokens=[*request.prompt_token_ids, *joined.output_ids],
                computed=joined.computed,
            )
            changes.append(TableChange(slot, 0, pages))
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
        for member, tokens in zip(self.members, self.schedule.num_tokens, strict=True):
            member.computed += tokens

    def draws(self) -> list[Draw]:
        """What the current step asks of the logits, once it is counted as computed."""
        return [
            Draw(member.request, member.tokens, member.computed - wanted, wanted, samples)
            for member, wanted, samples in zip(
                self.members, self.schedule.num_logits, self.schedule.samples, strict=True
            )
            if wanted
        ]
