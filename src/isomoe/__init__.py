"""isomoe: Mixture-of-Experts serving in which the parallel layout can never change the answer."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """The engine's names, imported at first use: `isomoe.layout` must not pull in torch."""
    if name in __all__:
        from isomoe import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'isomoe' has no attribute {name!r}")
