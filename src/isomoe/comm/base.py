"""The collectives of a rank, over runs of mesh axes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from isomoe.layout.mesh import Axes, Seat


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

    @abstractmethod
    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        """The tensor of the group's first member. x: the same shape and dtype on each."""


def split_rows(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`x` cut along dim 0 into `counts` rows each."""
    return list(torch.split(x, list(counts)))
