"""What a move costs: an alpha-beta model of the links between ranks.

`seconds = alpha * rounds + bytes / bandwidth`, with the bytes that one rank sends. It ranks the
alternatives of a plan; it is no promise of a time.
"""

from dataclasses import dataclass

from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, Op
from isomoe.layout.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One kind of connection.

    Attributes:
        alpha_us: microseconds that a collective costs whatever its size.
        bytes_per_us: bytes that a rank sends in a microsecond.
    """

    alpha_us: float
    bytes_per_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The links of a machine.

    Attributes:
        name: what is printed.
        local_ranks: ranks of one node; a group that reaches further uses `across`.
        within, across: links inside a node and between nodes.
        ragged_factor: what a collective with unequal counts costs in alphas.
        slice_us: what keeping one's own rows costs (a view; positive, so that fewer moves win).
        wire_bytes: bytes of one value on the wire.
    """

    name: str
    local_ranks: int
    within: Link
    across: Link
    ragged_factor: float
    slice_us: float
    wire_bytes: int


H100 = Machine(
    name="cuda",
    local_ranks=8,
    within=Link(alpha_us=12.0, bytes_per_us=300_000.0),
    across=Link(alpha_us=30.0, bytes_per_us=45_000.0),
    ragged_factor=1.5,
    slice_us=0.5,
    wire_bytes=2,
)
"""NVLink inside a node, InfiniBand between nodes: rounded datasheet figures, not yet fitted."""

GLOO = Machine(
    name="cpu",
    local_ranks=1024,
    within=Link(alpha_us=250.0, bytes_per_us=1_000.0),
    across=Link(alpha_us=250.0, bytes_per_us=1_000.0),
    ragged_factor=1.0,
    slice_us=0.5,
    wire_bytes=4,
)
"""Gloo between processes of one host: rounded from the readings in docs/benchmarks.md."""

MACHINES = {"cuda": H100, "cpu": GLOO}


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
        that to all-reduce.
        """
        n = self.mesh.size_of(move.axes)
        share = self.mesh.width_behind(_gathered(move).row_axes) / self.mesh.size
        row_bytes = self.row_values * self.machine.wire_bytes * share * (n - 1) / n
        if move.op is Op.SLICE:
            return 0.0
        return 2 * row_bytes if move.op is Op.ALL_REDUCE else row_bytes

    def microseconds(self, move: Move, rows: int, equal: bool) -> float:
        """Predicted time of a move in a step of `rows` rows."""
        if move.op is Op.SLICE:
            return self.machine.slice_us
        reach = self.mesh.stride_of(move.axes) * self.mesh.size_of(move.axes)
        link = self.machine.within if reach <= self.machine.local_ranks else self.machine.across
        alpha = link.alpha_us
        if move.op is not Op.ALL_REDUCE and not equal:
            alpha *= self.machine.ragged_factor
        return alpha + self.sent_bytes_per_row(move) * rows / link.bytes_per_us


def _gathered(move: Move) -> Placement:
    """The side of a move on which a rank holds more rows."""
    return min(move.before, move.after, key=lambda side: side.row_axes)
