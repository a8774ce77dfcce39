"""What a config.json may say: what is not built is refused, and what cannot be, by name."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from families import (
    bailing_moe,
    bailing_moe_linear,
    deepseek_v2,
    exaone_moe,
    glm4_moe,
    hunyuan_v3,
    llada2,
    mimo_v2_flash,
    qwen3_moe,
    sarvam_moe,
    sdar_moe,
    step3p5,
)
from isomoe.blocks import Attention, LinearScaling, Rope, SparseMoe
from isomoe.errors import ConfigError
from isomoe.layout import Parallelism
from isomoe.models import (
    CausalLM,
    build,
    dtype_name,
    family_of,
    fits,
    layouts,
    representative,
)

EXPERTS: Mapping[str, Any] = deepseek_v2.V3
QWEN: Mapping[str, Any] = qwen3_moe.CONFIG
LISTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}
"""Rope parameters for each kind of layer."""
RELEASED = ("rope_theta", "partial_rotary_factors", "yarn_only_types")
"""What says the same in Step-3.5's released config."""


def model(config: Mapping[str, Any], **changes: Any) -> CausalLM:
    return build({**config, **changes}, Parallelism())


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (bailing_moe.V1, "scoring_func", "sigmoid"),
        (bailing_moe.V2, "use_bias", True),
        (bailing_moe_linear.GQA, "rope_interleave", False),
        (bailing_moe_linear.GQA, "use_qkv_bias", True),
        (EXPERTS, "moe_layer_freq", 2),
        (deepseek_v2.V2, "rope_interleave", False),
        (exaone_moe.CONFIG, "scoring_func", "softmax"),
        (glm4_moe.CONFIG, "scoring_func", "softmax"),
        (glm4_moe.CONFIG, "topk_method", "greedy"),
        (hunyuan_v3.CONFIG, "route_norm", False),
        (mimo_v2_flash.CONFIG, "scoring_func", "softmax"),
        (mimo_v2_flash.CONFIG, "add_full_attention_sink_bias", True),
        (mimo_v2_flash.CONFIG, "add_swa_attention_sink_bias", False),
        (sarvam_moe.MLA, "attention_bias", True),
        (sarvam_moe.MLA, "scoring_func", "softmax"),
        (step3p5.CONFIG, "norm_expert_weight", False),
        (step3p5.CONFIG, "use_qk_norm", False),
        (step3p5.CONFIG, "zero_centered", False),
    ],
)
def test_an_option_that_is_not_built_is_refused(
    config: Mapping[str, Any], option: str, value: object
) -> None:
    model(config)
    with pytest.raises(ConfigError, match=rf"config.json: {option} {value!r} is not supported; "):
        model(config, **{option: value})


def test_null_groups_are_those_of_the_released_code() -> None:
    for config in (sarvam_moe.MLA, sarvam_moe.MLA | {"n_group": None, "topk_group": None}):
        routed = next(block for block in model(config).blocks() if isinstance(block, SparseMoe))
        assert (routed.routing.num_groups, routed.routing.kept_groups) == (3, 2)


def test_rope_parameters_for_each_kind_of_layer_are_read_or_refused() -> None:
    with pytest.raises(ConfigError, match="rope_parameters for each of full_attention, sliding"):
        model(QWEN, rope_parameters=LISTED)
    listed = {**step3p5.CONFIG, "rope_parameters": LISTED}
    plain = {key: listed[key] for key in listed if key not in RELEASED}
    turns = {}
    for layer, kind in zip(model(plain).layers, plain["layer_types"], strict=False):
        assert isinstance(layer.attn, Attention)
        assert layer.attn.core.rope is not None
        turns[kind] = layer.attn.core.rope.tables(8, torch.device("cpu"))[0]
    dim = turns["full_attention"].shape[1]
    wanted = {
        "full_attention": Rope(dim, 1e6),
        "sliding_attention": Rope(dim, 1e4, LinearScaling(factor=2.0)),
    }
    for kind, rope in wanted.items():
        assert torch.equal(turns[kind], rope.tables(8, torch.device("cpu"))[0])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (QWEN, {"num_experts_per_tok": "x"}, "it makes no model"),
        (QWEN, {"mlp_only_layers": 3}, "it makes no model"),
        (QWEN, {"rope_theta": "x"}, "it makes no model"),
        (QWEN, {"rope_scaling": "x"}, "it makes no model"),
        (QWEN, {"head_dim": -1}, "'head_dim' is -1, not a count"),
        (QWEN, {"moe_intermediate_size": "24"}, "'moe_intermediate_size' is '24', not a count"),
        (QWEN, {"num_key_value_heads": 5}, "24 heads on 5 KV heads cannot be"),
        (EXPERTS, {"first_k_dense_replace": "x"}, "it makes no model"),
        (EXPERTS, {"n_shared_experts": -1}, "a shared expert of -\\d+ columns cannot be"),
        (EXPERTS, {"n_group": 5}, "equal groups cannot be"),
        (exaone_moe.CONFIG, {"is_moe_layer": [True]}, "it makes no model"),
        (step3p5.CONFIG, {"moe_layers_enum": "a,b"}, "it makes no model"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_in_one_line(
    config: Mapping[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        model(config, **changes)
    assert "\n" not in str(refused.value)


def test_layers_of_an_unreadable_sort_are_refused_before_any_is_built() -> None:
    config = {**EXPERTS, "first_k_dense_replace": "x"}
    family = family_of(config)
    for ask in (
        lambda: representative(family, config),
        lambda: list(layouts(family, config, 2)),
        lambda: fits(family, config, Parallelism()),
        lambda: build(config, Parallelism.parse("tp2,dense1")),
    ):
        with pytest.raises(ConfigError, match="it makes no model"):
            ask()


@pytest.mark.parametrize("named", [7, None, [], [None, 3], {}])
def test_architectures_that_are_no_names_are_refused(named: object) -> None:
    with pytest.raises(ConfigError, match="is not supported; known: "):
        family_of({"architectures": named})


@pytest.mark.parametrize("config", [llada2.CONFIG, sdar_moe.CONFIG])
@pytest.mark.parametrize(
    ("key", "value"), [("block_size", "x"), ("block_size", -1), ("mask_token_id", 1.5)]
)
def test_blocks_that_cannot_be_are_refused(
    config: Mapping[str, Any], key: str, value: object
) -> None:
    changed = {**config, key: value}
    with pytest.raises(ConfigError, match=rf"config.json: '{key}' is {value!r}, not a number"):
        family_of(changed).diffusion(changed)


def test_the_dtype_is_bfloat16_unless_the_config_names_one() -> None:
    for config in ({}, {"dtype": None}, {"torch_dtype": "bfloat16"}):
        assert dtype_name(config) == "bfloat16"
    assert dtype_name({"torch_dtype": "float32"}) == "float32"
    assert dtype_name({"dtype": "float32", "torch_dtype": "bfloat16"}) == "float32"
    with pytest.raises(ConfigError, match="dtype 'float16' is not supported; bfloat16 or"):
        dtype_name({"dtype": "float16"})
