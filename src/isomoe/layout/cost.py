"""What a move costs: an alpha-beta model of the links between ranks.

`us = alpha + bytes / bandwidth`, with the bytes that one rank sends. It ranks the alternatives of a
plan; it is no promise of a time.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from isomoe.files import write_atomically
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, Op
from isomoe.layout.placement import Placement


class Link(ABC):
    """One kind of connection between ranks."""

    @abstractmethod
    def microseconds(self, op: Op, equal: bool, members: int, sent_bytes: float) -> float:
        """What a collective takes.

        Args:
            op: not `Op.SLICE`, which sends nothing.
            equal: in a step whose attention-DP groups have the same number of rows.
            members: of the group.
            sent_bytes: by one rank.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What one collective costs.

    Attributes:
        alpha_us: microseconds whatever its size.
        bytes_per_us: bytes that a rank sends in a microsecond.
    """

    alpha_us: float
    bytes_per_us: float

    def us(self, sent_bytes: float) -> float:
        """What it takes to send so much."""
        return self.alpha_us + sent_bytes / self.bytes_per_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The collectives of one kind of step."""

    all_reduce: Rate
    reduce_scatter: Rate
    all_gather: Rate
    exchange: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLink(Link):
    """A link by the rates of its collectives.

    Attributes:
        equal: in steps with the same number of rows in each group; on a GPU they are replayed.
        ragged: in all others, which the host launches one by one.
    """

    equal: Rates
    ragged: Rates

    def microseconds(self, op: Op, equal: bool, members: int, sent_bytes: float) -> float:
        rate: Rate = getattr(self.equal if equal else self.ragged, op.value)
        return rate.us(sent_bytes)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "FittedLink":
        """From what `asdict` made of it."""
        equal, ragged = (
            Rates(**{name: Rate(**rate) for name, rate in found[form].items()})
            for form in ("equal", "ragged")
        )
        return cls(equal=equal, ragged=ragged)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedSums(Link):
    """Sums that are made in one operation with the addition to the residual and its norm.

    All times are beyond what addition and norm take by themselves, which follow any sum.

    Attributes:
        whole, scattered: of an all-reduce and of a reduce-scatter.
        host_us: at least, in steps that the host launches kernel by kernel: its own time for a
            launch, in which few bytes travel unnoticed.
        max_bytes: of a rank's addends; more are declined, and summed first.
    """

    whole: Rate
    scattered: Rate
    host_us: float
    max_bytes: int

    def microseconds(self, op: Op, equal: bool, members: int, sent_bytes: float) -> float:
        """As of any link; what is sent is what one rank reads of all others' addends."""
        us = (self.whole if op is Op.ALL_REDUCE else self.scattered).us(sent_bytes)
        return us if equal else max(us, self.host_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The links of a machine.

    Attributes:
        name: what is printed.
        measured_on: the card or processor, the ranks and the date; or where the figures come from.
        local_ranks: ranks of one node; a group that reaches further uses `across`.
        within, across: links inside a node and between nodes.
        slice_us: what keeping one's own rows costs (a view; positive, so that fewer moves win).
        wire_bytes: bytes of one value on the wire.
        fused: within a node; None where there are none.
        second_stream_rows: in steps of up to so many rows (on all ranks) it pays to run shared
            experts on a second stream; 0: never.
    """

    name: str
    measured_on: str
    local_ranks: int
    within: Link
    across: Link
    slice_us: float
    wire_bytes: int
    fused: FusedSums | None = None
    second_stream_rows: int = 0

    @classmethod
    def load(cls, file: Path) -> "Machine":
        """That of a file which `save` wrote."""
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        parts: dict[str, Any] = {name: FittedLink.of(found[name]) for name in ("within", "across")}
        if fused := found.get("fused"):
            rates = {op: Rate(**fused[op]) for op in ("whole", "scattered")}
            parts["fused"] = FusedSums(**fused | rates)
        return cls(**found | parts)

    def save(self, file: Path) -> None:
        """Writes it, to be loaded again.

        Raises:
            ConfigError: if it cannot be written.
            TypeError: if a link is not a fitted one.
        """
        write_atomically(file, json.dumps(asdict(self), indent=1) + "\n")


FILES = Path(__file__).parent / "machines"
"""One file a kind of device; `isomoe bench comm --save` writes it anew from what it measures."""

MACHINES = {name: Machine.load(FILES / f"{name}.json") for name in ("cuda", "cpu")}
"""By the kind of device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Costs of moves on one machine, for activations of one width.

    Attributes:
        row_values: values of a row (the hidden size).
    """

    machine: Machine
    mesh: Mesh
    row_values: int

    def sent_bytes_per_row(self, move: Move) -> float:
        """Bytes that one rank sends, for each row of the whole step.

        Ring counts: n ranks send (n-1)/n of what they hold to reduce-scatter or all-gather, twice
        that to all-reduce. A dispatched row goes to the ranks that experts of its choice are on,
        if all are chosen alike.
        """
        if move.op is Op.SLICE:
            return 0.0
        members = self.mesh.size_of(move.axes)
        share = self.mesh.width_behind(_gathered(move).row_axes) / self.mesh.size
        plain = self.row_values * self.machine.wire_bytes
        if move.bundle is None:
            return plain * share * ring_share(move.op, members)
        bundle = move.bundle.row_bytes(self.row_values, self.machine.wire_bytes)
        match move.op:
            case Op.DISPATCH:
                return bundle * share * move.bundle.destinations(members)
            case Op.COMBINE:
                return plain * share * move.bundle.destinations(members)
        return bundle * share * ring_share(move.op, members)

    def microseconds(self, move: Move, rows: int, equal: bool) -> float:
        """Predicted time of a move in a step of `rows` rows."""
        if move.op is Op.SLICE:
            return self.machine.slice_us
        sent_bytes = self.sent_bytes_per_row(move) * rows
        members = self.mesh.size_of(move.axes)
        link = self.machine.within if self._is_local(move) else self.machine.across
        if move.op in (Op.DISPATCH, Op.COMBINE):
            # Whatever the step, the host launches it: it must know first how many rows will come.
            # Long ones are bound by the link, which replays measure better.
            us = max(link.microseconds(Op.EXCHANGE, form, members, sent_bytes) for form in _FORMS)
            counts = link.microseconds(Op.EXCHANGE, False, members, 0.0)
            return us + counts if move.op is Op.DISPATCH else us
        return link.microseconds(move.op, equal, members, sent_bytes)

    def fused_microseconds(self, move: Move, rows: int, equal: bool) -> float:
        """Predicted time of a sum in one operation with what follows it, beyond that alone.

        Infinite where there is none, or it would be declined for its bytes.
        """
        fused = self.machine.fused
        if fused is None or not self._is_local(move):
            return inf
        share = self.mesh.width_behind(_gathered(move).row_axes) / self.mesh.size
        held = self.row_values * self.machine.wire_bytes * share * rows
        if held > fused.max_bytes:
            return inf
        members = self.mesh.size_of(move.axes)
        return fused.microseconds(move.op, equal, members, held * read_share(move.op, members))

    def route_microseconds(
        self, moves: Sequence[Move], fused: bool, rows: int, equal: bool
    ) -> float:
        """Predicted time of moves one after another, the last of them fused unless declined."""
        each = [self.microseconds(move, rows, equal) for move in moves]
        if fused and (us := self.fused_microseconds(moves[-1], rows, equal)) < inf:
            each[-1] = us
        return sum(each)

    def _is_local(self, move: Move) -> bool:
        reach = self.mesh.stride_of(move.axes) * self.mesh.size_of(move.axes)
        return reach <= self.machine.local_ranks


_FORMS = (True, False)


def ring_share(op: Op, members: int) -> float:
    """Of the bytes that the side with more rows holds, those that one rank sends in a ring."""
    share = (members - 1) / members
    return 2 * share if op is Op.ALL_REDUCE else share


def read_share(op: Op, members: int) -> float:
    """The same of a fused sum: one rank reads the rows that it gets of every other's addends."""
    return (members - 1) / (1 if op is Op.ALL_REDUCE else members)


def _gathered(move: Move) -> Placement:
    """The side of a move on which a rank holds more rows."""
    return min(move.before, move.after, key=lambda side: side.row_axes)
