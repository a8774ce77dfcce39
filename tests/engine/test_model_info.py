"""What a checkpoint's small files settle."""

import json
import shutil
from pathlib import Path

import pytest

from isomoe.config import EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError


def info(folder: Path, copy: Path, **generation: object) -> ModelInfo:
    """That of a copy with this generation_config.json."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "generation_config.json").write_text(json.dumps(generation))
    return ModelInfo.of(EngineConfig(model_path=str(copy)))


def test_sampling_defaults_are_those_of_the_generation_config(folder: Path, tmp_path: Path) -> None:
    found = info(
        folder, tmp_path, temperature=0.6, top_p=0.95, top_k=20, max_length=9, eos_token_id=[3, 4]
    )
    assert found.sampling_defaults == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert found.eos_token_ids == {3, 4}


def test_a_default_that_cannot_be_is_refused_with_its_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p 2\.0: must be"):
        info(folder, tmp_path, top_p=2.0)
