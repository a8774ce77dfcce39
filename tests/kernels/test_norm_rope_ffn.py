"""Norm, rotary embedding and activation against float64 loops."""

import math

import pytest
import torch
from torch import Tensor

from isomoe.kernels import apply_rope, rms_norm, rope_table, silu_and_mul

BF16_STEP = 2.0**-8  # relative spacing of bf16


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (5, 64), (3, 4, 32)])
def test_rms_norm_is_the_reference_in_the_weights_dtype(
    shape: tuple[int, ...], x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(x_dtype)
    weight = torch.randn(shape[-1]).to(weight_dtype)
    out = rms_norm(x, weight, 1e-6)
    wide = x.double()
    rows = wide.reshape(-1, shape[-1])
    expected = torch.zeros_like(rows)
    for index, row in enumerate(rows):
        mean_square = sum(float(value) ** 2 for value in row) / shape[-1]
        expected[index] = row / math.sqrt(mean_square + 1e-6) * weight.double()
    assert out.dtype == weight_dtype
    assert out.shape == x.shape
    step = BF16_STEP if weight_dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.double(), expected.reshape(shape), rtol=2 * step, atol=1e-6)


def test_rms_norm_reads_a_strided_view_and_leaves_it_alone() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 8, 16)
    before = qkv.clone()
    out = rms_norm(qkv[:, :4], torch.ones(16), 1e-6)
    assert torch.equal(out, rms_norm(qkv[:, :4].clone(), torch.ones(16), 1e-6))
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_turns_each_pair_by_its_angle(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    d, theta = 8, 10000.0
    positions = [0, 1, 5, 900]
    cos, sin = rope_table(1000, d, theta)
    assert cos.dtype == sin.dtype == torch.float32
    q = torch.randn(4, 4, d).to(dtype)
    k = torch.randn(4, 2, d).to(dtype)
    out_q, out_k = apply_rope(q, k, cos[positions], sin[positions])

    def reference(x: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=torch.float64)
        for row, position in enumerate(positions):
            for head in range(x.shape[1]):
                for i in range(d // 2):
                    angle = position * theta ** (-2 * i / d)
                    a, b = float(x[row, head, i]), float(x[row, head, i + d // 2])
                    out[row, head, i] = a * math.cos(angle) - b * math.sin(angle)
                    out[row, head, i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    step = BF16_STEP if dtype == torch.bfloat16 else 1e-5
    for out, x in ((out_q, q), (out_k, k)):
        assert out.dtype == dtype
        assert out.shape == x.shape
        torch.testing.assert_close(out.double(), reference(x), rtol=step, atol=step)


def test_rope_of_no_rows() -> None:
    cos, sin = rope_table(4, 8, 10000.0)
    q, k = apply_rope(torch.zeros(0, 4, 8), torch.zeros(0, 2, 8), cos[:0], sin[:0])
    assert q.shape == (0, 4, 8)
    assert k.shape == (0, 2, 8)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_mul_takes_the_gate_from_the_first_half(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 12).to(dtype)
    before = x.clone()
    out = silu_and_mul(x)
    expected = torch.zeros(rows, 6, dtype=torch.float64)
    for row in range(rows):
        for i in range(6):
            gate, up = float(x[row, i]), float(x[row, 6 + i])
            expected[row, i] = gate / (1 + math.exp(-gate)) * up
    step = BF16_STEP if dtype == torch.bfloat16 else 1e-6
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2 * step, atol=1e-6)
    assert torch.equal(x, before)
