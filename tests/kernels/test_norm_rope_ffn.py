"""Norm, rotary embedding and activations against float64 loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from isomoe.kernels import (
    Activation,
    ClampedSwiGlu,
    Scaling,
    SwiGlu,
    frequencies,
    gated,
    rms_norm,
    rope_rows,
    rope_table,
    rotate,
    silu_and_mul,
)
from isomoe.kernels.rope import LinearScaling, Llama3, Yarn

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
    out_q, out_k = (rotate(x, cos[positions], sin[positions]) for x in (q, k))

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
    assert rotate(torch.zeros(0, 4, 8), cos[:0], sin[:0]).shape == (0, 4, 8)


SCALINGS: list[tuple[Scaling, dict[str, Any]]] = [
    (LinearScaling(factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    (
        Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=256),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    *(
        (
            Yarn(
                factor=factor,
                original_positions=original,
                beta_fast=fast,
                beta_slow=slow,
                truncate=truncate,
            ),
            {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fast,
                "beta_slow": slow,
                "truncate": truncate,
            },
        )
        for factor, original, fast, slow in (
            (4.0, 512, 32.0, 1.0),
            (32.0, 4096, 32.0, 1.0),
            (40.0, 64, 2.0, 1.5),  # a ramp of less than a dim
            (2.0, 8, 32.0, 1.0),  # no dim turns fast enough
        )
        for truncate in (True, False)
    ),
]


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("theta", [10000.0, 150000.0])
@pytest.mark.parametrize(("scaling", "parameters"), SCALINGS, ids=str)
def test_frequencies_are_those_of_transformers(
    scaling: Scaling, parameters: dict[str, Any], theta: float, r: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=r,
        max_position_embeddings=16384,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    expected, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    got = frequencies(r, theta, scaling)
    assert got.dtype == torch.float64
    assert not torch.equal(got, frequencies(r, theta))
    torch.testing.assert_close(got, expected.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("amplitude", [1.0, 1.3])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("r", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_turn_as_complex_numbers(
    dtype: torch.dtype, r: int, interleaved: bool, amplitude: float
) -> None:
    """A pair of dims is the real and the imaginary part; the dims behind r pass as they are."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8).to(dtype)
    before = x.clone()
    positions = torch.tensor([0, 2, 31, 5000])
    turns = frequencies(r, 10000.0)
    out = rotate(x, *rope_rows(positions, turns, amplitude), interleaved)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    wide = x[..., :r].double()
    if interleaved:
        pairs = torch.complex(wide[..., 0::2], wide[..., 1::2])
    else:
        pairs = torch.complex(wide[..., : r // 2], wide[..., r // 2 :])
    angle = torch.outer(positions.double(), turns).unsqueeze(1)
    pairs = pairs * torch.polar(torch.full_like(angle, amplitude), angle)
    # Both kinds come out in halves, so that queries and keys of one kind agree.
    expected = torch.cat((pairs.real, pairs.imag), -1)
    step = 2 * BF16_STEP if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out[..., :r].double(), expected, rtol=step, atol=step)
    assert torch.equal(out[..., r:], x[..., r:])


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


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def reference_activation(gate: float, up: float, activation: Activation) -> float:
    if isinstance(activation, ClampedSwiGlu):
        gate = min(gate, activation.limit)
        up = clamp(up, -activation.limit, activation.limit)
        return gate * sigmoid(activation.alpha * gate) * (up + 1)
    silu = gate * sigmoid(gate)
    if activation.limit is None:
        return silu * up
    return min(silu, activation.limit) * clamp(up, -activation.limit, activation.limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "activation",
    [SwiGlu(), SwiGlu(limit=1.5), ClampedSwiGlu(), ClampedSwiGlu(limit=2.0, alpha=0.8)],
    ids=str,
)
def test_gated_is_the_reference(activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (4 * torch.randn(3, 5, 24)).to(dtype)
    before = x.clone()
    out = gated(x, activation)
    expected = torch.tensor(
        [
            [
                [
                    reference_activation(gate, up, activation)
                    for gate, up in zip(row[:12], row[12:], strict=True)
                ]
                for row in rows
            ]
            for rows in x.double().tolist()
        ],
        dtype=torch.float64,
    )
    assert (x.abs() > 7).any()
    assert out.dtype == dtype
    step = 4 * BF16_STEP if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=step, atol=step)
    assert torch.equal(x, before)
