"""Model families: one short file each, composed of blocks."""

from isomoe.models.causal_lm import BlockDiffusion, CausalLM, HFConfig, Layer
from isomoe.models.options import dtype_name
from isomoe.models.registry import (
    FAMILIES,
    build,
    check_expert_flags,
    family_of,
    fits,
    layouts,
    read_config,
    representative,
)
from isomoe.models.shipped import known_configs

__all__ = [
    "FAMILIES",
    "BlockDiffusion",
    "CausalLM",
    "HFConfig",
    "Layer",
    "build",
    "check_expert_flags",
    "dtype_name",
    "family_of",
    "fits",
    "known_configs",
    "layouts",
    "read_config",
    "representative",
]
