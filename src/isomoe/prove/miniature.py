"""Models that ship as a config alone, made small enough to run: of the same blocks, with random
weights.

Defects in parts that the bundled checkpoint has not (shared experts, biases, dense layers, a norm
over all heads) are run in the engine on these.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from isomoe.layout import Parallelism
from isomoe.models import HFConfig, build, known_configs, read_config
from isomoe.weights import bundled_checkpoint

_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
_COMMON = {"hidden_size": 64, "vocab_size": 640, "max_position_embeddings": 1024}
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "qwen2-57b-a14b": {
        **_HEADS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen3-moe-mixed": {"num_hidden_layers": 6, "intermediate_size": 32},
    "gpt-oss-20b": {
        **_HEADS,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "num_local_experts": 8,
    },
    "minimax-m2": {
        **_HEADS,
        "num_key_value_heads": 2,  # so that four ranks hold copies
        "head_dim": 16,
        "rotary_dim": 8,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "attn_type_list": [1] * 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
}
_DEVIATION = 0.15
"""Of matrices. Norms and biases deviate more, so that a bias that is counted wrongly shows."""

_VECTOR_DEVIATION = 0.3


def miniature(name: str) -> HFConfig:
    """The config.json of a model that ships, made small; of the bundled checkpoint, its own."""
    bundled = bundled_checkpoint()
    if name == bundled.name:
        return read_config(bundled)
    config = {**known_configs()[name], **_COMMON, **_SIZES[name], "eos_token_id": 0}
    config.pop("quantization_config", None)
    return config


def checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint of a miniature: the bundled one where it lies, another in `folder`.

    Weights are the same whenever it is made: each tensor is seeded with its name.
    """
    bundled = bundled_checkpoint()
    if name == bundled.name:
        return bundled
    config = miniature(name)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "torch_dtype": "float32"}, indent=1)
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(_weights(config), folder / "model.safetensors")
    return folder


def _weights(config: HFConfig) -> dict[str, torch.Tensor]:
    model = build(config, Parallelism())
    for leaf in model.leaves():
        leaf.allocate(torch.float32, torch.device("cpu"))
    return {piece.source: _random(piece.source, piece.shape) for piece in model.weight_slices()}


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1 and not name.endswith("bias"):
        return noise * _DEVIATION
    return noise * _VECTOR_DEVIATION + (0.0 if "bias" in name else 1.0)
