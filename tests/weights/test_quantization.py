"""Which `quantization_config`s are read; what is not is refused by the option's name."""

from typing import Any

import pytest

from isomoe.errors import ConfigError
from isomoe.weights import read_quantization
from isomoe.weights.quantization import Fp8, Mxfp4

DEEPSEEK_V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
GPT_OSS = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    "quant_method": "mxfp4",
}


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_none(config: dict[str, Any]) -> None:
    assert read_quantization(config) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DEEPSEEK_V3, Fp8((128, 128))),
        (DEEPSEEK_V3 | {"scale_fmt": "ue8m0"}, Fp8((128, 128))),
        (DEEPSEEK_V3 | {"fmt": "float8_e4m3fn", "ignored_layers": ["gate"]}, Fp8((128, 128))),
        (DEEPSEEK_V3 | {"weight_block_size": [1, 32], "dequantize": False}, Fp8((1, 32))),
        (GPT_OSS, Mxfp4()),
        ({"quant_method": "mxfp4"}, Mxfp4()),
    ],
)
def test_published_configs(options: dict[str, Any], expected: object) -> None:
    assert read_quantization({"quantization_config": options}) == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quant_method": "compressed-tensors"}, r"quant_method 'compressed-tensors'"),
        ({"quant_method": "gptq", "bits": 4}, r"quant_method 'gptq'"),
        ({}, r"quant_method None"),
        ("fp8", r"quantization_config is 'fp8', not an object"),
        (DEEPSEEK_V3 | {"activation_scheme": "static"}, r"activation_scheme 'static'"),
        (DEEPSEEK_V3 | {"fmt": "e5m2"}, r"fmt 'e5m2'"),
        (DEEPSEEK_V3 | {"expert_dtype": "fp4"}, r"expert_dtype 'fp4'"),
        (DEEPSEEK_V3 | {"kv_cache_scheme": "fp8"}, r"kv_cache_scheme 'fp8'"),
        (GPT_OSS | {"group_size": 16}, r"group_size 16"),
        ({"quant_method": "fp8"}, r"weight_block_size None"),
        *(
            (DEEPSEEK_V3 | {"weight_block_size": size}, r"weight_block_size")
            for size in (None, 128, [128], [128, 0], [128, "128"], [1, 2, 3])
        ),
    ],
)
def test_anything_else_is_refused_by_name(options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{named}") as refused:
        read_quantization({"quantization_config": options})
    assert "\n" not in str(refused.value)
