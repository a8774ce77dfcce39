"""Checkpoints: all that is wrong with one is said at once, and a rank reads only its part."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

import isomoe.weights.files
from isomoe.blocks import WeightSlice
from isomoe.errors import CheckpointError
from isomoe.layout import Parallelism
from isomoe.models import CausalLM, build, read_config
from isomoe.weights import bundled_checkpoint, load_dummy, load_safetensors, resolve
from support import save_random, tiny_config

LAYOUTS = ["tp1", "tp2,ep2", "tp4,dp2,ep2", "tp4", "tp4,dp4,ep4,dplm"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    model = save_random(tiny_config("qwen2", mlp_only_layers=[1]), folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint in one file, to be spoiled."""
    save_random(tiny_config("qwen3"), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    return tmp_path


def allocated(folder: Path, layout: str, rank: int = 0) -> CausalLM:
    model = build(read_config(folder), Parallelism.parse(layout), rank)
    for leaf in model.leaves():
        leaf.allocate(torch.float32, torch.device("cpu"))
        for piece in leaf.slices():
            piece.out.fill_(float("nan"))  # what is not read would show
    return model


def loaded(folder: Path, layout: str, rank: int = 0) -> CausalLM:
    model = allocated(folder, layout, rank)
    load_safetensors(folder, model.weight_slices(), model.ignores)
    return model


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_filled_from(pieces: Iterator[WeightSlice], stored: dict[str, Tensor]) -> set[str]:
    """Every slice holds its part of the stored tensor, bit for bit; the names that were seen."""
    seen = set()
    for piece in pieces:
        assert piece.shape == tuple(stored[piece.source].shape)
        assert torch.equal(piece.out, stored[piece.source][piece.index]), piece.source
        seen.add(piece.source)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_its_slices_of_a_sharded_checkpoint(layout: str, sharded: Path) -> None:
    stored = tensors_in(sharded)
    for rank in range(Parallelism.parse(layout).tp_size):
        model = loaded(sharded, layout, rank)
        assert assert_filled_from(model.weight_slices(), stored) == set(stored)


def test_progress_counts_every_tensor_once(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = allocated(sharded, "tp1")
    load_safetensors(sharded, model.weight_slices(), model.ignores, lambda *now: calls.append(now))
    total = len(tensors_in(sharded))
    assert calls == [(done, total) for done in range(1, total + 1)]


class Counting:
    """A safetensors file that counts the values which are read from each of its tensors."""

    def __init__(self, file: Any, read: dict[str, int]) -> None:
        self.file = file
        self.read = read

    def keys(self) -> Any:
        return self.file.keys()

    def get_slice(self, name: str) -> Any:
        counting, stored = self, self.file.get_slice(name)

        class Slice:
            def get_shape(self) -> Any:
                return stored.get_shape()

            def get_dtype(self) -> Any:
                return stored.get_dtype()

            def __getitem__(self, index: Any) -> Tensor:
                part: Tensor = stored[index]
                counting.read[name] += part.numel()
                return part

        return Slice()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_only_its_slices(
    layout: str, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, int] = defaultdict(int)
    real = isomoe.weights.files.safe_open

    def counting(*args: Any, **kwargs: Any) -> Counting:
        return Counting(real(*args, **kwargs), read)

    monkeypatch.setattr(isomoe.weights.files, "safe_open", counting)
    p = Parallelism.parse(layout)
    for rank in range(p.tp_size):
        read.clear()
        model = allocated(sharded, layout, rank)
        report = load_safetensors(sharded, model.weight_slices(), model.ignores)
        kept: dict[str, int] = defaultdict(int)
        for piece in model.weight_slices():
            kept[piece.source] += piece.out.numel()
        assert sum(read.values()) > 0
        assert dict(read) == {name: n for name, n in kept.items() if n}
        assert report.bytes_read == {name: 4 * n for name, n in read.items()}  # fp32
        assert report.total_bytes == 4 * sum(read.values())
        expert = {n: v for n, v in read.items() if ".mlp.experts." in n}
        whole = {n: v.numel() for n, v in tensors_in(sharded).items() if ".mlp.experts." in n}
        assert sum(expert.values()) * p.tp_size == sum(whole.values())


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_everything_that_is_wrong_is_said_in_one_error(single: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
        tensors["model.layers.0.surprise"] = torch.zeros(2)
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:100].contiguous()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flatten()

    spoil(single, change)
    with pytest.raises(CheckpointError) as refused:
        loaded(single, "tp1")
    message = str(refused.value)
    for fault in (
        "missing model.norm.weight",
        "missing model.layers.2.mlp.experts.7.up_proj.weight",
        "unexpected model.layers.0.surprise",
        "model.layers.1.self_attn.q_proj.weight is [100, 48], the config says [128, 48]",
        "lm_head.weight is [6288], the config says [131, 48]",
    ):
        assert fault in message
    assert message.startswith(f"{single}: ")


def test_nothing_is_filled_from_a_checkpoint_with_a_fault(single: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]

    spoil(single, change)
    model = allocated(single, "tp1")
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.weight"):
        load_safetensors(single, model.weight_slices(), model.ignores)
    assert all(piece.out.isnan().all() for piece in model.weight_slices())


@pytest.mark.parametrize("rank", range(4))
def test_a_fault_in_another_rank_s_part_is_seen_by_every_rank(rank: int, single: Path) -> None:
    """Or some ranks would go on to wait for one that has failed."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.experts.5.down_proj.weight"
        tensors[name] = tensors[name][:, :10].contiguous()
        del tensors["model.layers.1.mlp.experts.0.up_proj.weight"]

    spoil(single, change)
    with pytest.raises(CheckpointError, match=r"missing .*experts.0.up_proj") as refused:
        loaded(single, "tp4,ep4", rank)
    assert "experts.5.down_proj.weight is [48, 10], the config says [48, 24]" in str(refused.value)


def test_many_faults_are_counted(single: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts.3" in name]:
            del tensors[name]

    spoil(single, change)
    with pytest.raises(CheckpointError, match=r"and 1 more$") as refused:  # 3 layers x 3, 8 listed
        loaded(single, "tp1")
    assert str(refused.value).count("missing ") == 8


def test_tensors_that_a_model_may_carry_are_ignored(single: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    spoil(single, change)
    loaded(single, "tp1")


@pytest.mark.parametrize("kept", [0, 4, 2000, -1])
def test_a_truncated_file_is_refused_with_its_size(kept: int, single: Path) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()[:kept]
    file.write_bytes(content)
    message = rf"model.safetensors: truncated or no safetensors file \({len(content)} bytes"
    with pytest.raises(CheckpointError, match=message):
        loaded(single, "tp1")


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_missing_shard_file_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"1 shard file\(s\) of the index are missing") as no:
        loaded(folder, "tp1")
    assert victim.name in str(no.value)


def test_an_index_that_names_the_wrong_file_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    name = next(n for n, file in content["weight_map"].items() if file == files[0])
    content["weight_map"][name] = files[-1]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the index names a file that lacks it") as refused:
        loaded(folder, "tp1")
    assert f"missing {name}" in str(refused.value)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"w": 1}}']
)
def test_an_unreadable_index_is_refused(content: str, sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not an index of safetensors"):
        loaded(folder, "tp1")


def test_a_folder_without_tensors_is_refused(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither .*index.json nor model.safetensors"):
        loaded(single, "tp1")


@pytest.mark.parametrize("layout", ["tp4", "tp4,dp2,ep2", "tp4,dp4,ep4,dplm"])
def test_dummy_weights_are_the_same_on_every_layout(layout: str, sharded: Path) -> None:
    whole = allocated(sharded, "tp1")
    load_dummy(whole.weight_slices(), seed=3)
    stored = {piece.source: piece.out for piece in whole.weight_slices()}
    joined = {name: torch.full_like(full, float("nan")) for name, full in stored.items()}
    for rank in range(4):
        model = allocated(sharded, layout, rank)
        load_dummy(model.weight_slices(), seed=3)
        assert_filled_from(model.weight_slices(), stored)
        for piece in model.weight_slices():
            joined[piece.source][piece.index] = piece.out
    assert joined
    for name, full in stored.items():
        assert torch.equal(joined[name], full), name


def test_dummy_weights_depend_on_seed_and_name_and_have_the_right_size(sharded: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = allocated(sharded, "tp1")
        load_dummy(model.weight_slices(), seed)
        drawn.append({piece.source: piece.out for piece in model.weight_slices()})
    first, again, other = drawn
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight, other[name])
        centre = 1.0 if weight.dim() == 1 and not name.endswith("bias") else 0.0
        # Five standard errors of a mean, and of a deviation, of this many draws of 0.02.
        slack = 5 * 0.02 / weight.numel() ** 0.5
        assert abs(weight.mean() - centre) < slack
        assert abs((weight - centre).std() - 0.02) < slack
    queries = [w for name, w in first.items() if name.endswith("q_proj.weight")]
    assert not torch.equal(queries[0], queries[1])


def test_dummy_norms_are_near_one_whether_kept_less_one_or_not() -> None:
    plain, zero_centred, bias = torch.zeros(400), torch.zeros(400), torch.zeros(400)
    pieces = [
        WeightSlice("a.weight", (400,), (slice(None),), plain),
        WeightSlice("a.weight", (400,), (slice(None),), zero_centred, plus=1.0),
        WeightSlice("a.bias", (400,), (slice(None),), bias),
    ]
    load_dummy(pieces, seed=0)
    assert torch.equal(plain, zero_centred)
    assert abs(plain.mean() - 1) < 0.005
    assert abs(bias.mean()) < 0.005


def test_the_bundled_checkpoint_is_the_default() -> None:
    assert resolve(None) == bundled_checkpoint()


def test_a_folder_is_taken_as_it_is(single: Path) -> None:
    assert resolve(str(single)) == single


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "../x"])
def test_a_folder_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        resolve(name)
    assert str(refused.value) == f"--model-path {name}: no such folder"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder has no config.json"):
        resolve(str(tmp_path))


def test_a_lone_config_will_do_where_no_weights_are_needed(single: Path) -> None:
    file = single / "config.json"
    assert resolve(str(file), weights=False) == file
    with pytest.raises(CheckpointError, match="a folder is needed, this is a file"):
        resolve(str(file))


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_is_fetched_with_what_is_needed(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, "*.safetensors" in allow_patterns, "*.json" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("Some/Model", weights=weights) == tmp_path
    assert asked == [("Some/Model", weights, True)]


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network\nand more"), ConnectionError("no network")]
)
def test_a_hub_id_without_network_is_refused_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError) as refused:
        resolve("Some/Model")
    assert str(refused.value) == (
        "--model-path Some/Model: no such folder, and not to be had from the hub (no network)"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_numbers_are_not_taken_for_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    wanted = WeightSlice("w", (2, 2), (slice(None), slice(None)), torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"w is (I8|F8_E4M3), and BF16, F16, F32 can be read"):
        load_safetensors(tmp_path, [wanted], lambda name: False)
