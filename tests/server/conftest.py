"""Servers that tests share."""

from collections.abc import Iterator

import pytest

from servers import Server, running


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The bundled checkpoint on one rank; shared, so leave it as you found it."""
    with running() as one:
        yield one
        assert one.process.poll() is None, "".join(one.log)


@pytest.fixture(scope="session")
def dp_server() -> Iterator[Server]:
    """The same on two ranks, with attention and experts split."""
    with running("--tp-size", "2", "--attn-dp-size", "2", "--ep-size", "2") as one:
        yield one
        assert one.process.poll() is None, "".join(one.log)
