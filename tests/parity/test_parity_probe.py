"""The probe plants a scale error in one block, or says that it cannot."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from isomoe.config import EngineConfig
from isomoe.engine.instrument import load_instrument
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError
from isomoe.layout import Chain, Parallelism
from isomoe.models import build
from isomoe.parity.probe import Scale

PROBE = Scale(block="model.layers.2.mlp.experts", factor=1.01)


def chain() -> Chain:
    return build(ModelInfo.of(EngineConfig()).hf_config, Parallelism()).chain


def test_a_worker_finds_the_probe_by_its_path() -> None:
    assert load_instrument(EngineConfig(instrument=PROBE.path).instrument) == PROBE


def test_one_block_is_scaled_and_no_other() -> None:
    written: dict[str, Tensor] = {}
    stream = SimpleNamespace(write=written.__setitem__)
    PROBE.in_stream(stream)  # type: ignore[arg-type]
    for block in (PROBE.block, "model.layers.1.mlp.experts"):
        stream.write(block, torch.ones(2))
    assert written[PROBE.block].tolist() == pytest.approx([1.01, 1.01])
    assert written["model.layers.1.mlp.experts"].tolist() == [1.0, 1.0]


def test_a_block_that_the_model_lacks_is_refused() -> None:
    assert PROBE.in_chain(chain()) == chain()
    with pytest.raises(ConfigError, match=r"no block 'model\.layers\.9\.mlp\.experts'"):
        Scale(block="model.layers.9.mlp.experts", factor=1.01).in_chain(chain())
