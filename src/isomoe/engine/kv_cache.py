"""Pages of the KV cache: how many there are, and who holds which."""

from collections.abc import Iterable, Sequence

from isomoe.errors import ConfigError

CPU_CACHE_BYTES = 1 << 30
"""What a rank's KV cache may take on a CPU when nothing else is said."""


class PagePool:
    """The pages of one attention-DP rank.

    Attributes:
        num_pages: all pages.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # Last in, first out: memory that was touched is used again before any that was not.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, which must be free."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back."""
        self._free.extend(reversed(pages))

    def check(self, held: Iterable[int]) -> None:
        """Asserts that every page is free or in `held`, once."""
        pages = sorted([*self._free, *held])
        assert pages == list(range(self.num_pages)), "pages are lost or held twice"


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def num_cache_pages(
    *,
    max_total_tokens: int | None,
    page_size: int,
    bytes_per_page: int,
    available_bytes: int,
    max_running_requests: int,
    context_length: int,
) -> int:
    """Pages of a rank: as asked for, or what memory holds, and no more than can be used.

    Raises:
        ConfigError: if not even one page fits.
    """
    if max_total_tokens is not None:
        return max_total_tokens // page_size
    useful = max_running_requests * pages_for(context_length, page_size)
    fitting = available_bytes // bytes_per_page
    if fitting < 1:
        raise ConfigError(
            f"{max(available_bytes, 0)} bytes are left for the KV cache, one page of --page-size "
            f"{page_size} takes {bytes_per_page}; more ranks or a smaller page would help"
        )
    return min(useful, fitting)
