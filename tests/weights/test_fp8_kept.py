"""Experts' weights in FP8: as the checkpoint keeps them, or rounded in blocks that no shard cuts.

The references are whole matrices, from the formats' definition; shards are held against their part.
"""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu_support import DEVICE
from isomoe.blocks import ExpertWeights
from isomoe.blocks.expert_names import ExpertNames, PerExpert, Stacked, Transposed
from isomoe.errors import CheckpointError
from isomoe.kernels import BlockFp8
from isomoe.weights import load_dummy, load_safetensors, read_quantization
from quantised import fp8, plain_fp8

EXPERTS, HIDDEN, WIDTH, BLOCK = 3, 80, 96, 32
NAMES: dict[str, ExpertNames] = {
    "per expert": PerExpert(),
    "stacked": Stacked(),
    "transposed": Transposed(),
    "interleaved": Transposed(interleaved=True),
}
SHARES = [(0, 96), (0, 48), (48, 96), (32, 64), (64, 96), (16, 32), (80, 96)]


def drawn(*shape: int) -> Tensor:
    """Blocks of very different sizes, so that a wrong scale shows."""
    sizes = torch.exp2(torch.randint(-6, 6, shape).float())
    return torch.randn(shape) * sizes


def tensors_of(names: str) -> dict[str, Tensor]:
    """A layer's experts, as a checkpoint has them."""
    if names == "per expert":
        return {
            f"at.{expert}.{which}_proj.weight": drawn(*shape)
            for expert in range(EXPERTS)
            for which, shape in (
                ("gate", (WIDTH, HIDDEN)),
                ("up", (WIDTH, HIDDEN)),
                ("down", (HIDDEN, WIDTH)),
            )
        }
    if names == "stacked":
        return {
            "at.gate_proj.weight": drawn(EXPERTS, WIDTH, HIDDEN),
            "at.up_proj.weight": drawn(EXPERTS, WIDTH, HIDDEN),
            "at.down_proj.weight": drawn(EXPERTS, HIDDEN, WIDTH),
        }
    return {
        "at.gate_up_proj": drawn(EXPERTS, HIDDEN, 2 * WIDTH),
        "at.down_proj": drawn(EXPERTS, WIDTH, HIDDEN),
    }


def whole(names: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up [E, I, H], and down [E, H, I], of their values."""
    if names == "per expert":
        gate, up, down = (
            torch.stack([tensors[f"at.{expert}.{which}_proj.weight"] for expert in range(EXPERTS)])
            for which in ("gate", "up", "down")
        )
        return gate, up, down
    if names == "stacked":
        return tuple(tensors[f"at.{which}_proj.weight"] for which in ("gate", "up", "down"))  # type: ignore[return-value]
    both = tensors["at.gate_up_proj"].transpose(1, 2)
    if names == "interleaved":
        gate, up = both[:, 0::2], both[:, 1::2]
    else:
        gate, up = both.chunk(2, dim=1)
    return gate, up, tensors["at.down_proj"].transpose(1, 2)


def shard(names: str, held: tuple[int, ...], width: tuple[int, int]) -> ExpertWeights:
    leaf = ExpertWeights("at", EXPERTS, HIDDEN, WIDTH, held, width, NAMES[names])
    assert leaf.lacks_for_fp8(BLOCK) is None
    leaf.block = BLOCK
    leaf.allocate(torch.bfloat16, torch.device(DEVICE))
    return leaf


def loaded(leaf: ExpertWeights, folder: Path, options: dict[str, Any] | None) -> None:
    quantization = read_quantization({"quantization_config": options})
    load_safetensors(
        folder, leaf.slices(), lambda name: False, quantization=quantization, rounds=options is None
    )


def check(leaf: ExpertWeights, meant: tuple[Tensor, Tensor, Tensor]) -> None:
    """Bit for bit: a product of a code and a scale in fp32."""
    gate, up, down = meant
    mine = slice(*leaf.width)
    assert isinstance(leaf.gate_up, BlockFp8)
    assert isinstance(leaf.down, BlockFp8)
    found = leaf.gate_up.dequantized(torch.float32).cpu()
    held = list(leaf.held)
    assert torch.equal(found[:, 0], gate[held][:, mine])
    assert torch.equal(found[:, 1], up[held][:, mine])
    assert torch.equal(leaf.down.dequantized(torch.float32).cpu(), down[held][:, :, mine])


@pytest.mark.parametrize("names", NAMES)
def test_any_share_of_a_checkpoint_in_fp8_is_kept_as_it_is(names: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored, meant = {}, {}
    for name, values in tensors_of(names).items():
        codes = (values * 4).clamp(-400, 400).to(torch.float8_e4m3fn)
        *stack, rows, columns = values.shape
        scales = torch.exp2(torch.randint(-9, 3, (*stack, -(-rows // BLOCK), -(-columns // BLOCK))))
        scales *= 1.37
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        meant[name] = plain_fp8(codes, scales, (BLOCK, BLOCK), torch.float32)
    save_file(stored, tmp_path / "model.safetensors")
    for held, width in product([(0, 1, 2), (2, 0)], SHARES):
        leaf = shard(names, held, width)
        loaded(leaf, tmp_path, fp8(BLOCK, BLOCK))
        check(leaf, whole(names, meant))


def rounded_in_blocks(values: Tensor) -> Tensor:
    """A block at a time."""
    out = torch.empty_like(values)
    *stack, rows, columns = values.shape
    for at in product(*map(range, stack)):
        for top, left in product(range(0, rows, BLOCK), range(0, columns, BLOCK)):
            block = values[at][top : top + BLOCK, left : left + BLOCK]
            scale = block.abs().max() / 448
            codes = (block / scale).to(torch.float8_e4m3fn)
            out[at][top : top + BLOCK, left : left + BLOCK] = codes.float() * scale
    return out


@pytest.mark.parametrize("names", NAMES)
def test_another_checkpoint_is_rounded_alike_on_every_layout(names: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = tensors_of(names)
    save_file(tensors, tmp_path / "model.safetensors")
    meant = {name: rounded_in_blocks(values) for name, values in tensors.items()}
    for held, width in product([(0, 1, 2), (1,)], SHARES):
        leaf = shard(names, held, width)
        loaded(leaf, tmp_path, None)
        check(leaf, whole(names, meant))


def test_dummy_weights_are_the_same_on_every_layout() -> None:
    full = shard("per expert", (0, 1, 2), (0, WIDTH))
    load_dummy(full.slices(), seed=1)
    assert isinstance(full.gate_up, BlockFp8)
    assert isinstance(full.down, BlockFp8)
    gate, up = full.gate_up.dequantized(torch.float32).cpu().unbind(1)
    assert 0.015 < float(gate.std()) < 0.025
    for width in SHARES:
        leaf = shard("per expert", (2, 1), width)
        load_dummy(leaf.slices(), seed=1)
        check(leaf, (gate, up, full.down.dequantized(torch.float32).cpu()))


@pytest.mark.parametrize(
    ("width", "block", "reason"),
    [
        ((0, 24), 32, r"shares of 24 of an expert's 96 columns cut .* runs of 8"),
        ((0, 96), 48, r"blocks of 48 x 48 are no multiples of 32"),
        ((0, 96), 64, None),
    ],
)
def test_what_kernels_cannot_use_is_said(
    width: tuple[int, int], block: int, reason: str | None
) -> None:
    leaf = ExpertWeights("at", EXPERTS, HIDDEN, WIDTH, (0,), width)
    found = leaf.lacks_for_fp8(block)
    assert found == reason if reason is None else re.match(reason, str(found))


def test_what_is_not_in_fp8_is_not_rounded_unless_it_is_asked_for(tmp_path: Path) -> None:
    save_file(tensors_of("stacked"), tmp_path / "model.safetensors")
    leaf = shard("stacked", (0,), (0, WIDTH))
    quantization = read_quantization({"quantization_config": fp8(BLOCK, BLOCK)})
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is not in FP8 .* which rounds it"):
        load_safetensors(tmp_path, leaf.slices(), lambda name: False, quantization=quantization)
