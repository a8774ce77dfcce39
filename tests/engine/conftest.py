"""Random checkpoints that the engine's tests share."""

from pathlib import Path
from typing import Any

import pytest

from isomoe.weights import bundled_checkpoint
from support import save_random, tiny_config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Qwen2-MoE with random fp32 weights and no tokenizer, and transformers' own model of it."""
    folder = tmp_path_factory.mktemp("qwen2")
    return folder, save_random(tiny_config("qwen2", eos_token_id=None, bos_token_id=None), folder)


@pytest.fixture(scope="session")
def folder(checkpoint: tuple[Path, Any]) -> Path:
    return checkpoint[0]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE with random fp32 weights and the bundled checkpoint's tokenizer."""
    folder = tmp_path_factory.mktemp("qwen3")
    config = tiny_config("qwen3", vocab_size=640, num_hidden_layers=2, eos_token_id=0)
    save_random(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((bundled_checkpoint() / name).read_bytes())
    return folder
