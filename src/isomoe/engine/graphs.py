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
        self._logits: Tensor | None = None
        pool = None
        # The largest first, so that the others find its memory.
        for rows in sorted(sizes, reverse=True):
            self._warm_up(forward, rows)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = forward(rows)
                assert self._logits is not None
                self._logits[:rows].copy_(logits)
            del logits
            pool = pool or graph.pool()
            self._graphs[rows] = graph

    def replay(self, rows: int) -> Tensor:
        """The step's logits [rows, V], overwritten by the next replay."""
        assert self._logits is not None
        self._graphs[rows].replay()
        return self._logits[:rows]

    def _warm_up(self, forward: Forward, rows: int) -> None:
        """Compiles the kernels, and makes what they keep, before the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            logits = forward(rows)
            if self._logits is None:
                self._logits = torch.empty_like(logits)
        torch.cuda.current_stream().wait_stream(side)
