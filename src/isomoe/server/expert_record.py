"""A record of the experts' load, as SGLang's endpoints start, stop and dump one."""

from collections.abc import Callable

Load = list[list[int]]
"""How often each expert was chosen: [layers][E]."""


class ExpertRecord:
    """How often each expert was chosen between `start` and `stop`.

    Ranks count in every step, in captured ones too, so that there is nothing to switch on or off
    in them: a record is the difference of two readings.

    Args:
        read: the counts so far, which only grow.
    """

    def __init__(self, read: Callable[[], Load]) -> None:
        self._read = read
        self._before: Load | None = None
        self._after: Load | None = None

    def start(self) -> None:
        """Begins a new record, whether or not the last one was stopped."""
        self._before, self._after = self._read(), None

    def stop(self) -> None:
        """Ends the record, if it has not ended."""
        self._after = self._counts_after()

    def load(self) -> Load:
        """What was counted since `start`, or since the engine's own; up to `stop`, or up to now."""
        after = self._counts_after()
        if self._before is None:
            return after
        return [
            [late - early for early, late in zip(*layer, strict=True)]
            for layer in zip(self._before, after, strict=True)
        ]

    def _counts_after(self) -> Load:
        return self._read() if self._after is None else self._after
