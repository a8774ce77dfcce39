"""Any part of a tensor lands where it should, under the name that the model has for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from isomoe.blocks import WeightSlice
from isomoe.errors import CheckpointError
from isomoe.weights import LoadReport, load_safetensors


def load(
    folder: Path, wanted: list[WeightSlice], canonical: Callable[[str], str] = str
) -> LoadReport:
    return load_safetensors(folder, wanted, lambda name: False, canonical=canonical)


def save(folder: Path, **tensors: Tensor) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_columns_that_take_turns_are_read_once_between_them(tmp_path: Path) -> None:
    """gate and up of gpt-oss, the middle third of both, into the halves of one tensor."""
    w = torch.randn(3, 5, 12)
    save(tmp_path, w=w)
    out = torch.zeros(2, 4, 5)
    gate, up = (half.transpose(1, 2) for half in out.chunk(2, dim=1))
    every, experts = slice(None), slice(1, 3)
    wanted = [
        WeightSlice("w", (3, 5, 12), (experts, every, slice(4, 8, 2)), gate),
        WeightSlice("w", (3, 5, 12), (experts, every, slice(5, 8, 2)), up),
    ]
    report = load(tmp_path, wanted)
    assert torch.equal(out[:, :2], w[1:, :, [4, 6]].mT)
    assert torch.equal(out[:, 2:], w[1:, :, [5, 7]].mT)
    assert report.bytes_read == {"w": 2 * 5 * 4 * 4}  # experts, rows, columns, fp32


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_every_slice_of_a_vector(step: int, tmp_path: Path) -> None:
    w = torch.arange(11.0)
    save(tmp_path, w=w)
    parts = [slice(a, b, step) for a in range(11) for b in range(a, 12)]
    wanted = [WeightSlice("w", (11,), (part,), torch.full_like(w[part], -1)) for part in parts]
    load(tmp_path, wanted)
    for part, piece in zip(parts, wanted, strict=True):
        assert torch.equal(piece.out, w[part])


def test_what_is_added_is_added_before_rounding(tmp_path: Path) -> None:
    """bf16 holds these weights, and not one plus them; fp32 does."""
    w = torch.tensor([2.0**-12, -(2.0**-11), 2.0**-7], dtype=torch.bfloat16)
    save(tmp_path, w=w)
    wide, narrow = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    load(tmp_path, [WeightSlice("w", (3,), (slice(None),), out, 1.0) for out in (wide, narrow)])
    assert wide.tolist() == [1 + 2.0**-12, 1 - 2.0**-11, 1 + 2.0**-7]
    assert narrow.tolist() == [1, 1, 1 + 2.0**-7]


def test_a_model_may_have_names_of_its_own(tmp_path: Path) -> None:
    w = torch.randn(4)
    save(tmp_path, **{"language_model.w": w})
    wanted = WeightSlice("w", (4,), (slice(None),), torch.zeros(4))
    load(tmp_path, [wanted], lambda name: name.removeprefix("language_model."))
    assert torch.equal(wanted.out, w)


def test_two_tensors_with_one_name_are_both_named(tmp_path: Path) -> None:
    save(tmp_path, **{"language_model.w": torch.zeros(4), "w": torch.ones(4)})
    wanted = WeightSlice("w", (4,), (slice(None),), torch.zeros(4))
    with pytest.raises(CheckpointError, match=r": language_model\.w and w are both w$"):
        load(tmp_path, [wanted], lambda name: name.removeprefix("language_model."))
