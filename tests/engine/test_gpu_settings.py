"""What the engine decides before a GPU does anything."""

import pytest
import torch

from isomoe.config import EngineConfig
from isomoe.engine import gpu_memory
from isomoe.engine.core import graph_ladder
from isomoe.errors import ConfigError


@pytest.mark.parametrize("most", [1, 2, 3, 9, 64, 65, 100, 256, 300])
def test_the_ladder_rises_to_the_most_and_wastes_little(most: int) -> None:
    ladder = graph_ladder(most)
    assert ladder[-1] == most
    assert list(ladder) == sorted(set(ladder))
    for rows in range(9, most + 1):
        assert next(size for size in ladder if size >= rows) - rows <= 16


def test_prompts_come_in_larger_pieces_on_gpus() -> None:
    assert EngineConfig().prefill_limits("cpu") == (2048, 2048)
    assert EngineConfig().prefill_limits("cuda") == (8192, 16384)
    assert EngineConfig(chunked_prefill_size=100).prefill_limits("cuda") == (100, 200)
    settings = EngineConfig(chunked_prefill_size=100, max_prefill_tokens=50)
    assert settings.prefill_limits("cuda") == settings.prefill_limits("cpu") == (100, 50)


def test_only_gpus_schedule_ahead() -> None:
    assert EngineConfig().overlaps("cuda")
    assert not EngineConfig().overlaps("cpu")
    assert not EngineConfig(disable_overlap_schedule=True).overlaps("cuda")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_a_share_of_the_memory_lies_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"--mem-fraction-static .*: must be between 0 and 1"):
        EngineConfig(mem_fraction_static=fraction)


def test_a_lack_of_memory_is_told_in_one_line() -> None:
    with (
        pytest.raises(ConfigError, match=r"^the weights found too little .*40 GiB\); more ranks"),
        gpu_memory.must_fit("the weights", "more ranks"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB. GPU 0 has")


GIB = 1 << 30


class Card:
    """The memory of a GPU of 80 GiB, as torch tells of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weights: int, activations: int) -> None:
        self.held = self.peak = weights * GIB
        self.activations = activations * GIB
        for name, answer in (
            ("memory_allocated", lambda _: self.held),
            ("max_memory_allocated", lambda _: self.peak),
            ("mem_get_info", lambda _: (80 * GIB - self.held, 80 * GIB)),
            ("device_count", lambda: 1),
            ("synchronize", lambda _: None),
            ("empty_cache", lambda: None),
            ("reset_peak_memory_stats", lambda _: None),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)

    def step(self) -> None:
        self.peak = self.held + self.activations


def test_the_cache_gets_the_share_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, weights=30, activations=2)
    found = gpu_memory.free_for_cache(torch.device("cuda"), 0.5, 1, card.step)
    assert found == 10 * GIB


def test_the_cache_leaves_room_for_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, weights=30, activations=20)
    found = gpu_memory.free_for_cache(torch.device("cuda"), 0.95, 1, card.step)
    assert found == (80 - 30 - 20 - 1) * GIB
    shared = gpu_memory.free_for_cache(torch.device("cuda"), 0.95, 2, card.step)
    assert shared < found // 2
