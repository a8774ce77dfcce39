"""What several families read from a config.json, in the spellings that there are."""

import math
from collections.abc import Mapping
from typing import Any

from isomoe.blocks import LinearScaling, Llama3, Rope, Scaling, Yarn
from isomoe.errors import ConfigError

HFConfig = Mapping[str, Any]


def first(config: HFConfig, *keys: str, default: Any = None) -> Any:
    """The value of the first of `keys` that is set."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def head_dim(config: HFConfig) -> int:
    """`head_dim`, or hidden size over heads where the config has none."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_options(config: HFConfig, layer_type: str | None = None) -> dict[str, Any]:
    """Theta, type and the rest in one mapping.

    transformers 5 has `rope_parameters` (for some models one a layer type); released configs have
    `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside one another.
    """
    found: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layer_type is not None and isinstance(found.get(layer_type), Mapping):
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
