"""A defect of a chosen size: what one layer writes, times a factor.

It plants no historic defect. It is the measure of what a comparison can see: docs/parity.md says
how many tokens tell a layer that is 1% off from rounding.
"""

from dataclasses import dataclass

from torch import Tensor

from isomoe.errors import ConfigError
from isomoe.layout import Chain
from isomoe.models import CausalLM
from isomoe.stream import ResidualStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """An `engine.Instrument` that multiplies what one block writes.

    Attributes:
        block: its name in the plan, such as "model.layers.2.mlp.experts".
        factor: 1 changes nothing.
    """

    block: str
    factor: float

    @property
    def path(self) -> str:
        """What `EngineConfig.instrument` must say to plant it."""
        return f"{__name__}:scale={self.block}*{self.factor}"

    def in_chain(self, chain: Chain) -> Chain:
        """The model's own.

        Raises:
            ConfigError: if it has no such block: the probe would change nothing.
        """
        blocks = [chain.embedding, *(b for read in chain.reads for b in read.consumers)]
        if self.block not in [block.name for block in blocks]:
            raise ConfigError(f"instrument {self.path!r}: the model has no block {self.block!r}")
        return chain

    def in_model(self, model: CausalLM) -> None:
        """Changes nothing."""

    def in_stream(self, stream: ResidualStream) -> None:
        """Scales what the block writes in this step."""
        write = stream.write

        def scaled(block: str, x: Tensor) -> None:
            write(block, x * self.factor if block == self.block else x)

        stream.write = scaled  # type: ignore[method-assign]


def scale(argument: str) -> Scale:
    """The instrument that `model.layers.2.mlp.experts*1.01` stands for."""
    block, _, factor = argument.rpartition("*")
    return Scale(block=block, factor=float(factor))
