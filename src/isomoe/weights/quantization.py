"""What `quantization_config` of a config.json says about the tensors of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isomoe.errors import ConfigError

_ANY = ("modules_to_not_convert", "ignored_layers", "scale_fmt")
"""Options that change nothing here: which tensors are quantised, and how their scales are kept, is
read from the files."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """FP8 E4M3 with a scale for each block of a matrix, as DeepSeek-V3 publishes it.

    Attributes:
        block: rows and columns of a block; those at the lower and right edges may be smaller.
    """

    block: tuple[int, int]

    @property
    def square(self) -> int | None:
        """Rows and columns of a block; None if they differ."""
        rows, columns = self.block
        return rows if rows == columns else None


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """FP4 with a power of two for every 32 values of an expert's row, as gpt-oss publishes it."""


Quantization = Fp8 | Mxfp4


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """How the weights of a checkpoint are quantised; None if they are not.

    Weights are dequantised when they are loaded, or, of experts in FP8, on the way to a product. So
    the model computes as if it had been published in the dtype that it is run in: activations are
    not quantised, whatever `activation_scheme: dynamic` lets other engines do.

    Args:
        config: the content of the checkpoint's config.json.

    Raises:
        ConfigError: naming the option that is not supported.
    """
    options = config.get("quantization_config")
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ConfigError(f"config.json: quantization_config is {options!r}, not an object")
    match options.get("quant_method"):
        case "fp8":
            known: dict[str, tuple[Any, ...]] = {
                "activation_scheme": ("dynamic",),
                "fmt": ("e4m3", "float8_e4m3fn"),
                "expert_dtype": ("fp8",),
            }
            _check(options, known, "weight_block_size")
            return Fp8(_block(options.get("weight_block_size")))
        case "mxfp4":
            _check(options, {})
            return Mxfp4()
        case method:
            raise _refused("quant_method", method, "fp8 (in blocks) or mxfp4")


def _check(options: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], *others: str) -> None:
    """Refuses options that are set, and that are not known or have a value that is not."""
    for key, value in options.items():
        if not value or key in ("quant_method", *_ANY, *others):
            continue
        if key not in known:
            raise _refused(key, value, "without it")
        if value not in known[key]:
            raise _refused(key, value, " or ".join(map(repr, known[key])))


def _block(size: Any) -> tuple[int, int]:
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise _refused("weight_block_size", size, "two sizes such as [128, 128]")


def _refused(key: str, value: Any, works: str) -> ConfigError:
    return ConfigError(
        f"config.json: quantization_config.{key} {value!r} is not supported; {works} would work"
    )
