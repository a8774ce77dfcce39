"""Hooks into every worker, for tools that plant defects or look for them."""

from collections.abc import Sequence
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
        """Called once, when the model is built and has no weights yet."""

    def in_stream(self, stream: ResidualStream) -> None:
        """Called on the stream of each step, before the forward pass."""


class _Several:
    """Instruments one after the other: a later one wraps what an earlier one has changed."""

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        self._instruments = instruments

    def in_chain(self, chain: Chain) -> Chain:
        for instrument in self._instruments:
            chain = instrument.in_chain(chain)
        return chain

    def in_model(self, model: CausalLM) -> None:
        for instrument in self._instruments:
            instrument.in_model(model)

    def in_stream(self, stream: ResidualStream) -> None:
        for instrument in self._instruments:
            instrument.in_stream(stream)


def load_instrument(setting: str | None) -> Instrument | None:
    """What `EngineConfig.instrument` says; None for None.

    Raises:
        ConfigError: if one of them does not exist, or lacks a method.
    """
    if setting is None:
        return None
    found = [_load(part) for part in setting.split(";")]
    return found[0] if len(found) == 1 else _Several(found)


def _load(part: str) -> Instrument:
    """The object at `package.module:attribute`, or what it makes of `=ARGUMENT`."""
    path, equals, argument = part.partition("=")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"instrument {path!r}: {error}") from None
    if equals:
        if not callable(found):
            raise ConfigError(f"instrument {path!r}: takes no ={argument}; {path} alone would work")
        found = found(argument)
    for method in ("in_chain", "in_model", "in_stream"):
        if not callable(getattr(found, method, None)):
            raise ConfigError(f"instrument {path!r}: has no method {method}")
    return cast(Instrument, found)
