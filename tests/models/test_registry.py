"""From a config.json to a class: what is refused, and that the advice given works."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from isomoe.errors import ConfigError
from isomoe.layout import Parallelism
from isomoe.models import FAMILIES, build, family_of, fits, layouts, read_config, representative
from support import tiny_config

FIELDS = {"--tp-size": "tp_size", "--attn-dp-size": "attn_dp_size", "--ep-size": "ep_size"}
ARCHITECTURES = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    config = tiny_config(family, **changes).to_dict()
    return json.loads(json.dumps(config, default=str)) | {"architectures": [ARCHITECTURES[family]]}


def works(config: dict[str, Any], layout: Parallelism) -> bool:
    """Whether every rank can be built."""
    try:
        for rank in range(layout.tp_size):
            build(config, layout, rank)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("layout", "fact"),
    [
        ("tp3", "3 does not divide 8 attention heads"),
        ("tp5,dp5,ep5", "5 does not divide 8 experts"),
        ("tp16", "16 does not divide 8 attention heads"),
        ("tp16,dp2,ep16", "16 does not divide 8 experts"),
        ("tp4,dp4,ep1", None),
        ("tp6,dp3,ep2", "attn_tp=2 and moe_tp=3 share no mesh"),
        ("tp12,dp2,ep4", "6 does not divide 8 attention heads"),
        ("tp64,dp8,ep64", "64 does not divide 8 experts"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_nearest_sizes_that_do(
    family: str, layout: str, fact: str | None
) -> None:
    config = config_of(family, shared_expert_intermediate_size=960)
    asked = Parallelism.parse(layout)
    if fact is None:
        assert works(config, asked)
        return
    with pytest.raises(ConfigError) as refused:
        build(config, asked)
    message = str(refused.value)
    assert message.startswith(f"{asked.flags}: ")
    assert fact in message
    offers = dict.fromkeys(FIELDS, ())
    for flag, *sizes in re.findall(
        r"(--[a-z-]+size) (\d+)(?: or (\d+))?(?=,|$)", message.partition("work: ")[2]
    ):
        offers[flag] = tuple(int(size) for size in sizes if size)
    for flag, offered in offers.items():
        here = getattr(asked, FIELDS[flag])
        good = []
        for size in range(1, 4 * asked.tp_size + 1):
            try:
                candidate = asked.with_sizes(**{FIELDS[flag]: size})
            except ConfigError:
                continue
            if size != here and works(config, candidate):
                good.append(size)
        nearest = sorted(good, key=lambda size, here=here: (abs(size - here), size))[:2]
        assert offered == tuple(sorted(nearest)), message


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    known = [name for family in FAMILIES for name in family.architectures]
    assert known
    with pytest.raises(ConfigError) as refused:
        family_of({"architectures": ["MambaForCausalLM"]})
    message = str(refused.value)
    assert message == f"architecture MambaForCausalLM is not supported; known: {', '.join(known)}"
    with pytest.raises(ConfigError, match=r"\(none; model_type 'gpt2'\) is not supported"):
        family_of({"model_type": "gpt2"})


def test_every_family_is_found_by_each_of_its_architectures() -> None:
    for family in FAMILIES:
        for name in family.architectures:
            assert family_of({"architectures": [name]}) is family


REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size", "intermediate_size",
)  # fmt: skip


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("key", [*REQUIRED, "shared_expert_intermediate_size"])
def test_a_missing_key_is_named(family: str, key: str) -> None:
    if family == "qwen3" and key.startswith("shared"):
        assert key not in config_of(family), "qwen3 has no shared expert"
        return
    config = config_of(family, mlp_only_layers=[1])
    if "num_local_experts" in config:  # the newer spelling
        config["num_experts"] = config.pop("num_local_experts")
    build(config, Parallelism())
    del config[key]
    with pytest.raises(ConfigError, match=f"^config.json: '{key}' is missing$"):
        build(config, Parallelism())


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("rope_parameters", {"rope_type": "longrope", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ],
)
def test_what_would_change_the_answer_and_is_not_built_is_refused(
    family: str, key: str, value: object
) -> None:
    config = config_of(family)
    if key == "rope_scaling":
        del config["rope_parameters"]
    with pytest.raises(ConfigError, match=r"config.json: .* is not supported; .* is"):
        build(config | {key: value}, Parallelism())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_both_spellings_of_the_rope_and_of_the_experts_give_one_model(family: str) -> None:
    config = config_of(family, rope_theta=5e5)
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "num_local_experts")}
    older |= {"rope_theta": 5e5, "num_experts": 8}
    new, old = build(config, Parallelism()), build(older, Parallelism())
    assert [block.spec for block in new.blocks()] == [block.spec for block in old.blocks()]
    turns = [model.rope.tables(8, torch.device("cpu"))[0] for model in (new, old)]
    assert torch.equal(*turns)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not readable as JSON"), ("[1]", "not a JSON object")],
)
def test_a_config_that_cannot_be_read_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("dense", [[], [1], [0, 1, 2]], ids=["sparse", "mixed", "dense"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_listed_layouts_are_exactly_those_that_can_be_built(
    family: str, dense: list[int]
) -> None:
    config = config_of(family, mlp_only_layers=dense)
    listed = list(layouts(family_of(config), config, 6))
    assert len(set(listed)) == len(listed)
    for tp in range(1, 7):
        for dp in range(1, tp + 1):
            for ep in range(1, tp + 1):
                try:
                    layout = Parallelism(tp_size=tp, attn_dp_size=dp, ep_size=ep)
                except ConfigError:
                    continue
                assert (layout in listed) == works(config, layout), str(layout)
                assert fits(family_of(config), config, layout) == works(config, layout)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("tp2,ep2", "--ep-size 2"),
        ("tp1,fp8", "--moe-wire-format fp8"),
        ("tp2,ep2,a2a", "--ep-size 2, --moe-a2a-backend torch"),
        (
            "tp4,dp2,ep2,dense1,a2aauto,nvfp4,red2",
            "--ep-size 2, --moe-a2a-backend auto, --moe-wire-format nvfp4, "
            "--ep-num-redundant-experts 2",
        ),
    ],
)
def test_flags_of_experts_are_refused_by_a_model_without_any(words: str, flags: str) -> None:
    layout = Parallelism.parse(words)
    config = config_of("qwen3", hidden_size=64)
    assert works(config, replace(layout, moe_dense_tp_size=None))
    for dense in ({"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 4}, {"num_experts": 0}):
        none = {k: v for k, v in config.items() if k != "num_local_experts"} | {"num_experts": 8}
        with pytest.raises(ConfigError) as refused:
            build(none | dense, layout)
        assert str(refused.value) == f"{flags}: the model has no routed experts; it works without"
        assert works(none | dense, Parallelism.parse("tp2,dp2,dense1"))


def test_the_representative_layers_have_every_step_from_sort_to_sort() -> None:
    for step, dense in [(1, []), (1, [0]), (2, []), (3, [2]), (1, [1, 2, 5])]:
        config = config_of(
            "qwen3", num_hidden_layers=8, decoder_sparse_step=step, mlp_only_layers=dense
        )
        family = family_of(config)
        sorts = family.sorts(config)
        assert [sort[-1] for sort in sorts] == [
            i not in dense and (i + 1) % step == 0 for i in range(8)
        ]
        chosen = representative(family, config)
        assert chosen == sorted(set(chosen))
        kept = {(sorts[a], sorts[b]) for a, b in pairwise(chosen) if b == a + 1}
        assert kept == set(pairwise(sorts))
        assert chosen[0] == 0
