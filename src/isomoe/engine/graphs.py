"""Steps that only decode, captured once and replayed: their launches cost the host nothing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Forward = Callable[[int], Tensor]
"""Runs a step of so many static rows; returns logits [rows, V]."""


class DecodeGraphs:
    """A CUDA graph for each number of rows.

    All graphs share one memory pool and one tensor of logits, since one runs at a time.

    Args:
        forward: what is captured. Its inputs must lie where they will lie at each replay.
        sizes: the numbers of rows.
    """

    def __init__(self, forward: Forward, sizes: Sequence[int]) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # The largest first, so that the others find its memory.
        falling = sorted(sizes, reverse=True)
        self._logits = torch.empty_like(_warmed_up(forward, falling[0]))
        pool = None
        for rows in falling:
            _warmed_up(forward, rows)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[:rows].copy_(forward(rows))
            pool = pool or graph.pool()
            self._graphs[rows] = graph

    def replay(self, rows: int) -> Tensor:
        """The step's logits [rows, V], overwritten by the next replay."""
        self._graphs[rows].replay()
        return self._logits[:rows]


def _warmed_up(forward: Forward, rows: int) -> Tensor:
    """A step's logits, for which its kernels are compiled and what they keep is made."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        logits = forward(rows)
    torch.cuda.current_stream().wait_stream(side)
    return logits
