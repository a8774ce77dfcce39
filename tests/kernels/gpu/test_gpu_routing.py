import pytest
import torch
from torch import Tensor

import gpu_interpreter  # noqa: F401
from gpu_support import DEVICE
from isomoe.kernels.gpu.routing import route
from isomoe.kernels.routing import Routing, choose

# The interpreter's numpy warns of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    return choose(logits, Routing(top_k=k, renormalize=renormalize))


def on_device(logits: Tensor, k: int, renormalize: bool, **options) -> tuple[Tensor, Tensor]:
    weights, ids = route(logits.to(DEVICE), k, renormalize, **options)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    return weights.cpu(), ids.cpu().long()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("rows", "experts", "k"), [(1, 128, 8), (3, 16, 4), (7, 60, 6), (2, 5, 5), (30, 10, 1)]
)
def test_as_twin(rows: int, experts: int, k: int, renormalize: bool, dtype: torch.dtype) -> None:
    # In bf16 many logits tie.
    logits = torch.randn(rows, experts).to(dtype)
    weights, ids = on_device(logits, k, renormalize)
    wanted_weights, wanted_ids = topk_softmax(logits, k, renormalize)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


def test_ties_and_zeros() -> None:
    logits = torch.tensor([[0.0, -0.0, 0.0, -1.0, float("-inf")], [2.0, 3.0, 2.0, 3.0, 3.0]])
    _, ids = on_device(logits, 4, True)
    assert ids.tolist() == [[0, 1, 2, 3], [1, 3, 4, 0]]


def test_not_finite_logits_give_valid_ids() -> None:
    logits = torch.randn(4, 20)
    logits[0] = float("nan")
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    logits[3, 2] = float("inf")
    weights, ids = on_device(logits, 6, True)
    for row in ids.tolist():
        assert len(set(row)) == 6
        assert set(row) <= set(range(20))
    assert weights.isnan().any(1).all()


def test_local_ids_and_padding() -> None:
    logits = torch.randn(9, 32)
    logits[4] = float("nan")
    real = torch.ones(9, dtype=torch.bool)
    real[4] = False
    weights, ids = on_device(logits, 4, False, first=8, stop=24, real=real.to(DEVICE))
    wanted_weights, wanted = topk_softmax(logits, 4, False)
    wanted = torch.where((wanted >= 8) & (wanted < 24), wanted - 8, -1)
    wanted[4], wanted_weights[4] = -1, 0.0
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_scoring_bias_scale(scoring: str, renormalize: bool, biased: bool) -> None:
    logits = torch.randn(6, 24)
    bias = torch.randn(24) if biased else None
    scores = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    wanted = (scores if bias is None else scores + bias).sort(dim=1, descending=True, stable=True)[
        1
    ]
    wanted = wanted[:, :5]
    wanted_weights = scores.gather(1, wanted)
    if renormalize:
        wanted_weights /= wanted_weights.sum(1, keepdim=True)
    options = {"scoring": scoring, "bias": None if bias is None else bias.to(DEVICE), "scale": 2.5}
    weights, ids = on_device(logits, 5, renormalize, **options)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(weights, wanted_weights * 2.5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("renormalize", [False, True])
def test_sigmoids_that_are_all_one_leave_the_choice_to_the_logits(renormalize: bool) -> None:
    logits = torch.arange(30.0, 90.0).view(3, 20)
    weights, ids = on_device(logits, 4, renormalize, scoring="sigmoid")
    assert ids.tolist() == [[19, 18, 17, 16]] * 3
    assert weights.tolist() == [[0.25 if renormalize else 1.0] * 4] * 3


def test_no_rows_and_strided_rows() -> None:
    weights, ids = on_device(torch.randn(0, 8), 2, True)
    assert weights.shape == ids.shape == (0, 2)
    wide = torch.randn(5, 16)
    assert torch.equal(on_device(wide[:, :8], 2, True)[1], topk_softmax(wide[:, :8], 2, True)[1])
