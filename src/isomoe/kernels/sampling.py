"""From logits to token ids and log-probabilities.

T: rows   V: vocabulary   W: words of a bitmask, ceil(V / 32)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A nucleus is first sought among this many of the most likely tokens, and the whole vocabulary
# is sorted only for a row whose nucleus is wider.
_NUCLEUS = 1024
_MASK64 = (1 << 64) - 1
# Colder than this is greedy, as in vLLM: the quotient would leave fp32.
_COLDEST = 1e-5
# A repetition penalty beyond these changes no order of tokens any more, but could leave fp32.
_LEAST_REPETITION, _MOST_REPETITION = 1e-6, 1e6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowPenalties:
    """Penalties on the tokens that a row's request holds. The tensors lie on the CPU."""

    token_ids: Tensor
    """[S] int64, distinct."""
    counts: Tensor
    """[S] int64: how often the output holds each; 0 for one of the prompt alone."""
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowAdjustment:
    """What is done to a row's logits before its token is drawn. The tensors lie on the CPU."""

    bias: tuple[Tensor, Tensor] | None = None
    """[B] int64 token ids, and [B] fp32 what is added to their logits."""
    penalties: RowPenalties | None = None
    allowed: Tensor | None = None
    """[W] int32: token t may be drawn if bit t % 32 of word t // 32 is set; None allows all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How one row's token is drawn."""

    temperature: float = 1.0
    """0 is greedy, and so is anything below 1e-5."""
    top_k: int = -1
    """-1 or 0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    """The drawn token's position in its request."""

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"temperature {self.temperature}: must be at least 0")
        if self.top_k < -1:
            raise ValueError(f"top_k {self.top_k}: must be -1 or 0 (off) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p {self.min_p}: must be from 0 to 1")


def logprobs(logits: Tensor) -> Tensor:
    """log_softmax in fp32. logits: [T, V], any float dtype; returns [T, V] fp32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, [T] int64, and whether its logit is finite, [T] bool.

    logits: [T, V], any float dtype. The lowest id among ties.
    """
    best, ids = logits.float().max(dim=-1)  # slow in bf16 on CPUs
    return ids, best.isfinite()


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of one token a row, [T] fp32. logits: [T, V]; ids: [T] int64."""
    return logprobs(logits).gather(1, ids.unsqueeze(1)).squeeze(1)


def top_logprobs(row_logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, largest first. row_logprobs: [T, V] fp32.

    Returns values [T, k] fp32 and ids [T, k] int64. The order among ties is not promised.
    """
    values, ids = torch.topk(row_logprobs, k, dim=-1)
    return values, ids


def pack_bits(allowed: Tensor) -> Tensor:
    """A bitmask as `RowAdjustment` has it, [W] int32. allowed: [V] bool."""
    bits = torch.nn.functional.pad(allowed, (0, -allowed.shape[0] % 32)).view(-1, 32).int()
    return (bits << torch.arange(32, dtype=torch.int32)).sum(dim=1, dtype=torch.int32)


def adjust(logits: Tensor, rows: Sequence[RowAdjustment]) -> Tensor:
    """A copy with each row adjusted as asked, [T, V] fp32. logits: [T, V], any float dtype.

    Bias first; then penalties, repetition before the others; then -inf for what is not allowed.
    A repetition penalty divides positive logits and multiplies the others, as in transformers.
    """
    out = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    biases = [(index, row.bias) for index, row in enumerate(rows) if row.bias is not None]
    if biases:
        at = _places(out, [(index, ids) for index, (ids, _) in biases])
        values = _moved(torch.cat([values for _, (_, values) in biases]), out.device)
        out.view(-1).index_put_((at,), values, accumulate=True)
    penalties = [(i, row.penalties) for i, row in enumerate(rows) if row.penalties is not None]
    if penalties:
        _penalize(out, penalties)
    masks = [(index, row.allowed) for index, row in enumerate(rows) if row.allowed is not None]
    if masks:
        _mask(out, masks)
    return out


def sample(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """One token id a row, [T] int64. logits: [T, V], any float dtype; `rows` has T members.

    Temperature first; then min-p, top-k and top-p, in this order, each on the distribution that
    the one before has left. Tokens that tie with the last one that top-k or top-p keeps are kept
    too. Greedy takes the lowest id among ties. Probabilities are fp32, their running sum fp64.

    A row's draw is a function of its logits and of (seed, position), whatever the batch.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits and {len(rows)} of parameters")
    drawn = [index for index, row in enumerate(rows) if row.temperature >= _COLDEST]
    if not drawn:
        return logits.argmax(dim=-1)
    if len(drawn) == len(rows):
        return _draw(logits, rows)
    ids = logits.argmax(dim=-1)
    index = torch.tensor(drawn, device=logits.device)
    ids[index] = _draw(logits.index_select(0, index), [rows[i] for i in drawn])
    return ids


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a function of (seed, position): 52 bits of SplitMix64."""
    return (_mix(_mix(seed & _MASK64) + position) >> 12) / (1 << 52)


def _mix(state: int) -> int:
    """One SplitMix64 step (Steele, Lea and Flood, 2014)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` from the CPU on `device`; nobody waits for a GPU to take it."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def _places(logits: Tensor, token_ids: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Where the tokens of each row lie in the flattened logits."""
    vocab = logits.shape[1]
    places = torch.cat([ids + row * vocab for row, ids in token_ids])
    return _moved(places, logits.device)


def _penalize(logits: Tensor, penalties: Sequence[tuple[int, RowPenalties]]) -> None:
    """In place."""
    each = torch.tensor([(row.repetition, row.presence, row.frequency) for _, row in penalties])
    sizes = torch.tensor([row.token_ids.shape[0] for _, row in penalties])
    factors = _moved(each.repeat_interleave(sizes, dim=0), logits.device)
    repetition, presence, frequency = factors.unbind(dim=1)
    repetition = repetition.clamp(_LEAST_REPETITION, _MOST_REPETITION)
    counts = _moved(torch.cat([row.counts for _, row in penalties]), logits.device)
    at = _places(logits, [(index, row.token_ids) for index, row in penalties])
    flat = logits.view(-1)
    values = flat[at]
    values = torch.where(values > 0.0, values / repetition, values * repetition)
    flat[at] = values - frequency * counts - presence * (counts > 0)


def _mask(logits: Tensor, masks: Sequence[tuple[int, Tensor]]) -> None:
    """In place. A byte of a mask is looked up as eight addends: faster than `masked_fill_`."""
    device = logits.device
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    addends = torch.zeros(256, 8, device=device).masked_fill_(bits & 1 == 0, -torch.inf)
    packed = _moved(torch.stack([mask for _, mask in masks]), device).view(torch.uint8)
    banned = torch.nn.functional.embedding(packed.int(), addends).flatten(1)
    index = _moved(torch.tensor([row for row, _ in masks]), device)
    logits.index_add_(0, index, banned[:, : logits.shape[1]])


def _draw(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Inverts the running sum of each row's filtered distribution at its uniform number."""
    device = logits.device
    temperature = torch.tensor([row.temperature for row in rows], device=device)
    probs = torch.softmax(logits.float() / temperature.unsqueeze(1), dim=-1)
    floor = [_threshold(probs[index], row) for index, row in enumerate(rows)]
    if any(threshold is not None for threshold in floor):
        zero = probs.new_zeros(())
        least = torch.stack([zero if threshold is None else threshold for threshold in floor])
        probs = probs.masked_fill(probs < least.unsqueeze(1), 0.0)
    running = probs.cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(row.seed, row.position) for row in rows]
    number = torch.tensor(numbers, dtype=torch.float64, device=device).unsqueeze(1)
    return torch.searchsorted(running, number * running[:, -1:], right=True).squeeze(1)


def _threshold(probs: Tensor, row: RowSampling) -> Tensor | None:
    """The least probability that the row's filters keep. probs: [V] fp32; None keeps all."""
    vocab = probs.shape[0]
    top_k = row.top_k if 0 < row.top_k < vocab else vocab
    least = probs.max() * row.min_p if row.min_p > 0.0 else None
    if row.top_p >= 1.0:
        if top_k == vocab:
            return least
        kth = torch.topk(probs, top_k).values[-1]
        return kth if least is None else torch.maximum(kth, least)
    width = min(max(_NUCLEUS, top_k if top_k < vocab else 0), vocab)
    while True:
        largest = torch.topk(probs, width).values
        kept = probs
        floor = least
        if top_k < vocab:
            kth = largest[top_k - 1]
            floor = kth if floor is None else torch.maximum(kth, floor)
        if floor is not None:
            kept = kept.masked_fill(kept < floor, 0.0)
            largest = largest.masked_fill(largest < floor, 0.0)
        mass = row.top_p * kept.sum(dtype=torch.float64)
        running = largest.cumsum(dim=-1, dtype=torch.float64)
        if width == vocab or bool(running[-1] >= mass):
            last = torch.searchsorted(running, mass.unsqueeze(0)).clamp_(max=width - 1)
            return largest[last].squeeze(0)
        width = vocab
