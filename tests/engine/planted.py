"""Instruments that the tests name by their dotted path."""

from isomoe.layout import Chain
from isomoe.models import CausalLM
from isomoe.stream import ResidualStream


class Quiet:
    """Changes nothing."""

    def in_chain(self, chain: Chain) -> Chain:
        return chain

    def in_model(self, model: CausalLM) -> None:
        pass

    def in_stream(self, stream: ResidualStream) -> None:
        pass


class RaisesOnRank1(Quiet):
    """Fails in the fourth step, on rank 1 alone; the other ranks go on to wait for it."""

    def __init__(self) -> None:
        self.steps = 0

    def in_stream(self, stream: ResidualStream) -> None:
        self.steps += 1
        if self.steps == 4 and stream.comm.seat.rank == 1:
            raise ZeroDivisionError("planted")


class BluntsTheNorm(Quiet):
    """Changes the model, so that a test sees that it was called."""

    def in_model(self, model: CausalLM) -> None:
        model.norm.eps += 1.0


raises_on_rank_1 = RaisesOnRank1()
blunts_the_norm = BluntsTheNorm()
quiet = Quiet()
lacks_methods = object()
