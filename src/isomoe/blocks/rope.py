"""Rotary position embedding: the angles of a step, shared by all layers that turn alike."""

import torch
from torch import Tensor

from isomoe.blocks.batch import Batch
from isomoe.kernels import Scaling, frequencies, rope_rows


class Rope:
    """Turns the first `dim` dims of a head by its row's position.

    Source: Su et al., RoFormer (2021).

    Args:
        dim: dims that turn; the rest of a head passes.
        scaling: for more positions than the model was first trained on; None for none.
        amplitude: what cos and sin are multiplied with (YaRN).
        interleaved: dims 2i and 2i + 1 turn together, not i and i + dim/2.
    """

    def __init__(
        self,
        dim: int,
        theta: float,
        scaling: Scaling | None = None,
        amplitude: float = 1.0,
        interleaved: bool = False,
    ) -> None:
        self.dim = dim
        self.interleaved = interleaved
        self.amplitude = amplitude
        self._turns = theta, scaling
        self._frequencies: Tensor | None = None  # made when first used: the proof never does
        self._tables: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Batch, tuple[Tensor, Tensor]] | None = None

    def tables(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of at least so many positions, each [positions, dim] fp32; kept."""
        if self._tables is None or len(self._tables[0]) < positions:
            every = torch.arange(positions, device=device)
            self._tables = self._rows(every)
        return self._tables

    def at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin at the batch's positions, each [T, dim] fp32; made once a step."""
        if self._last is None or self._last[0] is not batch:
            self._last = batch, self._rows(batch.positions)
        return self._last[1]

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._frequencies is None:  # once: a captured step copies nothing
            self._frequencies = frequencies(self.dim, *self._turns).to(positions.device)
        return rope_rows(positions, self._frequencies, self.amplitude)
