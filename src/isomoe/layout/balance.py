"""Placing the copies of experts so that every EP rank gets about the same load.

In the spirit of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB, its global policy): copy the
experts with most load, then pack the copies heaviest first. Added to it: copies of one expert
always go to different ranks, and swaps at the end even out what is left.

All sums are of whole numbers: ties are ties on every machine, and the swaps come to an end.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heapreplace
from math import inf, lcm

from isomoe.errors import ConfigError
from isomoe.layout.expert_map import ExpertMap, slots_per_rank


def balanced(load: Sequence[float], num_redundant: int, ranks: int) -> ExpertMap:
    """A placement whose heaviest EP rank has little more than the mean load.

    - It is no worse than the trivial placement, which it is if that is as good (without load, say).
    - No rank holds two copies of an expert, unless it has more slots than there are experts.
    - The heaviest rank has at most the mean and one copy more, which is at most twice the least
      load possible (again unless there are more slots than experts).

    Args:
        load: [E] of each logical expert, such as the tokens routed to it.
        num_redundant: copies beyond the first of each.
        ranks: EP ranks.

    Raises:
        ConfigError: if the copies do not split evenly over the ranks, or a load is negative or
            not finite.
    """
    slots = slots_per_rank(len(load), num_redundant, ranks)
    _check(load)
    copies = _replicated(load, num_redundant, ranks)
    packing = _Packing(_copy_loads(load, copies), slots, ranks)
    for expert in sorted(range(len(load)), key=lambda e: (-packing.weight[e], e)):
        for _ in range(copies[expert]):
            packing.add(expert)
    while packing.improve():
        pass
    placed = tuple(e for held in packing.held for e in sorted(held.elements()))
    trivial = ExpertMap.trivial(len(load), num_redundant)
    found = ExpertMap(placed, len(load))
    return min(trivial, found, key=lambda each: _imbalance(load, each, ranks))


def imbalance(load: Sequence[float], expert_map: ExpertMap, ranks: int) -> float:
    """The heaviest EP rank's load over the mean: 1 is even, and `ranks` is all on one.

    An expert's load is split evenly over its copies. Without load it is 1.

    Args:
        load: [E] of each logical expert.

    Raises:
        ConfigError: if the map is of another number of experts or does not split evenly over the
            ranks, or a load is negative or not finite.
    """
    if len(load) != expert_map.num_logical:
        raise ConfigError(f"{len(load)} loads of experts; the map needs {expert_map.num_logical}")
    _check(load)
    return float(_imbalance(load, expert_map, ranks))


def _imbalance(load: Sequence[float], expert_map: ExpertMap, ranks: int) -> Fraction:
    weight = _copy_loads(load, list(map(len, expert_map.copies)))
    sums = [sum(weight[e] for e in expert_map.held(rank, ranks)) for rank in range(ranks)]
    return Fraction(max(sums) * ranks, sum(sums)) if any(sums) else Fraction(1)


def _check(load: Sequence[float]) -> None:
    for expert, has in enumerate(load):
        if not 0 <= has < inf:
            raise ConfigError(f"the load of expert {expert} is {has}: must be finite, 0 or more")


def _replicated(load: Sequence[float], num_redundant: int, ranks: int) -> list[int]:
    """[E] copies: each further one goes to the expert with most load per copy.

    But none gets more copies than ranks before all have as many: two on one rank help nobody.
    """

    def turn(expert: int, copies: int) -> tuple[int, Fraction, int, int]:
        return copies // ranks, -Fraction(load[expert]) / copies, copies, expert

    heap = [turn(expert, 1) for expert in range(len(load))]
    heapify(heap)
    for _ in range(num_redundant):
        _, _, copies, expert = heap[0]
        heapreplace(heap, turn(expert, copies + 1))
    return [copies for _, _, copies, _ in sorted(heap, key=lambda entry: entry[-1])]


def _copy_loads(load: Sequence[float], copies: Sequence[int]) -> list[int]:
    """[E] the load of one copy of each expert, in a unit that makes all of them whole numbers."""
    shares = [Fraction(has) / n for has, n in zip(load, copies, strict=True)]
    unit = lcm(*(share.denominator for share in shares))
    return [int(share * unit) for share in shares]


class _Packing:
    """Copies on ranks. Any two ranks' numbers of copies of one expert differ by one at most.

    Hence an expert with no more copies than ranks has them all on different ranks.

    Attributes:
        weight: [E] the load of one copy.
        slots: of each rank.
        held: [ranks] copies of each expert.
        load: [ranks] the sum of their weights.
    """

    def __init__(self, weight: list[int], slots: int, ranks: int) -> None:
        self.weight = weight
        self.slots = slots
        self.held: list[Counter[int]] = [Counter() for _ in range(ranks)]
        self.load = [0] * ranks

    def add(self, expert: int) -> None:
        """To the rank with least load, of those that have room and fewest copies of `expert`."""
        fewest = min(held[expert] for held in self.held)
        lacking = [r for r, held in enumerate(self.held) if held[expert] == fewest]
        room = [r for r, held in enumerate(self.held) if held.total() < self.slots]
        if both := [r for r in lacking if r in room]:
            self._put(expert, min(both, key=self.load.__getitem__))
            return
        # A rank that lacks it is full, and makes room by giving a copy to a rank that has room.
        # There is one to give: the full rank has more copies in all but fewer of this expert, so
        # of some other it has more.
        weight, load = self.weight, self.load
        _, full, other, given = min(
            (max(load[full] - weight[e] + weight[expert], load[other] + weight[e]), full, other, e)
            for full in lacking
            for other in room
            for e in self.held[full] - self.held[other]
        )
        self._move(given, full, other)
        self._put(expert, full)

    def improve(self) -> bool:
        """Swaps a copy of the heaviest rank for a lighter one elsewhere, where that helps most.

        When no swap helps, the heaviest rank has at most one copy's load more than any other: of
        the copies that only one of the two has, there are equally many, so some pair differs in
        the right direction, and swapping any such pair would help if it differed by less than the
        ranks do.

        Returns:
            Whether there was one; each makes the heaviest rank lighter, or one rank fewer so heavy.
        """
        heavy = self.load.index(max(self.load))
        swaps = (
            (max(self.load[heavy] - less, self.load[light] + less), light, given, taken)
            for light in range(len(self.held))
            for given in self.held[heavy] - self.held[light]
            for taken in self.held[light] - self.held[heavy]
            if (less := self.weight[given] - self.weight[taken]) > 0
        )
        best, light, given, taken = min(swaps, default=(self.load[heavy], 0, 0, 0))
        if best >= self.load[heavy]:
            return False
        self._move(given, heavy, light)
        self._move(taken, light, heavy)
        return True

    def _move(self, expert: int, source: int, target: int) -> None:
        self._put(expert, source, -1)
        self._put(expert, target)

    def _put(self, expert: int, rank: int, copies: int = 1) -> None:
        self.held[rank][expert] += copies
        self.load[rank] += copies * self.weight[expert]
