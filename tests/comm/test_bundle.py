"""Bundles: what is joined comes apart again, bit for bit, whatever its dtypes and strides."""

from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isomoe.comm import join, parts_of, split

ITEM_BYTES = {
    torch.uint8: 1,
    torch.float8_e4m3fn: 1,
    torch.bfloat16: 2,
    torch.float16: 2,
    torch.int32: 4,
    torch.float32: 4,
    torch.int64: 8,
}
LAYS = ("plain", "transposed", "every other", "repeated", "lone column")


def noise(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all, so that a NaN must survive as well."""
    if not prod(shape):
        return torch.empty(*shape, dtype=dtype)
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, prod(shape) * ITEM_BYTES[dtype], dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(*shape)


def bits(x: Tensor) -> list[bytes]:
    """The bytes of each row."""
    if not x.numel():
        return [b""] * len(x)
    plain = torch.empty(len(x), x[0].numel(), dtype=x.dtype)
    plain.copy_(x.reshape(len(x), -1))
    return [row.tobytes() for row in plain.view(torch.uint8).numpy()]


@st.composite
def tensors(draw: st.DrawFn, rows: int) -> Tensor:
    """[rows, ...], as it may lie in memory."""
    dtype = draw(st.sampled_from(list(ITEM_BYTES)))
    lies = draw(st.sampled_from(LAYS))
    seed = draw(st.integers(0, 1000))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    match lies:
        case "transposed":
            return noise((shape[0], rows), dtype, seed).t()
        case "every other":
            return noise((rows, 2 * shape[0]), dtype, seed)[:, 1::2]
        case "repeated":
            return noise((1, *shape), dtype, seed).expand(rows, *shape)
        case "lone column":
            step = draw(st.integers(0, 7))
            return noise((rows + 8,), dtype, seed)[3:].as_strided((rows, 1), (1, step))
    return noise((rows, *shape), dtype, seed)


@settings(max_examples=400)
@given(st.data())
def test_what_is_joined_comes_apart_again(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 4))
    given_ = data.draw(st.lists(tensors(rows), min_size=1, max_size=5))
    kept = [bits(x) for x in given_]
    bundle = join(given_)
    wide = sum(ITEM_BYTES[x.dtype] * prod(x.shape[1:]) for x in given_)
    assert (bundle.dtype, bundle.shape) == (torch.uint8, (rows, wide))
    # Each row's bytes are those of its parts, in order: no row depends on another.
    assert bits(bundle) == [b"".join(x[row] for x in kept) for row in range(rows)]
    found = split(bundle, parts_of(given_))
    for one, other in zip(found, given_, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.is_contiguous()
        assert one.storage_offset() == 0, "kernels want aligned rows"
    assert [bits(x) for x in found] == kept
    assert [bits(x) for x in given_] == kept, "the input was changed"


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_wide_part_behind_an_odd_number_of_bytes(rows: int) -> None:
    codes, scales = noise((rows, 3), torch.uint8, 1), noise((rows, 1), torch.float32, 2)
    first, second = split(join([codes, scales]), parts_of([codes, scales]))
    assert bits(first) == bits(codes)
    assert bits(second) == bits(scales)


def test_rows_that_were_picked_from_a_bundle_come_apart_too() -> None:
    given_ = [noise((5, 3), torch.bfloat16, 3), noise((5, 2, 2), torch.int64, 4)]
    picked = join(given_)[torch.tensor([4, 0, 0])]
    for found, x in zip(split(picked, parts_of(given_)), given_, strict=True):
        assert bits(found) == [bits(x)[row] for row in (4, 0, 0)]
