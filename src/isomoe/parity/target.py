"""What can be compared: anything that decodes greedily and scores given tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from isomoe.parity.compare import Ids, Output

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""

Stage = Callable[[str], AbstractContextManager[Progress | None]]
"""Shows the progress of what it is given the name of."""


class Target(ABC):
    """One side of a comparison. It runs while it is entered, and may be entered once.

    Attributes:
        name: what the row is called.
        notes: what a reader of the row should know.
    """

    name: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __enter__(self) -> Self:
        """Starts it."""

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it; nothing of it is left running."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Ids],
        *,
        max_tokens: int,
        ignore_eos: bool,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Continues every prompt greedily."""

    @abstractmethod
    def score(
        self, prompts: Sequence[Ids], outputs: Sequence[Ids], progress: Progress | None = None
    ) -> list[tuple[float, ...]]:
        """The log-probability of every output token after its prompt, from one prefill of both."""
