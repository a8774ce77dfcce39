"""A hook into every worker, for tools that plant defects or look for them."""

from importlib import import_module
from typing import Protocol, cast

from isomoe.errors import ConfigError
from isomoe.layout import Chain
from isomoe.models import CausalLM
from isomoe.stream import ResidualStream


class Instrument(Protocol):
    """What `EngineConfig.instrument` names. Each rank imports its own."""

    def in_chain(self, chain: Chain) -> Chain:
        """The chain to plan, given the model's own."""

    def in_model(self, model: CausalLM) -> None:
        """Called once, when the weights are loaded."""

    def in_stream(self, stream: ResidualStream) -> None:
        """Called on the stream of each step, before the forward pass."""


def load_instrument(path: str | None) -> Instrument | None:
    """The object at `package.module:attribute`.

    Raises:
        ConfigError: if there is none, or it lacks a method.
    """
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"instrument {path!r}: {error}") from None
    for method in ("in_chain", "in_model", "in_stream"):
        if not callable(getattr(found, method, None)):
            raise ConfigError(f"instrument {path!r}: has no method {method}")
    return cast(Instrument, found)
