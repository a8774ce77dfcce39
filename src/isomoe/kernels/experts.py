"""Gated experts over the experts of one rank.

T: rows   K: experts a row   E: local experts   H: hidden size   I: intermediate size
N: pairs of a row and one of its local experts

There are two paths. *All* experts for every row, in two large products, when nearly all are
active: reading the weights is then the cost, and the surplus arithmetic is free. Otherwise the
*active* ones, two small products each over rows sorted by expert. The rule (`_takes_all`) was
measured on two Sapphire Rapids cores in bf16, packed, for E/K of 4 and 8, H of 256 to 1024 and 1
to 2048 rows. Gathering weights for bmm copies them: 1.6 to 18 times slower, but for a few rows of
the smallest model. grouped_mm took 0.75 to 1.15 times what plain *active* experts took.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isomoe.kernels.block_fp8 import ExpertMatrices, ExpertRows, plain_matrices, plain_rows
from isomoe.kernels.ffn import SWIGLU, Activation, gated
from isomoe.kernels.linear import PackedLinear, linear, pack_linear

Weight = PackedLinear | Tensor

# With weights of at most this size, calls cost more than reading every expert.
_SMALL_BYTES = 4 << 20
# Above this a layer's packed weights are kept once, for the *active* path alone.
_JOINED_BYTES = 64 << 20
# All experts for T rows are E/K times the arithmetic; beyond this many rows x E/K it shows.
_ROWS_OF_ALL = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertForm:
    """What experts compute beside their two products.

    Attributes:
        activation: between the products.
        scales_input: a row's weight multiplies what an expert takes, not what it gives (Llama 4).
        gate_up_bias: [E, 2I], or None.
        down_bias: [E, H], or None.
    """

    activation: Activation = SWIGLU
    scales_input: bool = False
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is SwiGLU experts whose outputs are weighed, and nothing else."""
        has_bias = self.gate_up_bias is not None or self.down_bias is not None
        return self.activation == SWIGLU and not self.scales_input and not has_bias


PLAIN = ExpertForm()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedExperts:
    """A rank's expert weights in the layouts that `packed_experts` reads, made by `pack_experts`.

    Up to `_JOINED_BYTES` of plain weights, twice their memory; beyond, no more than theirs. The
    caller may then drop the plain ones.
    """

    gate_up: tuple[Weight, ...]
    """E of [2I, H], by `pack_linear`."""
    down: tuple[Weight, ...]
    """E of [H, I], by `pack_linear`."""
    joined: tuple[Weight, Weight] | None
    """[E * 2I, H] and [H, E * I], by `pack_linear`; None where they would take too much memory."""
    weight_bytes: int
    """Of the plain weights."""
    small: bool
    """Whether each expert's matrices are small enough for `linear` to keep them in fp32 too."""


def pack_experts(gate_up: Tensor, down: Tensor, joined: bool = True) -> PackedExperts:
    """Lays the weights out for `packed_experts`.

    gate_up: [E, 2I, H], gate first; down: [E, H, I].

    Args:
        joined: whether all experts' weights may be laid out as one, too.
    """
    hidden = gate_up.shape[2]
    weight_bytes = (gate_up.numel() + down.numel()) * gate_up.element_size()
    whole = None
    if joined and weight_bytes <= _JOINED_BYTES:
        all_down = down.transpose(0, 1).reshape(hidden, -1)
        whole = (pack_linear(gate_up.reshape(-1, hidden)), pack_linear(all_down))
    each = tuple(pack_linear(weight) for weight in gate_up.unbind())
    return PackedExperts(
        gate_up=each,
        down=tuple(pack_linear(weight) for weight in down.unbind()),
        weight_bytes=weight_bytes,
        small=all(isinstance(one, PackedLinear) and one.exact is not None for one in each),
        joined=whole,
    )


def fused_experts(
    x: ExpertRows,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """The weighted sum of each row's local experts, [T, H] fp32; zeros for a row that has none.

    x: [T, H] bf16 or fp32, finite in every row; gate_up: [E, 2I, H] (gate first) and
    down: [E, H, I] in x's dtype; topk_ids: [T, K] int64, local ids, distinct in a row, -1 for
    an expert of another rank or a padding row; topk_weights: [T, K] fp32, ignored where id is -1.
    In FP8, gate_up is [E, 2, I, H]; weights and rows then count as their values in x's dtype.

    Matrix products accumulate in fp32 and give x's dtype; the weighted sum is fp32. Its order is
    fixed, so equal inputs give equal bits. A row depends on the other rows only through the
    choice of path and the matmul's own rounding.
    """
    x = plain_rows(x)
    gate_up = plain_matrices(gate_up, x.dtype).flatten(1, -2)
    down = plain_matrices(down, x.dtype)
    num_rows, num_experts = x.shape[0], gate_up.shape[0]
    if num_rows == 0:
        return x.new_zeros(x.shape, dtype=torch.float32)
    weight_bytes = (gate_up.numel() + down.numel()) * x.element_size()
    if form.is_plain and _takes_all(topk_ids, num_experts, weight_bytes):
        inner = F.linear(x, gate_up.flatten(0, 1))
        inner = _weigh(inner, num_experts, topk_ids, topk_weights)
        inner = inner.view(num_rows, num_experts, -1).transpose(0, 1)
        return torch.matmul(inner, down.transpose(1, 2)).sum(0, dtype=torch.float32)
    return _active_experts(x, gate_up.unbind(), down.unbind(), topk_ids, topk_weights, form)


def packed_experts(
    x: ExpertRows,
    experts: PackedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm = PLAIN,
) -> Tensor:
    """`fused_experts` on packed weights.

    Where all experts are computed, the weighted sum over experts is part of the down projection:
    accumulated in fp32, rounded to x's dtype once, at its end.
    """
    x = plain_rows(x)
    num_rows, num_experts = x.shape[0], len(experts.gate_up)
    if num_rows == 0:
        return x.new_zeros(x.shape, dtype=torch.float32)
    one_small_row = num_rows == 1 and experts.small
    takes_all = not one_small_row and _takes_all(topk_ids, num_experts, experts.weight_bytes)
    if experts.joined is not None and takes_all:
        all_gate_up, all_down = experts.joined
        inner = linear(x, all_gate_up)
        inner = _weigh(inner, num_experts, topk_ids, topk_weights)
        return linear(inner.view(num_rows, -1), all_down).float()
    return _active_experts(x, experts.gate_up, experts.down, topk_ids, topk_weights, form)


def _takes_all(topk_ids: Tensor, num_experts: int, weight_bytes: int) -> bool:
    num_rows, top_k = topk_ids.shape
    if num_rows * num_experts > _ROWS_OF_ALL * top_k:
        return False
    return num_rows * top_k >= num_experts or weight_bytes <= _SMALL_BYTES


def _weigh(gate_up: Tensor, num_experts: int, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """silu_and_mul of [T, E * 2I] times the row's weight for the expert (0: not chosen).

    Returns [T, E, I] in gate_up's dtype, to which the weights are rounded, as transformers does.
    """
    num_rows = topk_ids.shape[0]
    weights = gate_up.new_zeros(num_rows, num_experts + 1)
    weights.scatter_(1, topk_ids + 1, topk_weights.to(gate_up.dtype))
    inner = gated(gate_up.view(num_rows, num_experts, -1), SWIGLU)
    return inner.mul_(weights[:, 1:].unsqueeze(-1))


def _active_experts(
    x: Tensor,
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm,
) -> Tensor:
    """The chosen pairs only, sorted by expert, two matrix products an active expert."""
    num_rows, top_k = topk_ids.shape
    if num_rows == 1:
        return _one_row(x, gate_up, down, topk_ids, topk_weights, form)
    sorted_ids, order = topk_ids.flatten().sort(stable=True)
    absent, *counts = torch.bincount(sorted_ids + 1, minlength=len(down) + 1).tolist()
    active = [expert for expert, count in enumerate(counts) if count]
    lengths = [count for count in counts if count]
    if not active:
        return x.new_zeros(x.shape, dtype=torch.float32)
    inputs = x.index_select(0, order[absent:].div(top_k, rounding_mode="floor"))
    if form.scales_input:
        inputs = inputs * topk_weights.flatten()[order[absent:]].unsqueeze(1).to(x.dtype)
        topk_weights = torch.ones_like(topk_weights)
    outputs = _experts_of(torch.split(inputs, lengths), gate_up, down, active, form)
    # Back to [T, K]: each row then sums its experts in the order of its ids.
    if absent:
        pairs = outputs.new_zeros(num_rows * top_k, outputs.shape[1])
        topk_weights = topk_weights.masked_fill(topk_ids < 0, 0.0)
    else:
        pairs = torch.empty_like(outputs)
    pairs.index_copy_(0, order[absent:], outputs)
    return (pairs.view(num_rows, top_k, -1) * topk_weights.unsqueeze(-1)).sum(1)


def _one_row(
    x: Tensor,
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    topk_ids: Tensor,
    topk_weights: Tensor,
    form: ExpertForm,
) -> Tensor:
    """`_active_experts` of one row, where nothing need be sorted."""
    ids = topk_ids[0].tolist()
    active = [expert for expert in ids if expert >= 0]
    if not active:
        return x.new_zeros(x.shape, dtype=torch.float32)
    if len(active) < len(ids):
        topk_weights = topk_weights[topk_ids >= 0].unsqueeze(0)
    inputs: tuple[Tensor, ...] = (x,) * len(active)
    if form.scales_input:
        inputs = (x * topk_weights.T.to(x.dtype)).unsqueeze(1).unbind()
        topk_weights = torch.ones_like(topk_weights)
    outputs = _experts_of(inputs, gate_up, down, active, form)
    return torch.mm(topk_weights, outputs.float())


def _experts_of(
    inputs: tuple[Tensor, ...],
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    active: list[int],
    form: ExpertForm,
) -> Tensor:
    """[N, H]: each active expert on its own rows. inputs: one [rows, H] an active expert."""
    lengths = [rows.shape[0] for rows in inputs]
    hidden = _products(inputs, gate_up, active, form.gate_up_bias)
    inner = gated(torch.cat(hidden), form.activation)
    parts = torch.split(inner, lengths)
    return torch.cat(_products(parts, down, active, form.down_bias))


def _products(
    inputs: Sequence[Tensor], weights: Sequence[Weight], active: list[int], biases: Tensor | None
) -> list[Tensor]:
    each = zip(inputs, active, strict=True)
    if biases is None:
        return [linear(rows, weights[expert]) for rows, expert in each]
    return [linear(rows, weights[expert]) + biases[expert] for rows, expert in each]
