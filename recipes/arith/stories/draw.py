"""What every story draws from: seeded numbers, people, things, and worked arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Person:
    """A first name with its pronouns, so that a solution's wording follows from the name."""

    name: str
    he: str
    his: str
    him: str

    @property
    def He(self) -> str:
        """The pronoun at the start of a sentence."""
        return self.he.capitalize()


@dataclass(frozen=True, slots=True)
class Story:
    """One problem before formatting: the question, the solution's sentences, the result."""

    question: str
    steps: tuple[str, ...]
    final: int


HE = (
    "Tom",
    "Ben",
    "Sam",
    "Max",
    "Leo",
    "Adam",
    "Jack",
    "Paul",
    "Omar",
    "Ravi",
    "Luis",
    "Noah",
    "Ivan",
    "Hugo",
    "Marco",
    "Peter",
    "David",
    "Kenji",
    "Felix",
    "Oscar",
)
SHE = (
    "Anna",
    "Mia",
    "Emma",
    "Lucy",
    "Sara",
    "Nina",
    "Ella",
    "Rosa",
    "Maya",
    "Lena",
    "Alice",
    "Grace",
    "Julia",
    "Priya",
    "Clara",
    "Mei",
    "Sofia",
    "Hanna",
    "Olga",
    "Ruth",
)
PEOPLE = tuple(Person(name, "he", "his", "him") for name in HE) + tuple(
    Person(name, "she", "her", "her") for name in SHE
)
THINGS = (
    "marbles",
    "stickers",
    "shells",
    "stamps",
    "cards",
    "beads",
    "buttons",
    "coins",
    "badges",
    "pebbles",
)
FRUITS = ("apples", "oranges", "peaches", "pears", "plums", "lemons", "mangoes", "cherries")


class Draw:
    """Seeded choices. The same seed gives the same sequence on every platform."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed).random

    def n(self, low: int, high: int, step: int = 1) -> int:
        """An integer of `range(low, high + 1, step)`."""
        return low + step * int(self._random() * ((high - low) // step + 1))

    def pick(self, *options: T) -> T:
        """One of the options."""
        return options[int(self._random() * len(options))]

    def share(self) -> float:
        """A number of [0, 1)."""
        return self._random()

    def person(self) -> Person:
        """One person."""
        return self.pick(*PEOPLE)

    def people(self, count: int) -> tuple[Person, ...]:
        """`count` people with different names."""
        found: list[Person] = []
        while len(found) < count:
            person = self.person()
            if person not in found:
                found.append(person)
        return tuple(found)


STORIES: list[Callable[[Draw], Story]] = []
"""Every story, in the order of definition. The order is part of the generator's result."""


def story(function: Callable[[Draw], Story]) -> Callable[[Draw], Story]:
    """Registers a story."""
    STORIES.append(function)
    return function


def add(*terms: int) -> str:
    """`3 + 4 + 5 = 7 + 5 = 12`: a sum, one addition at a time."""
    text = " + ".join(map(str, terms))
    while len(terms) > 1:
        terms = (terms[0] + terms[1], *terms[2:])
        text += " = " + " + ".join(map(str, terms))
    return text


def sub(a: int, b: int) -> str:
    """`9 - 4 = 5`."""
    return f"{a} - {b} = {a - b}"


def div(a: int, b: int) -> str:
    """`12 / 4 = 3`; the division must be exact."""
    assert a % b == 0, (a, b)
    return f"{a} / {b} = {a // b}"


def mul(a: int, b: int) -> str:
    """`4 * 12 = 48`, or with partial products where both factors have several digits.

    A product is written directly when, without trailing zeros, one factor has one digit and the
    other at most two. Otherwise the longer factor (`b` if they are equally long) is split at its
    leading digit.
    """
    bare_a, bare_b = (int(str(x).rstrip("0")) for x in (a, b))
    if min(bare_a, bare_b) < 10 and max(bare_a, bare_b) < 100:
        return f"{a} * {b} = {a * b}"
    if len(str(bare_a)) > len(str(bare_b)):
        head = _head(a)
        tail = a - head
        terms = f"{head} * {b} + {tail} * {b} = {head * b} + {tail * b}"
    else:
        head = _head(b)
        tail = b - head
        terms = f"{a} * {head} + {a} * {tail} = {a * head} + {a * tail}"
    return f"{a} * {b} = {terms} = {a * b}"


def _head(x: int) -> int:
    """The leading digit with its zeros: 347 gives 300."""
    power = 10 ** (len(str(x)) - 1)
    return x // power * power
