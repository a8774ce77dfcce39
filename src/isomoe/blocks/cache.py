"""Leaves that remember: what a request leaves on a rank between its steps."""

import torch

from isomoe.blocks.leaf import Leaf


class Memory(Leaf):
    """A leaf with a KV cache, whose pages requests hold, or with one state for each request."""

    def allocate_cache(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Makes this layer's pages."""

    def allocate_states(self, num_slots: int, device: torch.device) -> None:
        """Makes this layer's states, one a slot."""

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that a token has in this layer's pages."""
        return 0

    def pair_flops(self) -> int:
        """Operations for one query and one key that it sees, all heads of this rank."""
        return 0

    def state_bytes(self) -> int:
        """Bytes of one request's state in this layer."""
        return 0
