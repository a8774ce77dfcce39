"""How much of a GPU's memory the KV cache may take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from isomoe.errors import ConfigError

_GRAPHS_BYTES = 1 << 30
"""Kept free for captured graphs, sampling and what the allocator cannot use."""


@contextmanager
def must_fit(what: str, remedy: str) -> Iterator[None]:
    """Says in one line what found too little memory, and what would help.

    Raises:
        ConfigError: where torch raised OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        raise ConfigError(
            f"{what} found too little GPU memory ({reason}); {remedy} would help"
        ) from None


def free_for_cache(
    device: torch.device, fraction: float, ranks: int, profile: Callable[[], None]
) -> int:
    """Bytes for the KV cache once the weights are loaded.

    Weights and cache take `fraction` of the memory together, and less where the activations of
    the most demanding step, which are measured, would not fit beside them.

    Args:
        ranks: how many ranks there are; they may share a GPU.
        profile: runs that step.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    profile()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - weights
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    sharing = -(-ranks // torch.cuda.device_count())
    by_fraction = int(total * fraction) // sharing - weights
    return min(by_fraction, free // sharing - activations - _GRAPHS_BYTES // sharing)
