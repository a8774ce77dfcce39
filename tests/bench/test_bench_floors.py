"""The counts equal those made by hand, those of the checkpoint, and those of benchmarks/peers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import isomoe.models
from isomoe.bench.device import DeviceLimits, measure_limits
from isomoe.bench.floors import Attending, ModelCounts, Work
from isomoe.blocks import SparseMoe
from isomoe.errors import ConfigError
from isomoe.kernels import Span
from isomoe.layout import Parallelism
from isomoe.models import build, read_config
from isomoe.weights import bundled_checkpoint

CONFIGS = Path(isomoe.models.__file__).parent / "configs"
LIMITS = DeviceLimits(
    name="a card",
    copy_bytes_per_s=3.0e12,
    matmul_flops_per_s=771e12,
    copy_bytes=1,
    matmul_size=8192,
    dtype="bfloat16",
)
TINY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 10,
    "intermediate_size": 7,
    "moe_intermediate_size": 3,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture(scope="module")
def qwen3_30b() -> ModelCounts:
    return ModelCounts.of(read_config(CONFIGS / "qwen3-30b-a3b.json"))


def test_a_tiny_model_is_counted_as_by_hand() -> None:
    counts = ModelCounts.of(TINY)
    qkv, output, qk_norms = (4 + 2 * 2) * 6 * 10, 10 * 4 * 6, 2 * 6
    assert counts.attention == 2 * (qkv + output + qk_norms)
    assert counts.norms == (2 * 2 + 1) * 10
    assert counts.router == 5 * 10
    assert counts.dense == 3 * 7 * 10
    assert counts.expert == 3 * 3 * 10
    assert counts.lm_head == counts.embedding == 100 * 10
    assert (counts.sparse_layers, counts.num_experts, counts.top_k) == (1, 5, 2)
    assert counts.kv_bytes_per_token == 2 * (2 * 2 * 6) * 2


def test_a_step_of_a_tiny_model_is_counted_as_by_hand() -> None:
    counts = ModelCounts.of(TINY)
    rest = counts.attention + counts.norms + counts.router + counts.dense
    step = counts.decode([9, 4, 8], experts=3)
    assert step.weight_bytes == 2 * (rest + 3 * 10 + counts.lm_head + 3 * counts.expert)
    assert step.kv_bytes == (9 + 4 + 8) * counts.kv_bytes_per_token
    row = counts.attention + counts.router + counts.dense + 2 * counts.expert
    pairs = (9 + 4 + 8) * 2 * 4 * 4 * 6  # layers, heads, head dim; two products of two operations
    assert step.flops == 3 * 2 * (row + counts.lm_head) + pairs
    prefill = counts.prefill([3, 2], experts=5)
    assert prefill.kv_bytes == 0
    assert prefill.flops == 2 * (5 * row + 2 * counts.lm_head) + (6 + 3) * 2 * 4 * 4 * 6


def test_experts_are_expected_of_an_even_choice() -> None:
    counts = ModelCounts.of(TINY)
    assert counts.expected_experts(0) == 0.0
    assert counts.expected_experts(1) == pytest.approx(2.0)
    assert counts.expected_experts(2) == pytest.approx(5 * (1 - (3 / 5) ** 2))
    dense = ModelCounts.of({**TINY, "mlp_only_layers": [0, 1]})
    assert dense.expected_experts(4) == 0.0
    assert dense.decode([1]).weight_bytes > 0.0


def test_the_parameters_are_those_of_the_checkpoint() -> None:
    folder = bundled_checkpoint()
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        stored = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    counts = ModelCounts.of(read_config(folder))
    experts = counts.sparse_layers * counts.num_experts * counts.expert
    rest = counts.attention + counts.norms + counts.router + counts.dense
    assert rest + experts + counts.lm_head + counts.embedding == stored


def test_shared_experts_and_biases_count_too() -> None:
    counts = ModelCounts.of(read_config(CONFIGS / "qwen1.5-moe-a2.7b.json"))
    assert counts.dense == 24 * (3 * 2048 * 5632 + 2048)
    assert counts.attention == 24 * (4 * 2048 * 2048 + 3 * 2048)


def test_a_window_bounds_the_keys_and_the_pairs_of_its_layers() -> None:
    """gpt-oss: every other layer has a window of 128."""
    counts = ModelCounts.of(read_config(CONFIGS / "gpt-oss-20b.json"))
    token, pair = 12 * 2 * 8 * 64, 12 * 4 * 64 * 64  # of half the layers
    for context, keys in ((100, 200), (128, 256), (1000, 1128)):
        assert counts.decode([context]).kv_bytes == 2 * keys * token
    rows = [counts.prefill([length]).flops for length in (0, 128, 1000)]
    rest = counts.row_flops
    assert rows[1] - rows[0] == 128 * rest + 2 * pair * (128 * 129 // 2)
    seen = 1000 * 1001 // 2 + 128 * 129 // 2 + (1000 - 128) * 128
    assert rows[2] - rows[0] == 1000 * rest + pair * seen


@pytest.mark.parametrize(
    ("span", "length"),
    [
        (span, length)
        for span in (Span(), Span(window=3), Span(chunk=4))
        for length in (1, 2, 3, 4, 5, 8, 11)
    ],
)
def test_keys_and_pairs_are_those_that_a_span_shows(span: Span, length: int) -> None:
    layers = Attending(span=span, kv_values=1, pair_flops=1)
    keys = [span.stop(at, length) - span.start(at) for at in range(length)]
    assert layers.keys(length) == keys[-1]
    assert layers.pairs(length) == sum(keys)


def test_a_state_is_read_and_written_in_place_of_keys() -> None:
    """Ring-mini-linear: one layer in five has keys, the others a state in fp32."""
    counts = ModelCounts.of(read_config(CONFIGS / "ring-mini-linear-2.0.json"))
    assert counts.kv_bytes_per_token == 4 * 2 * 4 * 128 * 2
    state = 16 * 16 * 128 * 128
    assert counts.state_bytes == 4 * state
    step, longer = counts.decode([10, 20]), counts.decode([110, 20])
    assert step.kv_bytes == 2 * 2 * 4 * state + 30 * counts.kv_bytes_per_token
    assert longer.kv_bytes - step.kv_bytes == 100 * counts.kv_bytes_per_token
    without = replace(counts, state_flops=0).decode([10, 20])
    assert step.flops - without.flops == 2 * 4 * state


def test_a_model_that_fills_in_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="fills in blocks"):
        ModelCounts.of(read_config(CONFIGS / "sdar-30b-a3b-chat.json"))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_the_experts_of_all_layers_are_alike(file: Path) -> None:
    """`expert` and `num_experts` are one layer's, and stand for all."""
    model = build(read_config(file), Parallelism())
    blocks = [block for layer in model.layers for block in layer.ffn]
    kinds = {
        (block.num_experts, block.routing.top_k, block.experts.intermediate_size)
        for block in blocks
        if isinstance(block, SparseMoe)
    }
    assert len(kinds) == 1


def test_a_tied_head_is_read_though_it_is_the_embedding() -> None:
    tied = ModelCounts.of({**TINY, "tie_word_embeddings": True})
    assert tied.lm_head == tied.embedding == 1000


def test_the_counts_of_qwen3_30b_are_the_known_ones(qwen3_30b: ModelCounts) -> None:
    one = qwen3_30b.decode([128 + 256 / 2])
    assert one.weight_bytes == pytest.approx(6.08e9, rel=1e-3)
    many = qwen3_30b.decode([512 + 256 / 2] * 64)
    assert many.weight_bytes == pytest.approx(59.5e9, rel=1e-3)
    assert many.kv_bytes == pytest.approx(4.03e9, rel=1e-3)
    assert qwen3_30b.expected_experts(64) == pytest.approx(125.9, abs=0.1)
    prompts = qwen3_30b.prefill([4096] * 16)
    assert prompts.flops == pytest.approx(0.463e15, rel=2e-3)
    assert one.seconds(LIMITS) == pytest.approx(2.036e-3, rel=1e-3)
    assert prompts.seconds(LIMITS) == pytest.approx(0.601, rel=1e-3), "bound by arithmetic"


def test_work_adds_up() -> None:
    both = Work(weight_bytes=1, kv_bytes=2, flops=3) + Work(weight_bytes=10, kv_bytes=20, flops=30)
    assert (both.bytes, both.flops) == (33, 33)
    assert both.intensity == 1.0


def test_a_device_is_measured() -> None:
    limits = measure_limits(torch.device("cpu"), torch.float32)
    assert limits.name
    assert 1e8 < limits.copy_bytes_per_s < 1e13
    assert 1e8 < limits.matmul_flops_per_s < 1e16
    assert limits.dtype == "float32"
