"""The choice of experts and their weighted sum against float64 loops over tokens."""

import math

import pytest
import torch
from torch import Tensor

from isomoe.kernels import experts as experts_module
from isomoe.kernels import (
    fused_experts,
    linear,
    pack_experts,
    pack_linear,
    packed_experts,
    topk_softmax,
)


def reference_topk(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    weights = torch.zeros(logits.shape[0], k, dtype=torch.float64)
    ids = torch.zeros(logits.shape[0], k, dtype=torch.int64)
    for row, values in enumerate(logits.double().tolist()):
        exps = [math.exp(value - max(values)) for value in values]
        order = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:k]
        total = sum(exps[expert] for expert in order) if renormalize else sum(exps)
        for column, expert in enumerate(order):
            weights[row, column] = exps[expert] / total
            ids[row, column] = expert
    return weights, ids


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_topk_softmax_is_the_reference(rows: int, dtype: torch.dtype, renormalize: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, 16).to(dtype)
    weights, ids = topk_softmax(logits, 4, renormalize)
    expected_weights, expected_ids = reference_topk(logits, 4, renormalize)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_experts", [8, 64, 257])
def test_ties_go_to_the_lower_expert(num_experts: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (50, num_experts)).float()
    _, ids = topk_softmax(logits, 6, True)
    assert torch.equal(ids, reference_topk(logits, 6, True)[1])


def reference_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip(topk_ids[row].tolist(), topk_weights[row].tolist(), strict=True):
            if expert < 0:
                continue
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            gated = gate / (1 + torch.exp(-gate)) * up
            out[row] += weight * (down[expert].double() @ gated)
    return out


def make(
    rows: int, experts: int, top_k: int, dtype: torch.dtype, absent: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random (x, gate_up, down, ids, weights); a share `absent` of the ids is -1."""
    torch.manual_seed(rows * 1000 + experts)
    hidden, width = 24, 12
    x = torch.randn(rows, hidden).to(dtype)
    gate_up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width) / width**0.5).to(dtype)
    ids = torch.rand(rows, experts).argsort(1)[:, :top_k].contiguous()
    ids = ids.masked_fill(torch.rand(rows, top_k) < absent, -1)
    return x, gate_up, down, ids, torch.rand(rows, top_k)


@pytest.fixture(params=["small_weights", "large_weights"])
def weight_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights take the path of all experts; as if large, few rows take the active ones'."""
    if request.param == "large_weights":
        monkeypatch.setattr(experts_module, "_SMALL_BYTES", 0)


@pytest.mark.usefixtures("weight_size")
@pytest.mark.parametrize("absent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k"),
    [(0, 8, 2), (1, 8, 2), (1, 8, 8), (1, 64, 2), (3, 64, 3), (16, 8, 4), (31, 6, 1), (70, 8, 2)],
)
def test_experts_are_the_reference(
    rows: int, experts: int, top_k: int, dtype: torch.dtype, absent: float
) -> None:
    arguments = make(rows, experts, top_k, dtype, absent)
    out = fused_experts(*arguments)
    assert out.dtype == torch.float32
    assert out.shape == arguments[0].shape
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    expected = reference_experts(*arguments)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out, fused_experts(*arguments))
    x, gate_up, down, ids, weights = arguments
    packed = packed_experts(x, pack_experts(gate_up, down), ids, weights)
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("weight_size")
@pytest.mark.parametrize("rows", [1, 4, 200])
def test_rows_without_a_local_expert_are_zero_whatever_their_weights(rows: int) -> None:
    x, gate_up, down, ids, weights = make(rows, 8, 4, torch.bfloat16)
    ids[0::2] = -1
    weights[0::2] = torch.nan
    expected = reference_experts(x, gate_up, down, ids, weights)
    for out in (
        fused_experts(x, gate_up, down, ids, weights),
        packed_experts(x, pack_experts(gate_up, down), ids, weights),
    ):
        assert torch.equal(out[0::2], torch.zeros_like(out[0::2]))
        torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.usefixtures("weight_size")
@pytest.mark.parametrize("rows", [4, 16, 200])
def test_a_row_depends_on_the_others_up_to_rounding(rows: int) -> None:
    x, gate_up, down, ids, weights = make(rows, 8, 4, torch.float32)
    together = fused_experts(x, gate_up, down, ids, weights)
    alone = torch.cat(
        [
            fused_experts(x[i : i + 1], gate_up, down, ids[i : i + 1], weights[i : i + 1])
            for i in range(rows)
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("weight_size")
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_shards_of_the_experts_sum_to_the_whole(rows: int) -> None:
    x, gate_up, down, ids, weights = make(rows, 9, 4, torch.float32)
    whole = fused_experts(x, gate_up, down, ids, weights)
    parts = torch.zeros_like(whole)
    for first in range(0, 9, 3):
        local = torch.where((ids >= first) & (ids < first + 3), ids - first, -1)
        mine = slice(first, first + 3)
        parts += fused_experts(x, gate_up[mine], down[mine], local, weights)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 65])
def test_packed_linear_is_the_reference(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 12).to(dtype)
    x = torch.randn(rows, 12).to(dtype)
    expected = torch.zeros(rows, 20, dtype=torch.float64)
    for row in range(rows):
        for column in range(20):
            expected[row, column] = (x[row].double() * weight[column].double()).sum()
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-5
    for form in (weight, pack_linear(weight)):
        out = linear(x, form)
        assert out.dtype == dtype
        assert out.shape == (rows, 20)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
