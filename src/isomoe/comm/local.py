"""The communicator of a lone rank: there is nobody to talk to."""

from collections.abc import Sequence

from torch import Tensor

from isomoe.comm.base import Communicator
from isomoe.errors import CollectiveError
from isomoe.layout.mesh import Axes


class LocalComm(Communicator):
    """A mesh without axes has no group; a call would be a defect, and is refused."""

    def all_reduce(self, x: Tensor, axes: Axes) -> Tensor:
        raise self._alone("all_reduce", axes)

    def all_gather(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        raise self._alone("all_gather", axes)

    def reduce_scatter(self, x: Tensor, axes: Axes, counts: Sequence[int]) -> Tensor:
        raise self._alone("reduce_scatter", axes)

    def all_to_all(
        self, x: Tensor, axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        raise self._alone("all_to_all", axes)

    def broadcast(self, x: Tensor, axes: Axes) -> Tensor:
        raise self._alone("broadcast", axes)

    def _alone(self, op: str, axes: Axes) -> CollectiveError:
        return CollectiveError(f"{op} over axes {axes} on the only rank")
