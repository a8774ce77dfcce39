"""Where hidden states are looked at, in the order in which a step comes by."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from isomoe.layout import Placement, ReadPlan, RegimePlan


class Kind(StrEnum):
    """What happens at a station."""

    BLOCK = "block"
    """A block writes its contribution."""
    READ = "read"
    """What was written is summed, moved and added to the residual stream."""
    NORM = "norm"
    """The residual stream is normed."""
    DELIVERY = "delivery"
    """The normed rows are moved to a block."""


@dataclass(frozen=True, slots=True)
class Station:
    """One place in a step.

    Attributes:
        name: the block's, or the norm's for every other kind.
        consumer: the block that a delivery goes to.
    """

    kind: Kind
    name: str
    consumer: str = ""


def stations(plan: RegimePlan) -> Iterator[Station]:
    """Every station of a step; the last block is the lm_head, which gives the logits.

    Consumers that need the same placement share a delivery.
    """
    yield Station(Kind.BLOCK, plan.embedding)
    for read in plan.reads:
        yield Station(Kind.READ, read.name)
        yield Station(Kind.NORM, read.name)
        yield from (Station(Kind.DELIVERY, read.name, block) for block in moved(read).values())
        yield from (Station(Kind.BLOCK, delivery.consumer) for delivery in read.deliveries)


def moved(read: ReadPlan) -> dict[Placement, str]:
    """Each placement that a read's rows are moved to, and the first block that needs it."""
    first: dict[Placement, str] = {}
    for delivery in read.deliveries:
        if delivery.needs != read.residual:
            first.setdefault(delivery.needs, delivery.consumer)
    return first


def head_of(plan: RegimePlan) -> str:
    """The lm_head's name."""
    return plan.reads[-1].deliveries[-1].consumer


def read_of(plan: RegimePlan, name: str) -> ReadPlan:
    """The read of that name."""
    return next(read for read in plan.reads if read.name == name)
