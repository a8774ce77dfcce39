"""Model families: one short file each, composed of blocks."""

from isomoe.models.causal_lm import BlockDiffusion, CausalLM, HFConfig, Layer
from isomoe.models.registry import (
    FAMILIES,
    build,
    family_of,
    fits,
    layouts,
    read_config,
    representative,
)

__all__ = [
    "FAMILIES",
    "BlockDiffusion",
    "CausalLM",
    "HFConfig",
    "Layer",
    "build",
    "family_of",
    "fits",
    "layouts",
    "read_config",
    "representative",
]
