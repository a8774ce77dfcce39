"""Which experts the EP ranks hold when some experts have several copies.

A *logical* expert is one of the model's; a *physical* expert is a copy of one, with a slot on one
EP rank. The names are SGLang's (`--ep-num-redundant-experts`).
"""

from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as short

from isomoe.errors import ConfigError

_REDUNDANT = "--ep-num-redundant-experts"


@dataclass(frozen=True)
class ExpertMap:
    """Which logical expert each physical one is a copy of.

    Physical experts are numbered over all EP ranks: of n ranks, rank r holds [r*P/n, (r+1)*P/n).

    Attributes:
        physical_to_logical: [P] the logical expert of each physical one.
        num_logical: E, the experts of the model.

    Raises:
        ConfigError: if a logical expert has no copy, or a number is out of range.
    """

    physical_to_logical: tuple[int, ...]
    num_logical: int

    def __post_init__(self) -> None:
        _check(self.num_logical)
        last = self.num_logical - 1
        for physical, logical in enumerate(self.physical_to_logical):
            if not 0 <= logical <= last:
                raise ConfigError(
                    f"physical expert {physical} is a copy of {short(logical)}: "
                    f"logical experts are from 0 to {last}"
                )
        if without := sorted(set(range(self.num_logical)) - set(self.physical_to_logical)):
            raise ConfigError(
                f"of {self.num_logical} logical experts, {len(without)} are not among the "
                f"{self.num_physical} physical ones, the first is {without[0]}; "
                f"each of 0 to {last} needs a copy"
            )

    @classmethod
    def identity(cls, num_experts: int) -> "ExpertMap":
        """One copy of each, in order."""
        return cls.trivial(num_experts, 0)

    @classmethod
    def trivial(cls, num_experts: int, num_redundant: int) -> "ExpertMap":
        """SGLang's trivial placement: physical p is logical p % E.

        Raises:
            ConfigError: if there are no experts, or fewer than no redundant ones.
        """
        _check(num_experts, num_redundant)
        return cls(tuple(p % num_experts for p in range(num_experts + num_redundant)), num_experts)

    @property
    def num_physical(self) -> int:
        """P, the copies of all experts."""
        return len(self.physical_to_logical)

    @cached_property
    def is_identity(self) -> bool:
        """Whether physical and logical numbers are the same."""
        return self.physical_to_logical == tuple(range(self.num_logical))

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """[E] for each logical expert, the physical numbers of its copies, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_logical)]
        for physical, logical in enumerate(self.physical_to_logical):
            found[logical].append(physical)
        return tuple(map(tuple, found))

    def held(self, rank_index: int, ranks: int) -> tuple[int, ...]:
        """[P/ranks] the logical experts of an EP rank, in the order of its slots.

        Raises:
            ConfigError: if the physical experts do not split evenly, or there is no such rank.
        """
        slots = slots_per_rank(self.num_logical, self.num_physical - self.num_logical, ranks)
        if not 0 <= rank_index < ranks:
            raise ConfigError(f"EP rank {rank_index} is not one of 0 to {ranks - 1}")
        return self.physical_to_logical[rank_index * slots : (rank_index + 1) * slots]


def slots_per_rank(num_experts: int, num_redundant: int, ranks: int) -> int:
    """The physical experts that each EP rank holds.

    Raises:
        ConfigError: if they do not split evenly; the message says with how many they would.
    """
    _check(num_experts, num_redundant)
    if ranks < 1:
        raise ConfigError(f"--ep-size {ranks}: must be 1 or more")
    slots, over = divmod(num_experts + num_redundant, ranks)
    if over:
        near = (num_redundant - over, num_redundant - over + ranks)
        raise ConfigError(
            f"{_REDUNDANT} {num_redundant}: {num_experts} + {num_redundant} experts do not split "
            f"evenly over {ranks} EP ranks; {' or '.join(str(n) for n in near if n >= 0)} would"
        )
    return slots


def _check(num_experts: int, num_redundant: int = 0) -> None:
    if num_experts < 1:
        raise ConfigError(f"{num_experts} logical experts: there must be at least 1")
    if num_redundant < 0:
        raise ConfigError(f"{_REDUNDANT} {num_redundant}: must be 0 or more")
