"""All-to-all for experts: rows go to the ranks of the experts they chose, and their sums come back.

T: rows here   N: rows that arrived   K: experts a row
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isomoe.comm.base import Communicator
from isomoe.comm.bundle import join, parts_of, split
from isomoe.layout.mesh import Axes

RoutedRows = tuple[tuple[Tensor, ...], Tensor, Tensor]
"""Hidden states (one tensor, or a packed form's several), [T, K] int32 ids of physical experts of
all ranks (-1: none), and [T, K] fp32 weights."""


class ExpertExchange(ABC):
    """One rank's end of the exchange with the ranks that hold other experts.

    Every rank of the group calls `dispatch`, then `combine`, also those without rows.
    """

    @abstractmethod
    def dispatch(
        self, rows: RoutedRows, axes: Axes, per_rank: int, most: int
    ) -> tuple[RoutedRows, Any]:
        """Sends each row to each rank of the group that has experts of its choice.

        Args:
            per_rank: physical experts of a rank; member m of the group holds the m-th run of them.
            most: rows of the member that has the most, which all members know.

        Returns:
            What arrived, and what `combine` needs. Ids are as they were sent, but those of other
            ranks' experts may be -1. A row may arrive as several, each with some of its experts;
            they have the weights that are left to apply.
        """

    @abstractmethod
    def combine(self, out: Tensor, sent: Any) -> Tensor:
        """Brings back what ranks made of rows, and adds it up.

        out: [N, hidden], weighted, of what arrived here -> [T, hidden] in out's dtype; zeros for a
        row that went nowhere.
        """


@dataclass(frozen=True, slots=True)
class _Sent:
    """What went out: row numbers by member, how many to each, how many came from each."""

    rows: Tensor
    send: Sequence[int]
    receive: Sequence[int]
    axes: Axes
    num_rows: int


class CommExchange(ExpertExchange):
    """On the all-to-all of any communicator: two collectives to dispatch, one to combine.

    The host waits for the counts. Sums are made at the source, in the order of ranks, in fp32.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def dispatch(
        self, rows: RoutedRows, axes: Axes, per_rank: int, most: int
    ) -> tuple[RoutedRows, _Sent]:
        values, ids, weights = rows
        members = self._comm.seat.mesh.size_of(axes)
        chosen = ids.long()
        owner = torch.where(chosen < 0, members, chosen // per_rank)
        wanted = ids.new_zeros(members + 1, len(ids), dtype=torch.bool)
        wanted.scatter_(0, owner.T, True)
        going = wanted[:members].nonzero()[:, 1]  # by member, then by row
        counts = wanted[:members].sum(1, keepdim=True)
        ones = [1] * members
        coming = self._comm.all_to_all(counts, axes, ones, ones)
        send, receive = torch.cat((counts, coming), 1).T.tolist()
        parcel = (*values, ids, weights)
        arrived = self._comm.all_to_all(join(parcel)[going], axes, send, receive)
        *packed, ids, weights = split(arrived, parts_of(parcel))
        sent = _Sent(going, send, receive, axes, len(chosen))
        return (tuple(packed), ids, weights), sent

    def combine(self, out: Tensor, sent: _Sent) -> Tensor:
        back = self._comm.all_to_all(out, sent.axes, sent.receive, sent.send)
        wide = torch.float32 if out.is_floating_point() else out.dtype
        total = out.new_zeros(sent.num_rows, out.shape[1], dtype=wide)
        # A row occurs once in each member's part, so each of these adds in a fixed order.
        send = list(sent.send)
        for rows, part in zip(torch.split(sent.rows, send), torch.split(back, send), strict=True):
            total.index_add_(0, rows, part.to(wide))
        return total.to(out.dtype)
