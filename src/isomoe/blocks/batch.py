"""The rows of one step, as one rank sees them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from isomoe.kernels import AttentionBatch, PagedRows
from isomoe.layout import LogitsRows, TokenRows


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on one rank.

    Attributes:
        ids: [rows] int64, the token ids of this rank's attention-DP group, padding included.
        positions: [rows] integers, each token's place in its request.
        attention: the group's requests, for the attention kernel: `PagedRows` on GPUs.
        rows: the step's rows on all ranks.
        logits_rows: the rows that get logits, on all ranks.
        rank: this rank.
        real: [all ranks' rows] bool, which of them are tokens, where a captured step learns it
            only when it runs; `rows` then counts none as padding. None: `rows` says it.
    """

    ids: Tensor
    positions: Tensor
    attention: AttentionBatch | PagedRows
    rows: TokenRows
    logits_rows: LogitsRows
    rank: int
    real: Tensor | None = None

    def real_rows(self, device: torch.device) -> Tensor | None:
        """[all ranks' rows] bool, which of them are tokens; None if all are."""
        if self.real is not None or not self.rows.has_padding:
            return self.real
        return _real(self.rows, device)


@lru_cache(maxsize=4)
def _real(rows: TokenRows, device: torch.device) -> Tensor:
    """The same for every layer of a step, and on every rank. Nobody writes to it."""
    real = torch.ones(rows.total, dtype=torch.bool, device=device)
    for padding in rows.padding(0, 0):
        real[padding] = False
    return real
