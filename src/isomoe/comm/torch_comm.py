"""Collectives between processes: torch.distributed over Gloo (CPU) or NCCL (CUDA)."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from isomoe.comm.base import AddNorm, Communicator, split_rows
from isomoe.comm.symmetric import SymmetricSums
from isomoe.errors import CollectiveError
from isomoe.layout.mesh import Axes, Seat

_ONE_ROUND_BYTES = 64 * 1024
"""Below this an all-reduce over Gloo sends everything to everybody: latency rules."""


def torch_communicator(
    seat: Seat,
    runs: Iterable[Axes],
    device: torch.device | None = None,
    fused: Iterable[Axes] = (),
    fused_bytes: int = 0,
) -> Communicator:
    """The communicator for the process group that is initialised.

    Args:
        runs: the runs of axes that will be used. Every rank must name the same, since all ranks
            make all groups, in one order.
        device: where the tensors are; None is what the backend is made for.
        fused: those of them over which sums may be fused with additions and norms;
        fused_bytes: and the most bytes of addends.

    Raises:
        CollectiveError: if the backend is neither Gloo nor NCCL.
    """
    groups: dict[Axes, dist.ProcessGroup] = {}
    for axes in sorted(set(runs)):
        for ranks in seat.mesh.groups(axes):
            group = dist.new_group(list(ranks))
            if seat.rank in ranks:
                groups[axes] = group
    backend = dist.get_backend()
    if backend == "gloo":
        comm = GlooComm(seat, groups)
        return StagedComm(comm, device) if device is not None and device.type == "cuda" else comm
    if backend == "nccl":
        device = device or torch.device("cuda", torch.cuda.current_device())
        opened = {
            axes: SymmetricSums.open(groups[axes], device, fused_bytes)
            for axes in sorted(set(fused))
        }
        return NcclComm(seat, groups, {axes: sums for axes, sums in opened.items() if sums})
    raise CollectiveError(f"process group backend {backend!r}: gloo and nccl are supported")


class TorchComm(Communicator):
    """What Gloo and NCCL share."""

    def __init__(self, seat: Seat, groups: dict[Axes, dist.ProcessGroup]) -> None:
        super().__init__(seat)
        self._groups = groups

    def group(self, axes: Axes) -> dist.ProcessGroup:
        """The process group over `axes`, one of the runs that the communicator was made for."""
        return self._groups[axes]

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(
            out, x.contiguous(), list(receive), list(send), group=self._groups[axes]
        )
        return out

    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        out = x.clone()
        dist.broadcast(out, group=self._groups[axes], group_src=0)
        return out


class GlooComm(TorchComm):
    """Gloo, all of it built on its all-to-all.

    Gloo has no ragged collective but that one, and on the hosts measured it is also the fastest
    for the sizes of a decode step: one round instead of a ring of them. The sums are made here,
    in rank order.
    """

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        members = self.seat.mesh.size_of(axes)
        if x.numel() * x.element_size() <= _ONE_ROUND_BYTES:
            copies = x.unsqueeze(0).expand(members, *x.shape)
            ones = [1] * members
            return _sum(list(self.all_to_all(copies, axes, ones, ones).unbind(0)))
        flat = x.reshape(-1)
        base, extra = divmod(flat.numel(), members)
        counts = [base + (member < extra) for member in range(members)]
        mine = self.reduce_scatter(flat, axes, counts)
        return self.all_gather(mine, axes, counts).view(x.shape)

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        members = len(counts)
        copies = (
            x.unsqueeze(0).expand(members, *x.shape).reshape(members * x.shape[0], *x.shape[1:])
        )
        return self.all_to_all(copies, axes, [x.shape[0]] * members, counts)

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        mine = counts[self.seat.index(axes)]
        addends = self.all_to_all(x, axes, counts, [mine] * len(counts))
        return _sum(list(addends.view(len(counts), mine, *x.shape[1:]).unbind(0)))


class NcclComm(TorchComm):
    """NCCL, whose list forms take unequal counts.

    Args:
        fused: sums over some of the groups, in one operation with addition and norm.
    """

    def __init__(
        self,
        seat: Seat,
        groups: dict[Axes, dist.ProcessGroup],
        fused: Mapping[Axes, SymmetricSums] | None = None,
    ) -> None:
        super().__init__(seat, groups)
        self._fused = fused or {}

    def sum_add_norm(
        self,
        x: Tensor,
        axes: Axes,
        counts: Sequence[int] | None,
        residual: Tensor,
        norm: AddNorm,
    ) -> tuple[Tensor, Tensor] | None:
        sums = self._fused.get(axes)
        if sums is None or not sums.takes(x.shape[0], x.shape[1], x.dtype):
            return None
        how = norm.weight, norm.eps, norm.dtype
        if counts is None:
            return sums.sum_add_norm(x, residual, *how)
        return sums.scatter_add_norm(x, counts, residual, *how)

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, group=self._groups[axes])
        return out

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(counts), *x.shape[1:]))
        group = self._groups[axes]
        if len(set(counts)) == 1:
            dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        else:
            dist.all_gather(split_rows(out, counts), x.contiguous(), group=group)
        return out

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        out = x.new_empty((counts[self.seat.index(axes)], *x.shape[1:]))
        group = self._groups[axes]
        if len(set(counts)) == 1:
            dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        else:
            dist.reduce_scatter(out, split_rows(x.contiguous(), counts), group=group)
        return out


class StagedComm(Communicator):
    """Collectives of tensors on a GPU, by way of the host: for ranks that share a GPU.

    Args:
        inner: moves the host's tensors.
        device: where results go.
    """

    def __init__(self, inner: Communicator, device: torch.device) -> None:
        super().__init__(inner.seat)
        self._inner = inner
        self._device = device

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        return self._inner.all_reduce(x.cpu(), axes).to(self._device)

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        return self._inner.all_gather(x.cpu(), axes, counts).to(self._device)

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        return self._inner.reduce_scatter(x.cpu(), axes, counts).to(self._device)

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        return self._inner.all_to_all(x.cpu(), axes, send, receive).to(self._device)

    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        return self._inner.broadcast(x.cpu(), axes).to(self._device)


def _sum(addends: list[Tensor]) -> Tensor:
    """The sum in list order."""
    if not prod(addends[0].shape):
        return addends[0]
    total = torch.add(addends[0], addends[1]) if len(addends) > 1 else addends[0]
    for addend in addends[2:]:
        total = total.add_(addend)
    return total
