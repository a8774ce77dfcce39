"""What a proof checked, and the first violation if there was one."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Stats:
    """What was checked.

    Attributes:
        regimes: plans, one for each layout, machine and kind of step.
        plans: of them, those that were run; the others are made of the same steps.
        shares: blocks whose shares on all ranks were added up.
    """

    layouts: int = 0
    regimes: int = 0
    plans: int = 0
    shares: int = 0
    steps: int = 0
    moves: int = 0
    contributions: int = 0

    @property
    def proven_as_equal(self) -> int:
        """Plans that were not run, since others have all their steps."""
        return self.regimes - self.plans

    def add(self, other: "Stats") -> None:
        """Adds another's counts to these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first violation of a layout.

    Attributes:
        level: 1 if the type check refused it, 2 if the proof found it.
        block, rank, row: who saw what; None where it is not about a row.
        counts: for each block behind the row, columns that were counted and should have been.
    """

    model: str
    layout: str
    level: int
    regime: str
    case: str
    block: str
    message: str
    rank: int | None = None
    row: int | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        place = f"{self.model}, {self.layout}"
        if self.level == 1:
            return f"{place}: refused before running: {self.message}"
        who = "" if self.rank is None else f", rank {self.rank}"
        which = "" if self.row is None else f", row {self.row}"
        wrong = [
            f"{block}: expected {expected}, found {found}"
            for block, (found, expected) in self.counts.items()
            if found != expected
        ]
        tail = f"; columns counted: {'; '.join(wrong)}" if wrong else ""
        where = ", ".join(part for part in (place, self.regime, self.case) if part)
        return f"{where}: {self.block}{who}{which}: {self.message}{tail}"
