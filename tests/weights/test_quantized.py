"""Quantised checkpoints: bit for bit what a plain dequantisation of the whole tensor gives, and no
rank reads more than its slices and the scales that they need.

Where there is a GPU, slices are dequantised on it.
"""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_support import DEVICE
from isomoe.blocks import WeightSlice
from isomoe.errors import CheckpointError
from isomoe.layout import Parallelism
from isomoe.models import CausalLM, build
from isomoe.weights import LoadReport, load_safetensors, read_quantization
from quantised import MXFP4, change_config, fp8, plain_fp8, plain_mxfp4, quantise_fp8, save_mxfp4
from support import save_random, tiny_config

ALL = slice(None)
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["tp1", "tp2,ep2", "tp4", "tp4,dp2,ep2", "tp4,dp4,ep4,dplm"]


def load(folder: Path, wanted: list[WeightSlice], options: dict[str, Any]) -> LoadReport:
    quantization = read_quantization({"quantization_config": options})
    return load_safetensors(folder, wanted, lambda name: False, quantization=quantization)


def fp8_codes(*shape: int) -> Tensor:
    """Every finite code occurs where there is room."""
    codes = torch.arange(math.prod(shape)) * 37 % 256
    codes[codes % 128 == 127] = 1
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).view(shape)


def mxfp4_codes(*shape: int) -> Tensor:
    return (torch.arange(math.prod(shape)) * 37 % 256).to(torch.uint8).view(shape)


def filled(like: Tensor) -> Tensor:
    """Room of that shape; what is not written would show."""
    return torch.full_like(like, math.nan, device=DEVICE)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit: minus zero is not zero."""
    as_bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[expected.dtype]
    return found.dtype == expected.dtype and torch.equal(
        found.cpu().contiguous().view(as_bits), expected.contiguous().view(as_bits)
    )


# Tensors.


@pytest.fixture(scope="module")
def blocks_of_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matrix in blocks of 4 x 5, whose last blocks are cut off."""
    folder = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    scales = torch.rand(3, 4) * 0.01
    save_file({"w": fp8_codes(10, 17), "w_scale_inv": scales}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2])
def test_every_slice_of_fp8_blocks(dtype: torch.dtype, step: int, blocks_of_fp8: Path) -> None:
    stored = load_file(blocks_of_fp8 / "model.safetensors")
    full = plain_fp8(stored["w"], stored["w_scale_inv"], (4, 5), dtype)
    rows = [slice(a, b, step) for a in range(10) for b in range(a + 1, 11)]
    columns = [slice(a, b) for a in range(0, 17, 3) for b in range(a + 1, 18)]
    parts = [*product(rows, columns[::7]), *product(rows[::7], columns)]
    wanted = [WeightSlice("w", (10, 17), part, filled(full[part])) for part in parts]
    load(blocks_of_fp8, wanted, fp8(4, 5))
    for part, piece in zip(parts, wanted, strict=True):
        assert same(piece.out, full[part]), part


@pytest.mark.parametrize(
    ("rows", "columns", "scales"),
    [((0, 4), (0, 5), 1), ((3, 5), (4, 11), 6), ((8, 10), (0, 17), 4)],
)
def test_only_the_scales_of_an_fp8_slice_are_read(
    rows: tuple[int, int], columns: tuple[int, int], scales: int, blocks_of_fp8: Path
) -> None:
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    part = WeightSlice("w", (10, 17), (slice(*rows), slice(*columns)), torch.zeros(shape))
    report = load(blocks_of_fp8, [part], fp8(4, 5))
    assert report.bytes_read == {"w": math.prod(shape), "w_scale_inv": 4 * scales}


def test_stacked_fp8_with_scales_in_bf16(tmp_path: Path) -> None:
    weight, scales = fp8_codes(3, 6, 8), (torch.rand(3, 2, 2) * 0.01).bfloat16()
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    out = torch.zeros(2, 3, 5, dtype=torch.bfloat16)
    part = WeightSlice("w", (3, 6, 8), (slice(1, 3), slice(2, 5), slice(3, 8)), out)
    report = load(tmp_path, [part], fp8(4, 4))
    full = plain_fp8(weight, scales, (4, 4), torch.bfloat16)
    assert same(out, full[1:3, 2:5, 3:8])
    assert report.bytes_read == {"w": 2 * 3 * 5, "w_scale_inv": 2 * 4 * 2}


def test_scales_may_lie_in_another_file(tmp_path: Path) -> None:
    weight, scales = fp8_codes(8, 8), torch.rand(2, 2)
    save_file({"w": weight}, tmp_path / "a.safetensors")
    save_file({"w_scale_inv": scales}, tmp_path / "b.safetensors")
    weight_map = {"w": "a.safetensors", "w_scale_inv": "b.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    part = WeightSlice("w", (8, 8), (ALL, ALL), torch.zeros(8, 8))
    load(tmp_path, [part], fp8(4, 4))
    assert same(part.out, plain_fp8(weight, scales, (4, 4), torch.float32))


def test_plain_tensors_stay_plain_in_a_quantised_checkpoint(tmp_path: Path) -> None:
    for options in (fp8(4, 4), MXFP4):
        save_file({"w": torch.arange(6.0)}, tmp_path / "model.safetensors")
        part = WeightSlice("w", (6,), (slice(1, 5),), torch.zeros(4))
        load(tmp_path, [part], options)
        assert part.out.tolist() == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def experts_of_mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """[2, 96, 6] with every byte, and scales to both ends of what is finite in fp32."""
    folder = tmp_path_factory.mktemp("mxfp4")
    scales = torch.arange(36) * 7
    assert scales.max() < 253
    tensors = {"w_blocks": mxfp4_codes(2, 6, 3, 16), "w_scales": scales.byte().view(2, 6, 3)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2])
def test_every_slice_of_mxfp4(dtype: torch.dtype, step: int, experts_of_mxfp4: Path) -> None:
    stored = load_file(experts_of_mxfp4 / "model.safetensors")
    full = plain_mxfp4(stored["w_blocks"], stored["w_scales"], dtype)
    edges = [0, 1, 7, 31, 32, 33, 50, 64, 95, 96]
    packed = [slice(a, b) for a in edges for b in edges if a < b]
    rows = [slice(a, b, step) for a in range(6) for b in range(a + 1, 7)]
    parts = [(slice(1, 2), *part) for part in product(packed, rows)] + [(ALL, ALL, ALL)]
    wanted = [WeightSlice("w", (2, 96, 6), part, filled(full[part])) for part in parts]
    load(experts_of_mxfp4, wanted, MXFP4)
    for part, piece in zip(parts, wanted, strict=True):
        assert same(piece.out, full[part]), part


def test_a_transposed_view_is_filled_from_mxfp4(experts_of_mxfp4: Path) -> None:
    """As the down projection is kept."""
    stored = load_file(experts_of_mxfp4 / "model.safetensors")
    full = plain_mxfp4(stored["w_blocks"], stored["w_scales"], torch.float32)
    kept = torch.zeros(2, 6, 40, device=DEVICE)
    part = WeightSlice("w", (2, 96, 6), (ALL, slice(30, 70), ALL), kept.transpose(1, 2))
    report = load(experts_of_mxfp4, [part], MXFP4)
    assert same(kept, full[:, 30:70].mT)
    # Two experts, six rows; columns 30 to 69 lie in three blocks of 16 bytes.
    assert report.bytes_read == {"w_blocks": 2 * 6 * 3 * 16, "w_scales": 2 * 6 * 3}


def test_a_scale_that_is_no_number_makes_its_block_none(tmp_path: Path) -> None:
    tensors = {"w_blocks": mxfp4_codes(1, 1, 2, 16), "w_scales": torch.tensor([[[255, 127]]])}
    tensors["w_scales"] = tensors["w_scales"].byte()
    save_file(tensors, tmp_path / "model.safetensors")
    part = WeightSlice("w", (1, 64, 1), (ALL, ALL, ALL), torch.zeros(1, 64, 1))
    load(tmp_path, [part], MXFP4)
    assert part.out[0, :32].isnan().all()
    assert part.out[0, 32:].isfinite().all()


# transformers' own dequantisation.


def test_transformers_dequantises_fp8_to_the_same(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    weight, scales = fp8_codes(256, 384), torch.rand(2, 3) * 0.01
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    out = torch.zeros(256, 384, dtype=torch.bfloat16)
    load(tmp_path, [WeightSlice("w", (256, 384), (ALL, ALL), out)], fp8(128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)
    assert same(out, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_dequantises_mxfp4_to_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(256, (3, 20, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 20, 4), dtype=torch.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    out = torch.zeros(3, 128, 20, dtype=dtype)
    load(tmp_path, [WeightSlice("w", (3, 128, 20), (ALL, ALL, ALL), out)], MXFP4)
    assert same(out, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


# Models.


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("qwen")
    save_random(tiny_config("qwen3", num_hidden_layers=1), folder)
    change_config(
        folder, quantization_config=fp8(20, 7)
    )  # no shard of any layout ends where a block does
    return folder, quantise_fp8(folder, (20, 7))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gpt_oss")
    return folder, save_mxfp4(folder)


def loaded(folder: Path, layout: str, rank: int) -> tuple[CausalLM, LoadReport]:
    config = json.loads((folder / "config.json").read_text())
    model = build(config, Parallelism.parse(layout), rank)
    for leaf in model.leaves():
        leaf.allocate(torch.float32, torch.device("cpu"))
        for piece in leaf.slices():
            piece.out.fill_(math.nan)  # what is not read would show
    quantization = read_quantization(config)
    report = load_safetensors(
        folder, model.weight_slices(), model.ignores, quantization=quantization
    )
    return model, report


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen", "gpt_oss"])
def test_every_rank_holds_its_slices_of_what_the_checkpoint_means(
    family: str, layout: str, request: pytest.FixtureRequest
) -> None:
    folder, meant = request.getfixturevalue(family)
    for rank in range(Parallelism.parse(layout).tp_size):
        model, _ = loaded(folder, layout, rank)
        seen = set()
        for piece in model.weight_slices():
            assert same(piece.out, meant[piece.source][piece.index]), piece.source
            seen.add(piece.source)
        assert seen == set(meant)


def touched(start: int, stop: int, block: int) -> int:
    return len({at // block for at in range(start, stop)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_its_slices_of_fp8_and_their_scales(
    layout: str, qwen: tuple[Path, dict[str, Tensor]]
) -> None:
    """A byte a value of its slices, and four a block that they touch."""
    for rank in range(Parallelism.parse(layout).tp_size):
        model, report = loaded(qwen[0], layout, rank)
        share = 0
        for piece in model.weight_slices():
            if len(piece.shape) == 2 and "layers" in piece.source and piece.out.numel():
                (top, bottom, _), (left, right, _) = (
                    one.indices(size) for one, size in zip(piece.index, piece.shape, strict=True)
                )
                share += piece.out.numel() + 4 * touched(top, bottom, 20) * touched(left, right, 7)
            else:
                share += 4 * piece.out.numel()
        assert report.total_bytes == share


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_its_slices_of_mxfp4_and_their_scales(
    layout: str, gpt_oss: tuple[Path, dict[str, Tensor]]
) -> None:
    """17 bytes a block that they touch, and gate and up not once each but once together."""
    p = Parallelism.parse(layout)
    hidden, width, experts = 64, 96, 8 // p.ep_size
    columns = width // (p.tp_size // p.ep_size)
    for rank in range(p.tp_size):
        _, report = loaded(gpt_oss[0], layout, rank)
        read = {True: 0, False: 0}
        for name, n in report.bytes_read.items():
            if name.endswith(("_blocks", "_scales")):
                read["gate_up" in name] += n
        assert read[True] == experts * 2 * columns * (hidden // 32) * 17
        shard = rank % (width // columns)
        blocks = touched(shard * columns, (shard + 1) * columns, 32)
        assert read[False] == experts * hidden * blocks * 17


# What is wrong with a checkpoint.

GOOD_FP8 = {"w": fp8_codes(8, 8), "w_scale_inv": torch.ones(2, 2)}
GOOD_MXFP4 = {"w_blocks": mxfp4_codes(2, 6, 3, 16), "w_scales": mxfp4_codes(2, 6, 3)}


def refusal(folder: Path, tensors: dict[str, Tensor], options: Any, *shape: int) -> str:
    save_file(tensors, folder / "model.safetensors")
    part = WeightSlice("w", shape, (ALL,) * len(shape), torch.zeros(shape))
    with pytest.raises(CheckpointError) as refused:
        load(folder, [part], options)
    return str(refused.value).removeprefix(f"{folder}: ")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"w_scale_inv": torch.ones(2, 1)}, "w_scale_inv is [2, 1], blocks of 4 x 4 need [2, 2]"),
        ({"w_scale_inv": torch.ones(2, 2).int()}, "w_scale_inv is I32, and BF16, F16, F32 can be"),
        ({"w": torch.ones(8, 8)}, "w is F32, and with w_scale_inv F8_E4M3 can be read"),
        ({"w": fp8_codes(8)}, "w is [8], and blocks need two dims"),
        ({"w": fp8_codes(8, 7)}, "w is [8, 7], the config says [8, 8]"),
        ({"v_scale_inv": torch.ones(1)}, "unexpected v_scale_inv"),
    ],
)
def test_a_spoiled_fp8_checkpoint(change: dict[str, Tensor], fault: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD_FP8 | change, fp8(4, 4), 8, 8).startswith(fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"w_scales": mxfp4_codes(2, 6, 2)}, "w_scales is [2, 6, 2], w_blocks needs [2, 6, 3]"),
        ({"w_blocks": mxfp4_codes(2, 6, 3, 8)}, "w_blocks is [2, 6, 3, 8], not [..., rows, blocks"),
        ({"w_blocks": torch.ones(2, 6, 3, 16)}, "w_blocks is F32, and U8 can be read"),
        ({"w_blocks": mxfp4_codes(2, 6, 2, 16)}, "w_scales is [2, 6, 3], w_blocks needs [2, 6, 2]"),
        ({"w": torch.ones(2, 96, 6)}, "w and w_blocks are both w"),
        ({"v_scales": mxfp4_codes(1)}, "unexpected v_scales"),
        ({"v_blocks": mxfp4_codes(1)}, "unexpected v_blocks"),
    ],
)
def test_a_spoiled_mxfp4_checkpoint(change: dict[str, Tensor], fault: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD_MXFP4 | change, MXFP4, 2, 96, 6).startswith(fault)


def test_mxfp4_without_scales(tmp_path: Path) -> None:
    tensors = {"w_blocks": GOOD_MXFP4["w_blocks"]}
    assert refusal(tmp_path, tensors, MXFP4, 2, 96, 6) == "missing w_scales"


def test_fp8_without_scales(tmp_path: Path) -> None:
    tensors = {"w": GOOD_FP8["w"]}
    assert refusal(tmp_path, tensors, fp8(4, 4), 8, 8) == (
        "w is F8_E4M3, and BF16, F16, F32 can be read, "
        "or F8_E4M3 with w_scale_inv and a quantization_config"
    )


def test_quantised_tensors_need_a_config_that_says_so(tmp_path: Path) -> None:
    refused = refusal(tmp_path, GOOD_FP8, None, 8, 8)
    assert "unexpected w_scale_inv" in refused
    assert "w is F8_E4M3, and BF16, F16, F32 can be read" in refused
    refused = refusal(tmp_path, GOOD_MXFP4, None, 2, 96, 6)
    assert refused == "missing w; unexpected w_blocks; unexpected w_scales"


@pytest.mark.parametrize("name", ["model.w", "w"])
def test_scales_go_with_what_they_scale_under_any_name(name: str, tmp_path: Path) -> None:
    tensors = {f"language_{name}": GOOD_FP8["w"], f"language_{name}_scale_inv": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    part = WeightSlice(name, (8, 8), (ALL, ALL), torch.zeros(8, 8))
    asked: list[str] = []

    def canonical(stored: str) -> str:
        asked.append(stored)
        return stored.removeprefix("language_")

    quantization = read_quantization({"quantization_config": fp8(4, 4)})
    load_safetensors(
        tmp_path, [part], lambda name: False, canonical=canonical, quantization=quantization
    )
    assert same(part.out, plain_fp8(GOOD_FP8["w"], torch.ones(2, 2), (4, 4), torch.float32))
    assert asked == [f"language_{name}"]


def test_a_part_that_nothing_wants_may_be_ignored_with_its_scales(tmp_path: Path) -> None:
    tensors = GOOD_FP8 | {"mtp.w": GOOD_FP8["w"], "mtp.w_scale_inv": torch.ones(2, 2)}
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    part = WeightSlice("w", (8, 8), (ALL, ALL), torch.zeros(8, 8))
    quantization = read_quantization({"quantization_config": fp8(4, 4)})
    report = load_safetensors(
        tmp_path, [part], lambda name: name == "mtp.w", quantization=quantization
    )
    assert report.bytes_read.keys() == {"w", "w_scale_inv"}
