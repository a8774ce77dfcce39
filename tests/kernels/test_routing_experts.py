"""The choice of experts and their weighted sum against float64 loops over tokens."""

import math

import pytest
import torch
from torch import Tensor

from isomoe.kernels import (
    ClampedSwiGlu,
    ExpertForm,
    Routing,
    SwiGlu,
    choose,
    fused_experts,
    linear,
    pack_experts,
    pack_linear,
    packed_experts,
    route,
)
from isomoe.kernels import experts as experts_module


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
def test_softmax_routing_is_the_reference(rows: int, dtype: torch.dtype, renormalize: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, 16).to(dtype)
    weights, ids = choose(logits, Routing(top_k=4, renormalize=renormalize))
    expected_weights, expected_ids = reference_topk(logits, 4, renormalize)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_experts", [8, 64, 257])
def test_ties_go_to_the_lower_expert(num_experts: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (50, num_experts)).float()
    _, ids = choose(logits, Routing(top_k=6, renormalize=True))
    assert torch.equal(ids, reference_topk(logits, 6, True)[1])


def reference_choice(
    logits: Tensor, routing: Routing, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule of the models, in words of one row: scores, choices, groups, weights."""
    weights = torch.zeros(len(logits), routing.top_k, dtype=torch.float64)
    ids = torch.zeros(len(logits), routing.top_k, dtype=torch.int64)
    for row, values in enumerate(logits.double().tolist()):
        experts = range(len(values))
        if routing.scoring == "softmax":
            total = sum(math.exp(value) for value in values)
            scores = [math.exp(value) / total for value in values]
        else:
            scores = [1 / (1 + math.exp(-value)) for value in values]
        choice = list(scores) if bias is None else [scores[e] + float(bias[e]) for e in experts]
        size = len(values) // routing.num_groups

        def group_score(group: int, choice: list[float] = choice, size: int = size) -> float:
            best = sorted(choice[group * size : (group + 1) * size], reverse=True)
            return best[0] if routing.group_score == "max" else best[0] + best[1]

        groups = range(routing.num_groups)
        if routing.num_groups > 1:
            groups = sorted(groups, key=lambda g: (-group_score(g), g))[: routing.kept_groups]
        allowed = [expert for expert in experts if expert // size in groups]
        chosen = sorted(allowed, key=lambda e: (-choice[e], e))[: routing.top_k]
        total = sum(scores[e] for e in chosen) if routing.renormalize else 1.0
        for column, expert in enumerate(chosen):
            weights[row, column] = scores[expert] / total * routing.scale
            ids[row, column] = expert
    return weights, ids


ROUTINGS = [
    Routing(top_k=4, scoring="sigmoid"),
    Routing(top_k=4, scoring="sigmoid", renormalize=True, scale=2.5),
    Routing(top_k=4, scale=16.0),
    Routing(top_k=4, renormalize=True, scale=3.0),
    Routing(top_k=1, scoring="sigmoid"),
    *(
        Routing(
            top_k=4,
            scoring=scoring,
            renormalize=renormalize,
            scale=1.5,
            num_groups=groups,
            kept_groups=kept,
            group_score=score,
        )
        for scoring, renormalize in (("sigmoid", True), ("softmax", False))
        for groups, kept in ((4, 2), (8, 3), (2, 1), (4, 4))
        for score in ("max", "top2")
    ),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_routing_is_the_reference(routing: Routing, has_bias: bool) -> None:
    torch.manual_seed(1)
    logits = torch.randn(40, 16)
    bias = 0.3 * torch.randn(16) if has_bias else None
    weights, ids = choose(logits, routing, bias)
    expected_weights, expected_ids = reference_choice(logits, routing, bias)
    assert weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-7)
    assert choose(logits[:0], routing, bias)[1].shape == (0, routing.top_k)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_equal_scores_go_to_the_lower_group_and_expert(routing: Routing) -> None:
    torch.manual_seed(2)
    # Whole groups tie, and sums of two of these scores are equal only if both are.
    logits = torch.tensor([0.0, 1.0, 2.5])[torch.randint(0, 3, (60, 16))]
    logits[:5] = 1.0
    _, ids = choose(logits, routing)
    assert torch.equal(ids, reference_choice(logits, routing)[1])
    if routing.num_groups == 1:
        bias = torch.tensor([0.0, 0.25])[torch.randint(0, 2, (16,))]
        assert torch.equal(
            choose(logits, routing, bias)[1], reference_choice(logits, routing, bias)[1]
        )


@pytest.mark.parametrize("renormalize", [False, True])
def test_sigmoids_that_are_all_one_leave_the_choice_to_the_logits(renormalize: bool) -> None:
    logits = torch.arange(30.0, 90.0).view(3, 20)
    assert (torch.sigmoid(logits) == 1.0).all()
    routing = Routing(top_k=4, scoring="sigmoid", renormalize=renormalize)
    weights, ids = choose(logits, routing)
    assert ids.tolist() == [[19, 18, 17, 16]] * 3
    assert weights.tolist() == [[0.25 if renormalize else 1.0] * 4] * 3


def test_the_bias_sways_the_choice_and_not_the_weights() -> None:
    logits = torch.zeros(1, 4)
    weights, ids = choose(
        logits, Routing(top_k=2, scoring="sigmoid"), torch.tensor([-9.0, 0.0, 0.5, 0.25])
    )
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("routing", [ROUTINGS[1], ROUTINGS[5]], ids=str)
def test_route_numbers_a_rank_s_experts_and_drops_the_others(routing: Routing) -> None:
    torch.manual_seed(3)
    logits, bias = torch.randn(9, 16), torch.randn(16)
    real = torch.arange(9) != 4
    all_weights, all_ids = choose(logits, routing, bias)
    for first, stop in ((0, 16), (0, 4), (4, 12), (12, 16)):
        weights, ids = route(logits, routing, bias, first, stop, real)
        assert torch.equal(weights, all_weights)
        for row in range(9):
            for column in range(routing.top_k):
                expert = int(all_ids[row, column])
                here = first <= expert < stop and row != 4
                assert int(ids[row, column]) == (expert - first if here else -1)


def reference_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm | None = None,
) -> Tensor:
    form = form or ExpertForm()
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip(topk_ids[row].tolist(), topk_weights[row].tolist(), strict=True):
            if expert < 0:
                continue
            before, behind = (weight, 1.0) if form.scales_input else (1.0, weight)
            inner = gate_up[expert].double() @ (x[row].double() * before)
            if form.gate_up_bias is not None:
                inner += form.gate_up_bias[expert].double()
            result = down[expert].double() @ reference_gated(*inner.chunk(2), form)
            if form.down_bias is not None:
                result += form.down_bias[expert].double()
            out[row] += behind * result
    return out


def reference_gated(gate: Tensor, up: Tensor, form: ExpertForm) -> Tensor:
    activation = form.activation
    if isinstance(activation, ClampedSwiGlu):
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        return gate / (1 + torch.exp(-activation.alpha * gate)) * (up + 1)
    silu = gate / (1 + torch.exp(-gate))
    if activation.limit is not None:
        silu, up = silu.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return silu * up


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


def form_of(name: str, gate_up: Tensor, down: Tensor) -> ExpertForm:
    """One of the forms, with random biases in the weights' dtype."""
    generator = torch.Generator().manual_seed(5)

    def bias(weight: Tensor) -> Tensor:
        return torch.randn(*weight.shape[:2], generator=generator).to(weight.dtype)

    match name:
        case "clamped with biases":
            return ExpertForm(
                activation=ClampedSwiGlu(limit=1.0),
                gate_up_bias=bias(gate_up),
                down_bias=bias(down),
            )
        case "limited":
            return ExpertForm(activation=SwiGlu(limit=0.3))
        case "scales its input":
            return ExpertForm(scales_input=True)
        case "a bias above":
            return ExpertForm(gate_up_bias=bias(gate_up))
        case "scales its input, with a bias below":
            return ExpertForm(scales_input=True, down_bias=bias(down))
    raise AssertionError(name)


FORMS = [
    "clamped with biases",
    "limited",
    "scales its input",
    "a bias above",
    "scales its input, with a bias below",
]


@pytest.mark.parametrize("absent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k"), [(0, 8, 2), (1, 8, 3), (3, 64, 3), (16, 8, 4), (31, 6, 1)]
)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_experts_is_the_reference(
    name: str, rows: int, experts: int, top_k: int, dtype: torch.dtype, absent: float
) -> None:
    x, gate_up, down, ids, weights = make(rows, experts, top_k, dtype, absent)
    form = form_of(name, gate_up, down)
    assert not form.is_plain
    expected = reference_experts(x, gate_up, down, ids, weights, form)
    tolerance = 0.04 if dtype == torch.bfloat16 else 1e-5
    before = x.clone()
    for out in (
        fused_experts(x, gate_up, down, ids, weights, form),
        packed_experts(x, pack_experts(gate_up, down, joined=False), ids, weights, form),
    ):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


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
