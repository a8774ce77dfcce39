"""Pages of the KV cache."""

import pytest

from isomoe.engine.kv_cache import PagePool, num_cache_pages
from isomoe.errors import ConfigError


def sized(**changes: int | None) -> int:
    sizes = {
        "max_total_tokens": None,
        "page_size": 16,
        "bytes_per_page": 1000,
        "available_bytes": 50_000,
        "max_running_requests": 4,
        "context_length": 100,
    }
    return num_cache_pages(**(sizes | changes))  # type: ignore[arg-type]


def test_released_pages_are_used_again_first() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.release(pages)
    assert pool.allocate(2) == pages
    assert (pool.num_used, pool.num_free) == (2, 2)


def test_the_check_sees_a_page_held_twice() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.check(pages)
    with pytest.raises(AssertionError):
        pool.check([*pages, *pages])
    with pytest.raises(AssertionError):
        pool.check([])


def test_the_cache_is_no_larger_than_can_be_used_and_fits_in_memory() -> None:
    assert sized() == 28
    assert sized(available_bytes=9_999) == 9
    assert sized(max_total_tokens=100) == 6
    with pytest.raises(ConfigError, match="999 bytes are left"):
        sized(available_bytes=999)
