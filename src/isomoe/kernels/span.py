"""Which keys a query sees."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A query sees one run of positions, which ends with its own or with its block's.

    Attributes:
        window: the most keys that it sees, its own included (sliding-window attention).
        chunk: it sees keys of its own chunk of so many positions alone (Llama 4). A chunk is no
            window: its first query sees one key.
        block: it sees all of its own block of so many positions, later ones too (block diffusion).
    """

    window: int | None = None
    chunk: int | None = None
    block: int | None = None

    def start(self, position: int) -> int:
        """The first position that the query at `position` sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def stop(self, position: int, keys: int) -> int:
        """Behind the last position that it sees of a request that has `keys` keys so far."""
        if self.block is None:
            return position + 1
        return min((position // self.block + 1) * self.block, keys)


CAUSAL = Span()
"""All positions up to the query's own."""
