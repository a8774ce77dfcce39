"""Fused sums, both made and declined at each read: all else of a step is the same for both."""

import torch
from torch import Tensor

from isomoe.comm.sim import SimComm
from isomoe.layout import Move
from isomoe.prove.stubs import Violation
from isomoe.stream import Norm, ResidualStream


def fuse_in(ways: tuple[bool, ...], stream: ResidualStream, comm: SimComm) -> None:
    """Has a stream make every fused sum in several ways, of which all must give the same.

    Args:
        ways: made (True) or declined; the norm checks the rows of each.
        comm: the stream's.
    """
    fused = stream._fused

    def in_ways(move: Move, addend: Tensor, total: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        given = []
        for fuses in ways:
            comm.fuses = fuses
            try:
                given.append(fused(move, addend, total, norm))
            except Violation as violation:
                violation.fuses = fuses
                raise
        first, *others = given
        for other in others:
            if not all(map(torch.equal, first, other)):
                what = "a fused sum gives one thing where it is made, another where it is declined"
                raise Violation(str(move), what, None, comm.seat.rank, None)
        return first

    stream._fused = in_ways  # type: ignore[method-assign]
