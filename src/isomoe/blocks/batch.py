"""The rows of one step, as one rank sees them."""

from dataclasses import dataclass

from torch import Tensor

from isomoe.kernels import AttentionBatch
from isomoe.layout import LogitsRows, TokenRows


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on one rank.

    Attributes:
        ids: [rows] int64, the token ids of this rank's attention-DP group, padding included.
        positions: [rows] int64, each token's place in its request.
        attention: the group's requests, for the attention kernel.
        rows: the step's rows on all ranks.
        logits_rows: the rows that get logits, on all ranks.
        rank: this rank.
    """

    ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    rows: TokenRows
    logits_rows: LogitsRows
    rank: int
