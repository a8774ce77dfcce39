"""The collectives of a rank, over runs of mesh axes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from isomoe.layout.mesh import Axes, Seat


class AddNorm(Protocol):
    """A norm that can be fused with the addition before it.

    Attributes:
        weight: [hidden].
        eps: added to the mean square.
        dtype: of the normed rows.
    """

    weight: Tensor
    eps: float
    dtype: torch.dtype

    def after_adding(self, residual: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """residual + addend in residual's dtype, and the norm of that; may reuse the residual."""


class Communicator(ABC):
    """One rank's end of the collectives.

    Every method is called by all ranks of the group over `axes`, in the same order, and works on
    dim 0. `counts` are the rows of each member in rank order; they may differ, and may be zero.
    Results are new tensors or views of new tensors; inputs are not changed. All
    members of a group hold the same bits of a sum; over Gloo and in SimWorld it is made in rank
    order, NCCL picks its own.
    """

    def __init__(self, seat: Seat) -> None:
        self.seat = seat

    @abstractmethod
    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        """The sum of the members' tensors. x: [rows, ...], the same shape on each."""

    @abstractmethod
    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        """The members' rows, joined in rank order. x: [counts[me], ...] -> [sum(counts), ...]."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        """This member's rows of the sum. x: [sum(counts), ...] -> [counts[me], ...]."""

    @abstractmethod
    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        """Sends `send[j]` rows to member j. x: [sum(send), ...] -> [sum(receive), ...]."""

    def sum_add_norm(
        self,
        x: Tensor,
        axes: Axes,
        counts: Sequence[int] | None,
        residual: Tensor,
        norm: AddNorm,
    ) -> tuple[Tensor, Tensor] | None:
        """The sum of the members' tensors added to `residual`, and the norm of that, in one
        operation; None where there is none for such tensors. Then nothing has been sent.

        All members decline alike: it depends on what is the same for all.

        Args:
            x: as of `all_reduce`, or of `reduce_scatter` with `counts`.
            counts: rows of each member, which gets its own alone; None: each gets all.
            residual: [rows that this member gets, hidden]; may be overwritten.
        """
        return None

    @abstractmethod
    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        """The tensor of the group's first member. x: the same shape and dtype on each."""


def split_rows(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`x` cut along dim 0 into `counts` rows each."""
    return list(torch.split(x, list(counts)))
