"""What several families read from a config.json, in the spellings that there are."""

import math
from collections.abc import Mapping
from typing import Any

from isomoe.blocks import LinearScaling, Llama3, Rope, Scaling, Yarn
from isomoe.errors import ConfigError
from isomoe.models.causal_lm import BlockDiffusion, HFConfig

DTYPES = ("bfloat16", "float32")
"""Names of the torch dtypes that models are run in."""


def first(config: HFConfig, *keys: str, default: Any = None) -> Any:
    """The value of the first of `keys` that is set."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def dtype_name(config: HFConfig) -> str:
    """The dtype of a checkpoint; bfloat16, as nearly all are published in, if it names none.

    Raises:
        ConfigError: if it is not one of `DTYPES`.
    """
    found = first(config, "dtype", "torch_dtype", default="bfloat16")
    if found not in DTYPES:
        raise ConfigError(
            f"config.json: dtype {found!r} is not supported; bfloat16 or float32 would work "
            "(an engine takes --dtype)"
        )
    return str(found)


def block_diffusion(config: HFConfig, block_size: int, mask_token_id: int) -> BlockDiffusion:
    """How a model fills in blocks; the arguments are meant where the config names none.

    Raises:
        ConfigError: if it names what is no size or no token.
    """
    size = first(config, "block_size", default=block_size)
    mask = first(config, "mask_token_id", default=mask_token_id)
    for key, value, least in (("block_size", size, 1), ("mask_token_id", mask, 0)):
        if type(value) is not int or value < least:
            raise ConfigError(f"config.json: {key!r} is {value!r}, not a number from {least} on")
    return BlockDiffusion(block_size=size, mask_token_id=mask)


def head_dim(config: HFConfig) -> int:
    """`head_dim`, or hidden size over heads where the config has none."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_options(config: HFConfig, layer_type: str | None = None) -> dict[str, Any]:
    """Theta, type and the rest in one mapping.

    transformers 5 has `rope_parameters` (for some models one a layer type); released configs have
    `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside one another.

    Raises:
        ConfigError: if there is one for each layer type, and none was asked for.
    """
    found: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in found.values()):
        if layer_type is None:
            raise ConfigError(
                f"config.json: rope_parameters for each of {', '.join(found)} are not supported; "
                "for all layers together they are"
            )
        found = dict(found[layer_type])
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if found.get(key) is None:
            found[key] = first(config, key, default=default)
    found["rope_type"] = first(found, "rope_type", "type", default="default")
    return found


def rope(
    config: HFConfig, dim: int, options: Mapping[str, Any] | None = None, interleaved: bool = False
) -> Rope:
    """The model's rope on the first `dim` dims of a head.

    Args:
        options: as of `rope_options`, where they are not the model's own.

    Raises:
        ConfigError: for a scaling that is not supported.
    """
    options = rope_options(config) if options is None else options
    theta, kind = float(options["rope_theta"]), options["rope_type"]
    original = int(
        options.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    scaling: Scaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=float(options["factor"]))
        case "llama3":
            scaling = Llama3(
                factor=float(options["factor"]),
                low_freq_factor=float(options["low_freq_factor"]),
                high_freq_factor=float(options["high_freq_factor"]),
                original_positions=original,
            )
        case "yarn" | "deepseek_yarn":
            scaling = Yarn(
                factor=float(options["factor"]),
                original_positions=original,
                beta_fast=float(options.get("beta_fast") or 32),
                beta_slow=float(options.get("beta_slow") or 1),
                truncate=options.get("truncate", True),
            )
        case _:
            raise ConfigError(
                f"config.json: rope type {kind!r} is not supported; "
                "what is: default, linear, llama3, yarn"
            )
    amplitude = yarn_amplitude(options) if isinstance(scaling, Yarn) else 1.0
    return Rope(dim, theta, scaling, amplitude, interleaved)


def yarn_amplitude(options: Mapping[str, Any]) -> float:
    """What YaRN multiplies cos and sin with; DeepSeek's two numbers give a ratio."""
    factor, given = float(options["factor"]), options.get("attention_factor")
    if given is not None:
        return float(given)
    one, all_dims = options.get("mscale"), options.get("mscale_all_dim")
    if one and all_dims:
        return yarn_mscale(factor, float(one)) / yarn_mscale(factor, float(all_dims))
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
