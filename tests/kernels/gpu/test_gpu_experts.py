from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_interpreter  # noqa: F401
from gpu_support import BOUND, DEVICE, ON_GPU, relative_error
from isomoe.kernels import ClampedSwiGlu, ExpertForm, SwiGlu, packed_rows
from isomoe.kernels.block_fp8 import BlockFp8, Fp8Rows
from isomoe.kernels.experts import PLAIN
from isomoe.kernels.gpu import experts_few, experts_grouped, grouped_tiles
from isomoe.kernels.gpu.align import align
from isomoe.kernels.gpu.configs import Config, trying
from isomoe.kernels.gpu.expert_operands import MatrixOperand, RowOperand
from isomoe.kernels.gpu.experts import fused_experts
from isomoe.kernels.gpu.experts_torch import grouped_mm_experts

# The interpreter's numpy warns of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a program, whatever its size."""
    if not ON_GPU:
        gate_up = {"BLOCK_I": 16, "BLOCK_H": 64, "STAGES": 1, "UNROLL": 1, "num_warps": 1}
        down = {"BLOCK_H": 16, "BLOCK_I": 64, "STAGES": 1, "UNROLL": 1, "num_warps": 1}
        monkeypatch.setattr(experts_few, "_default_gate_up", lambda *_: gate_up)
        monkeypatch.setattr(experts_few, "_default_down", lambda *_: down)


def grouped_experts(x, gate_up, down, *others) -> Tensor:
    """Whatever the number of rows."""
    operands = RowOperand.of(x), MatrixOperand.of(gate_up), MatrixOperand.of(down)
    return experts_grouped.grouped_experts(*operands, *others)


def draw_ids(rows: int, top_k: int, experts: int, absent: float = 0.25) -> Tensor:
    """Distinct in a row; some -1."""
    ids = torch.rand(rows, experts).argsort(1)[:, :top_k].to(torch.int32)
    ids[torch.rand(rows, top_k) < absent] = -1
    return ids


def make(
    rows: int, top_k: int, experts: int, hidden: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    x = torch.randn(rows, hidden).to(dtype)
    gate_up = (torch.randn(experts, 2 * size, hidden) * hidden**-0.5).to(dtype)
    down = (torch.randn(experts, hidden, size) * size**-0.5).to(dtype)
    ids = draw_ids(rows, top_k, experts)
    if rows > 2:
        # A padding row: nothing may come of it.
        ids[1] = -1
        x[1] = float("nan")
    weights = torch.rand(rows, top_k)
    weights[ids < 0] = float("nan")
    return x, gate_up, down, ids, weights


def reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(gate_up.shape[0]):
        rows, ks = (ids == expert).nonzero(as_tuple=True)
        by = weights[rows, ks].double()[:, None]
        given = x[rows].double() * (by if form.scales_input else 1)
        both = given @ gate_up[expert].double().T
        if form.gate_up_bias is not None:
            both += form.gate_up_bias[expert].double()
        gate, up = both.chunk(2, dim=1)
        match form.activation:
            case SwiGlu(limit=None):
                inner = F.silu(gate) * up
            case SwiGlu(limit=limit):
                inner = F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
            case ClampedSwiGlu(limit=limit, alpha=alpha):
                gate = gate.clamp(max=limit)
                inner = gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)
        outputs = inner @ down[expert].double().T
        if form.down_bias is not None:
            outputs += form.down_bias[expert].double()
        out.index_add_(0, rows, outputs * (1 if form.scales_input else by))
    return out


def check(inputs: tuple[Tensor, ...], fused=fused_experts, form: ExpertForm = PLAIN) -> None:
    biases = {
        name: bias.to(DEVICE)
        for name in ("gate_up_bias", "down_bias")
        if (bias := getattr(form, name)) is not None
    }
    given = [tensor.to(DEVICE) for tensor in inputs]
    out = fused(*given) if form is PLAIN else fused(*given, replace(form, **biases))
    assert out.dtype == inputs[0].dtype
    assert relative_error(out, reference(*inputs, form)) < BOUND[out.dtype]
    none = (inputs[3] < 0).all(1)
    assert (out.cpu()[none] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "top_k", "experts", "hidden", "size"),
    [
        (1, 4, 16, 256, 128),
        (1, 3, 5, 72, 44),
        (2, 4, 16, 96, 40),
        (3, 6, 40, 80, 72),
        (9, 4, 16, 64, 48),
        (21, 3, 5, 72, 44),
        (40, 2, 2, 104, 96),
    ],
)
def test_any_sizes(
    rows: int, top_k: int, experts: int, hidden: int, size: int, dtype: torch.dtype
) -> None:
    check(make(rows, top_k, experts, hidden, size, dtype))


FORMS = {
    "limit": ExpertForm(activation=SwiGlu(limit=0.7)),
    "clamped": ExpertForm(activation=ClampedSwiGlu(limit=0.9)),
    "input": ExpertForm(scales_input=True),
    "biases": ExpertForm(),
    "all": ExpertForm(activation=ClampedSwiGlu(limit=0.9), scales_input=True),
}


@pytest.mark.parametrize("rows", [2, 21])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_form(dtype: torch.dtype, form: str, rows: int) -> None:
    experts, hidden, size = 12, 72, 44
    inputs = make(rows, 3, experts, hidden, size, dtype)
    found = FORMS[form]
    if form in ("biases", "all"):
        gate_up, down = torch.randn(experts, 2 * size), torch.randn(experts, hidden)
        found = replace(found, gate_up_bias=gate_up.to(dtype), down_bias=down.to(dtype))
    check(inputs, form=found)
    if rows > 2:
        config = {**grouped_tiles.FP32, "BLOCK_N": 64, "BLOCK_K": 64, "SWAP": 1}
        with trying(experts_grouped.GATE_UP, config), trying(experts_grouped.DOWN, config):
            check(inputs, grouped_experts, found)


@pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64, 200, 1000, 5000])
def test_main_sizes(rows: int) -> None:
    check(make(rows, 8, 128, 2048, 768, torch.bfloat16))


def test_no_rows() -> None:
    inputs = make(0, 4, 16, 64, 32, torch.bfloat16)
    assert fused_experts(*(tensor.to(DEVICE) for tensor in inputs)).shape == (0, 64)


@pytest.mark.parametrize("rows", [1, 30])
def test_no_local_expert(rows: int) -> None:
    x, gate_up, down, ids, weights = make(rows, 4, 8, 64, 32, torch.bfloat16)
    ids.fill_(-1)
    check((x, gate_up, down, ids, weights))


@pytest.mark.parametrize("rows", [2, 30])
def test_same_bits_and_int64_ids(rows: int) -> None:
    inputs = [tensor.to(DEVICE) for tensor in make(rows, 4, 16, 64, 64, torch.bfloat16)]
    first = fused_experts(*inputs)
    inputs[3] = inputs[3].long()
    assert torch.equal(first, fused_experts(*inputs))


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize(("gate_block", "down_block"), [(16, 64), (64, 16), (32, 32)])
def test_tiles(swap: int, tma: int, gate_block: int, down_block: int) -> None:
    config = {
        "BLOCK_N": 64,
        "BLOCK_K": 64,
        "GROUP_M": 2,
        "SWAP": swap,
        "TMA": tma,
        "num_warps": 4,
        "num_stages": 3,
    }
    # 72 units: the last tile of weights reaches into the next expert's.
    inputs = make(40, 2, 4, 96, 72, torch.bfloat16)
    with (
        trying(experts_grouped.GATE_UP, {**config, "BLOCK_M": gate_block}),
        trying(experts_grouped.DOWN, {**config, "BLOCK_M": down_block}),
    ):
        check(inputs, grouped_experts)


class InFp8:
    """Inputs in FP8, and the values that they stand for, by the formats' definition."""

    def __init__(self, inputs: tuple[Tensor, ...], block: int, grain: int, rows: bool) -> None:
        x, gate_up, down, *self.others = inputs
        experts, hidden, size = down.shape
        # Scales that differ a lot, so that a wrong one shows.
        matrices = gate_up.view(experts, 2, size, hidden)
        self.gate_up = self.in_blocks(matrices, (grain, block))
        self.down = self.in_blocks(down, (block, grain))
        self.meant_x = x
        self.x: Tensor | Fp8Rows = x.to(DEVICE)
        if rows:
            codes, scales = packed_rows.pack_fp8(x.nan_to_num())
            self.meant_x = codes.float() * scales.repeat_interleave(128, 1)[:, :hidden]
            self.x = Fp8Rows(codes=codes.to(DEVICE), scales=scales.to(DEVICE), dtype=x.dtype)

    def in_blocks(self, weight: Tensor, block: tuple[int, int]) -> tuple[BlockFp8, Tensor]:
        paired = weight.dim() == 4
        found = BlockFp8.zeros(*weight.shape, block=block, device=DEVICE, paired=paired)
        scales = torch.exp2(torch.randint(-8, -3, found.scales.shape).float()) * 1.1
        codes = (torch.randn(weight.shape) * 4).to(torch.float8_e4m3fn)
        found.codes.copy_(codes)
        found.scales.copy_(scales)
        *_, rows, columns = weight.shape
        spread = scales.repeat_interleave(block[0], -2)[..., :rows, :]
        spread = spread.repeat_interleave(block[1], -1)[..., :columns]
        return found, codes.double() * spread.double()

    def check(self, fused, form: ExpertForm = PLAIN) -> None:
        (gate_up, meant_gate_up), (down, meant_down) = self.gate_up, self.down
        out = fused(self.x, gate_up, down, *(other.to(DEVICE) for other in self.others), form)
        meant = self.meant_x, meant_gate_up.flatten(1, 2), meant_down, *self.others
        assert relative_error(out, reference(*meant, form)) < BOUND[out.dtype]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("count", "hidden", "size", "block", "grain"),
    [(2, 256, 64, 128, 128), (2, 208, 96, 64, 32), (21, 256, 192, 128, 64), (21, 144, 72, 32, 16)],
)
def test_fp8(count: int, hidden: int, size: int, block: int, grain: int, rows: bool) -> None:
    inputs = make(count, 3, 12, hidden, size, torch.bfloat16)
    given = InFp8(inputs, block, grain, rows)
    given.check(fused_experts)
    given.check(fused_experts, ExpertForm(activation=SwiGlu(limit=0.7), scales_input=True))
    for swap, tma in ((0, 0), (1, 1)):
        config = {**grouped_tiles.FP32, "BLOCK_N": 64, "BLOCK_K": 64, "SWAP": swap, "TMA": tma}
        with trying(experts_grouped.GATE_UP, config), trying(experts_grouped.DOWN, config):
            given.check(grouped_experts)


@pytest.mark.parametrize("stages", [1, 3])
def test_few_rows_tiles(stages: int) -> None:
    inputs = make(2, 4, 16, 160, 40, torch.bfloat16)
    gate_up: Config = {"BLOCK_I": 4, "BLOCK_H": 64, "STAGES": stages, "UNROLL": 2, "num_warps": 2}
    down: Config = {"BLOCK_H": 8, "BLOCK_I": 32, "STAGES": stages, "UNROLL": 2, "num_warps": 2}
    with trying(experts_few.GATE_UP, gate_up), trying(experts_few.DOWN, down):
        check(inputs)


def test_many_pairs_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_grouped, "_EXACT_PAIRS", 8)
    check(make(20, 4, 8, 64, 32, torch.bfloat16))


def test_candidates() -> None:
    for pairs in (512, 4096, 131072):
        for candidates in (grouped_tiles.gate_up_candidates, grouped_tiles.down_candidates):
            found = list(candidates(pairs, 128, (2, 2)))
            assert 10 <= len(found) <= 60
            assert all(config.keys() == grouped_tiles.FP32.keys() for config in found)
    assert 10 <= len(list(experts_few.gate_up_candidates(2048))) <= 60
    assert 10 <= len(list(experts_few.down_candidates(768, 8))) <= 60


def test_torch_grouped_mm() -> None:
    check(make(20, 4, 8, 64, 32, torch.bfloat16), grouped_mm_experts)


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize(
    ("rows", "top_k", "experts"), [(1, 1, 1), (5, 3, 6), (300, 4, 5), (2000, 3, 7), (9000, 3, 5)]
)
def test_align(rows: int, top_k: int, experts: int, block: int) -> None:
    ids = draw_ids(rows, min(top_k, experts), experts)
    pairs = ids.numel()
    aligned = align(ids.to(DEVICE), experts, block)
    ends, tile_experts, slots, ordered = (
        tensor.tolist()
        for tensor in (aligned.ends, aligned.tile_experts, aligned.slots, aligned.sorted_pairs)
    )
    tile = 0
    for expert in range(experts):
        wanted = (ids.flatten() == expert).nonzero().flatten().tolist()
        while wanted:
            assert tile_experts[tile] == expert
            filled = wanted[:block] + [pairs] * (block - len(wanted[:block]))
            assert ordered[tile * block : (tile + 1) * block] == filled
            wanted = wanted[block:]
            tile += 1
        assert ends[expert] == tile
    assert tile <= aligned.max_tiles == len(tile_experts)
    assert set(tile_experts[tile:]) <= {-1}
    for pair, (slot, expert) in enumerate(zip(slots, ids.flatten().tolist(), strict=True)):
        assert (slot == -1) if expert < 0 else (ordered[slot] == pair)


def test_align_worst_case() -> None:
    # Every expert has a pair more than fills its tiles.
    ids = torch.arange(4).repeat(17)[:, None].int()
    aligned = align(ids.to(DEVICE), 4, 16)
    assert aligned.max_tiles == 8
    assert aligned.ends.tolist() == [2, 4, 6, 8]
