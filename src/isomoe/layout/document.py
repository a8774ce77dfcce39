"""What a plan's JSON document says, read by the shape that it must have.

What is wrong with the shape is one line that says where. Whether a plan comes of it, `pinned` asks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import Repr

from isomoe.errors import ConfigError, PlacementError
from isomoe.layout.mesh import Mesh
from isomoe.layout.moves import Move, Op
from isomoe.layout.placement import Placement
from isomoe.layout.plan import Regime
from isomoe.layout.wire import Bundle, WireFormat

_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


_FIGURES = ("bytes_per_row", "predicted_us", "beats")
"""Of a route: what is not read."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the document.

    Every method raises ConfigError where the value has another shape than is asked for.

    Attributes:
        at: where it stands, for messages.
    """

    at: str
    value: object

    def wrong(self, wanted: str) -> ConfigError:
        """That it is not what it must be."""
        return ConfigError(f"{self.at} is {_SHOWN.repr(self.value)}, not {wanted}")

    def members(
        self,
        needed: tuple[str, ...],
        optional: tuple[str, ...] = (),
        unread: tuple[str, ...] = (),
    ) -> dict[str, "Node"]:
        """An object's members.

        Args:
            unread: further ones that it may have, which mean nothing here.
        """
        if not isinstance(self.value, Mapping):
            raise self.wrong("an object")
        for key in needed:
            if key not in self.value:
                raise ConfigError(f"{self.at}: {key!r} is missing")
        for key in self.value:
            if key not in (*needed, *optional, *unread):
                known = ", ".join((*needed, *optional, *unread))
                raise ConfigError(f"{self.at}: {_SHOWN.repr(key)} is none of {known}")
        return {
            key: Node(f"{self.at}: {key}", self.value[key])
            for key in (*needed, *optional)
            if key in self.value
        }

    def items(self, what: str = "", named: str = "") -> Iterator["Node"]:
        """A list's items.

        Args:
            what: what messages call an item, beside what its list belongs to; by default by the
                list, and numbered.
            named: its member that tells it from others.
        """
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        above = self.at.rpartition(": ")[0]
        for number, item in enumerate(self.value):
            name = item.get(named) if isinstance(item, Mapping) else None
            if isinstance(name, str):
                yield Node(f"{above}: {what} {_SHOWN.repr(name)[1:-1]}".removeprefix(": "), item)
            else:
                yield Node(f"{self.at}[{number}]", item)

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        return self.value

    def flag(self) -> bool:
        """A truth value."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def number(self, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number within limits."""
        value = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(f"a whole number from {least} to {most}")
        return value

    def one_of(self, words: tuple[str, ...]) -> str:
        """A string out of some."""
        if self.value not in words:
            raise self.wrong(f"one of {', '.join(words)}")
        return str(self.value)

    def placement(self, mesh: Mesh) -> Placement:
        """A letter for each axis.

        Raises:
            PlacementError: if it is none.
        """
        letters = self.text()
        if len(letters) != len(mesh.axes):
            raise PlacementError(
                f"{self.at} is {_SHOWN.repr(letters)}, not one letter for each of the mesh axes "
                f"{mesh.axes}"
            )
        try:
            return Placement(letters)
        except PlacementError as error:
            raise PlacementError(f"{self.at}: {error}") from None

    def moves(self, mesh: Mesh) -> tuple[Move, ...]:
        """A list of moves, each of which can be made; whether they follow one another is not asked.

        Raises:
            PlacementError: if one cannot be made.
        """
        return tuple(item._move(mesh) for item in self.items())

    def _move(self, mesh: Mesh) -> Move:
        found = self.members(("op", "axes", "from", "to"), ("bundle",))
        bundle = None
        if "bundle" in found:
            counts = ("top_k", "groups", "kept")
            sent = found["bundle"].members(("format", *counts))
            form = WireFormat(sent["format"].one_of(tuple(WireFormat)))
            bundle = Bundle(form, *(sent[count].number(least=1) for count in counts))
        op = Op(found["op"].one_of(tuple(Op)))
        axes = tuple(axis.number() for axis in found["axes"].items())
        before, after = found["from"].placement(mesh), found["to"].placement(mesh)
        try:
            return Move(op, axes, before, after, bundle)
        except PlacementError as error:
            raise PlacementError(f"{self.at}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidSettle:
    """A settle, as a document says it."""

    at: str
    before: str
    producers: tuple[str, ...]
    gives: Placement
    residual: Placement
    moves: tuple[Move, ...]
    fused: bool

    @classmethod
    def of(cls, node: Node, mesh: Mesh) -> "SaidSettle":
        """From one of `RegimePlan.to_json`'s settles."""
        found = node.members(
            ("before", "producers", "gives", "residual", "moves"), ("fused",), _FIGURES
        )
        return cls(
            at=node.at,
            before=found["before"].text(),
            producers=tuple(name.text() for name in found["producers"].items()),
            gives=found["gives"].placement(mesh),
            residual=found["residual"].placement(mesh),
            moves=found["moves"].moves(mesh),
            fused="fused" in found and found["fused"].flag(),
        )

    @property
    def carries(self) -> bool:
        """Whether it moves the residual itself."""
        return self.producers == ("residual",)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidDelivery:
    """A delivery, as a document says it."""

    at: str
    consumer: str
    residual: Placement
    needs: Placement
    moves: tuple[Move, ...]
    beside: bool

    @classmethod
    def of(cls, node: Node, mesh: Mesh) -> "SaidDelivery":
        """From one of its deliveries."""
        needed = ("consumer", "residual", "needs", "moves")
        found = node.members(needed, ("beside",), _FIGURES)
        return cls(
            at=node.at,
            consumer=found["consumer"].text(),
            residual=found["residual"].placement(mesh),
            needs=found["needs"].placement(mesh),
            moves=found["moves"].moves(mesh),
            beside="beside" in found and found["beside"].flag(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidInner:
    """The moves inside a block, as a document says them."""

    at: str
    block: str
    moves: tuple[Move, ...]

    @classmethod
    def of(cls, node: Node, mesh: Mesh) -> "SaidInner":
        """From one of `RegimePlan.to_json`'s inner moves."""
        found = node.members(("block", "moves"))
        return cls(at=node.at, block=found["block"].text(), moves=found["moves"].moves(mesh))


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidRegime:
    """A regime, as a document says it.

    Attributes:
        residual: its placement at most of the reads.
    """

    at: str
    regime: Regime
    residual: Node
    settles: tuple[SaidSettle, ...]
    deliveries: tuple[SaidDelivery, ...]
    inner: tuple[SaidInner, ...]

    @classmethod
    def of(cls, node: Node, mesh: Mesh) -> "SaidRegime":
        """From what `RegimePlan.to_json` made.

        Raises:
            ConfigError: if it has another shape.
            PlacementError: if a placement or a move is none.
        """
        found = node.members(
            ("name", "rows", "equal", "residual", "settles", "deliveries", "inner"),
            unread=("predicted_us", "alternatives"),
        )
        regime = Regime(rows=found["rows"].number(least=1), equal=found["equal"].flag())
        if found["name"].value != regime.name:
            raise found["name"].wrong(f"{regime.name}, as its rows and form say")
        settles = found["settles"].items("settle before", "before")
        deliveries = found["deliveries"].items("delivery to", "consumer")
        inner = found["inner"].items("inner moves of", "block")
        return cls(
            at=node.at,
            regime=regime,
            residual=found["residual"],
            settles=tuple(SaidSettle.of(one, mesh) for one in settles),
            deliveries=tuple(SaidDelivery.of(one, mesh) for one in deliveries),
            inner=tuple(SaidInner.of(one, mesh) for one in inner),
        )
