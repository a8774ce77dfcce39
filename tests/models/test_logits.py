"""Logits of both families equal transformers' on every kind of layout, in every regime."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isomoe.layout import Parallelism
from isomoe.models import family_of, layouts, read_config
from model_layouts import kinds, sample
from support import load_model, plan_of, save_random, simulate, tiny_config

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"mlp_only_layers": [1]}),
    "qwen3 of threes, tied, with biases": (
        "qwen3",
        {
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
            "head_dim": 8,
            "num_experts": 6,
            "intermediate_size": 72,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
        },
    ),
    "qwen3 with 2 KV heads": (
        "qwen3",
        {"num_attention_heads": 12, "num_key_value_heads": 2, "num_experts": 12, "vocab_size": 96},
    ),
    "qwen2": ("qwen2", {"mlp_only_layers": [0, 2], "num_hidden_layers": 4}),
    "qwen2 of threes, tied": (
        "qwen2",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "num_experts": 6,
            "intermediate_size": 72,
            "shared_expert_intermediate_size": 48,
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
        },
    ),
    "qwen2 with 1 KV head and no bias": (
        "qwen2",
        {"num_key_value_heads": 1, "decoder_sparse_step": 2, "qkv_bias": False},
    ),
}
PROMPTS = [((5, 2),), ((), (4,), (1, 1)), ((3,), (), (1,), (2, 1), (), (6,), (1,), (1, 1))]
"""Lengths of the prompts of each attention-DP group; groups beyond a list are empty."""


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, config, transformers' model) of one configuration."""
    family, changes = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = save_random(tiny_config(family, **changes), folder)
    return folder, read_config(folder), reference


def tokens(length: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(100 * seed + length)
    drawn: list[int] = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    return drawn


def prompts_of(lengths: Sequence[Sequence[int]], groups: int, vocabulary: int) -> list[list[Any]]:
    padded = [*lengths, *([()] * groups)][:groups]
    return [
        [tokens(n, 10 * g + i, vocabulary) for i, n in enumerate(p)] for g, p in enumerate(padded)
    ]


class Reference:
    """transformers' logits of every token of a prompt, each prompt computed once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def prompt(self, ids: tuple[int, ...]) -> Tensor:
        if ids not in self.known:
            self.known[ids] = self.model(torch.tensor([ids])).logits[0]
        return self.known[ids]

    def group(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
        parts = [self.prompt(tuple(ids)) for ids in prompts]
        return torch.cat(parts) if parts else torch.empty(0, vocabulary)


def assert_equal_logits(
    got: Sequence[Tensor],
    reference: Reference,
    prompts: Sequence[Sequence[Sequence[int]]],
    layout: Parallelism,
    vocabulary: int,
) -> None:
    for rank, logits in enumerate(got):
        group = rank // layout.attn_tp
        expected = reference.group(prompts[group], vocabulary)
        assert logits.shape == expected.shape, f"{layout}, rank {rank}"
        # 1e-4: logits of size 1 to 5 in fp32, through 3 or 4 layers summed in another order.
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4), f"{layout}, rank {rank}"
    for first, second in pairwise(range(len(got))):
        if first // layout.attn_tp == second // layout.attn_tp:
            assert torch.equal(got[first], got[second]), f"{layout}: ranks of a group differ"


def test_logits_are_those_of_transformers_on_every_kind_of_layout(checkpoint: Any) -> None:
    folder, config, model = checkpoint
    vocabulary, reference = config["vocab_size"], Reference(model)
    for layout in sample(family_of(config), config):
        models = [load_model(folder, layout, r, torch.float32) for r in range(layout.tp_size)]
        for lengths in PROMPTS:
            prompts = prompts_of(lengths, layout.attn_dp_size, vocabulary)
            if lengths is not PROMPTS[0]:
                got = simulate(models, prompts)
                assert_equal_logits(got, reference, prompts, layout, vocabulary)
            most = max(sum(map(len, group)) for group in prompts)
            got = simulate(models, prompts, padded=[most + 1] * layout.attn_dp_size)
            assert_equal_logits(got, reference, prompts, layout, vocabulary)


@pytest.mark.slow
def test_logits_are_those_of_transformers_on_every_layout(checkpoint: Any) -> None:
    folder, config, model = checkpoint
    vocabulary, reference = config["vocab_size"], Reference(model)
    for layout in layouts(family_of(config), config, 16):
        models = [load_model(folder, layout, r, torch.float32) for r in range(layout.tp_size)]
        prompts = prompts_of(PROMPTS[-1], layout.attn_dp_size, vocabulary)
        assert_equal_logits(simulate(models, prompts), reference, prompts, layout, vocabulary)


def test_logits_are_the_same_in_every_regime(checkpoint: Any) -> None:
    folder, config, model = checkpoint
    vocabulary, reference = config["vocab_size"], Reference(model)
    family = family_of(config)
    plans: set[object] = set()
    for layout in sample(family, config)[1:5]:
        models = [load_model(folder, layout, r, torch.float32) for r in range(layout.tp_size)]
        prompts = prompts_of(PROMPTS[-1], layout.attn_dp_size, vocabulary)
        for regime, bound in enumerate(plan_of(models[0]).regimes):
            if bound.signature in plans:
                continue
            plans.add(bound.signature)
            got = simulate(models, prompts, regime=regime)
            assert_equal_logits(got, reference, prompts, layout, vocabulary)
    assert len(plans) >= 4, "the regimes differ"


def test_only_the_rows_that_were_asked_for_get_logits(checkpoint: Any) -> None:
    folder, config, model = checkpoint
    vocabulary, reference = config["vocab_size"], Reference(model)
    wide = [p for p in sample(family_of(config), config) if p.attn_dp_size > 1][:3]
    assert wide
    for layout in [Parallelism(), *wide]:
        models = [load_model(folder, layout, r, torch.float32) for r in range(layout.tp_size)]
        prompts = prompts_of([(3,), (), (1, 4), (2,)], layout.attn_dp_size, vocabulary)
        totals = [sum(map(len, group)) for group in prompts]
        chosen = [list(range(g % 2, n, 2)) for g, n in enumerate(totals)]
        for rank, logits in enumerate(simulate(models, prompts, chosen=chosen)):
            group = rank // layout.attn_tp
            expected = reference.group(prompts[group], vocabulary)[chosen[group]]
            assert logits.shape == expected.shape
            # 1e-4: as above.
            assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4), f"{layout}, {rank}"


def test_the_sample_meets_every_kind_of_group(tmp_path: Path) -> None:
    from isomoe.models import HFConfig

    met: set[str] = set()
    sizes: set[int] = set()
    families = set()
    for family_name, changes in CONFIGS.values():
        tiny_config(family_name, **changes).save_pretrained(tmp_path)
        config: HFConfig = dict(read_config(tmp_path))
        architecture = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}[family_name]
        config = {**config, "architectures": [architecture]}
        family = family_of(config)
        families.add(family)
        for layout in sample(family, config):
            met |= {name for name, _ in kinds(family, config, layout)}
            sizes.add(layout.tp_size)
    groups = {"attn_dp", "attn_tp", "copies of 2 KV heads", "moe_ep", "moe_tp", "ffn_dp", "ffn_tp"}
    assert groups | {"lm_dp", "lm_tp", "axes (2, 3)", "axes (3, 2)", "axes (2, 2, 2)"} <= met
    assert sizes == {1, 2, 3, 4, 6, 8}
    assert len(families) == 2


@pytest.mark.parametrize("layout", ["tp1", "tp4,dp2,ep2", "tp3,dp3"])
def test_bf16_stays_near_fp32(layout: str, tmp_path: Path) -> None:
    changes = CONFIGS["qwen3 of threes, tied, with biases"][1]
    model = save_random(tiny_config("qwen3", **changes), tmp_path)
    parallelism = Parallelism.parse(layout)
    models = [
        load_model(tmp_path, parallelism, r, torch.bfloat16) for r in range(parallelism.tp_size)
    ]
    prompts = prompts_of([(4,), (2, 3), (1,)], parallelism.attn_dp_size, 131)
    for rank, logits in enumerate(simulate(models, prompts)):
        assert logits.dtype == torch.bfloat16
        expected = Reference(model).group(prompts[rank // parallelism.attn_tp], 131)
        # Weights and rows carry 8 bits; an expert that only just won may lose. Wrong sums are
        # off by the size of the logits, which this bound is a quarter of.
        error = (logits.float() - expected).square().mean().sqrt()
        assert error < 0.25 * expected.square().mean().sqrt()
