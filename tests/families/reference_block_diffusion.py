"""Block-diffusion decoding written out: greedy, one sequence, everything recomputed at each step.

The sequence is cut into blocks of B absolute positions. The model is called as `logits(ids)` with
the tokens up to the end of the block in work ([T] int64 -> [T, vocab]), under the block-causal
mask; the logits at position p predict the token at p. A block starts as what is left of the prompt
and mask tokens. At each step every unknown position gets a candidate (the largest logit) and a
confidence (its softmax probability), and the rule says which positions to fix. A fixed position
stays as it is, even if its token happens to be the mask token; prompt positions never change.

Sources: the LowConfidence algorithm of SGLang; `generate` in the released `modeling_llada2_moe.py`;
`block_diffusion_generate` in the SDAR repository. All at temperature 0.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Ids [T] int64 -> logits [T, vocab]."""

Rule = Callable[[Mapping[int, float], int], list[int]]
"""Confidence of each unknown position, in order, and the step (from 0) -> the positions to fix."""


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        ids: the generated tokens.
        logprobs: the log-probability of each, in the step in which it was fixed.
        steps: that step, counted from 0 in its block.
    """

    ids: list[int]
    logprobs: list[float]
    steps: list[int]


def decode(
    logits: Logits,
    prompt: list[int],
    rule: Rule,
    *,
    block: int,
    mask_id: int,
    new_tokens: int,
    stop_ids: Collection[int] = (),
) -> Generated:
    """The answer to `prompt`: whole blocks until it has `new_tokens` or holds a stop token.

    It ends before its first stop token, and after `new_tokens` at the latest.
    """
    ids = list(prompt)
    logprobs: list[float] = []
    steps: list[int] = []
    while len(ids) - len(prompt) < new_tokens and not set(ids[len(prompt) :]) & set(stop_ids):
        start = len(ids)
        end = (start // block + 1) * block
        ids += [mask_id] * (end - start)
        logprobs += [math.nan] * (end - start)
        steps += [-1] * (end - start)
        unknown = list(range(start, end))
        step = 0
        while unknown:
            scores = logits(torch.tensor(ids)).double().log_softmax(-1)
            candidates = {p: int(scores[p].argmax()) for p in unknown}
            chosen = {p: float(scores[p, token]) for p, token in candidates.items()}
            fixed = rule({p: math.exp(value) for p, value in chosen.items()}, step)
            for p in fixed:
                ids[p] = candidates[p]
                logprobs[p - len(prompt)] = chosen[p]
                steps[p - len(prompt)] = step
            unknown = [p for p in unknown if p not in fixed]
            step += 1
    answer = ids[len(prompt) :][:new_tokens]
    stops = [i for i, token in enumerate(answer) if token in stop_ids]
    count = stops[0] if stops else len(answer)
    return Generated(answer[:count], logprobs[:count], steps[:count])


def sglang_low_confidence(threshold: float) -> Rule:
    """All positions above the threshold, else the most confident one."""

    def rule(confidence: Mapping[int, float], step: int) -> list[int]:
        return _above(confidence, threshold) or _best(confidence, 1)

    return rule


def llada2(block: int, steps: int, threshold: float) -> Rule:
    """All positions above the threshold if they fill the step's quota, else the quota's best."""
    quotas = _quotas(block, steps)

    def rule(confidence: Mapping[int, float], step: int) -> list[int]:
        above = _above(confidence, threshold)
        return above if len(above) >= quotas[step] else _best(confidence, quotas[step])

    return rule


def sdar_sequential(block: int, steps: int) -> Rule:
    """The leftmost positions, a step's quota of them."""
    quotas = _quotas(block, steps)

    def rule(confidence: Mapping[int, float], step: int) -> list[int]:
        return list(confidence)[: quotas[step]]

    return rule


def sdar_static(block: int, steps: int) -> Rule:
    """The most confident positions, a step's quota of them."""
    quotas = _quotas(block, steps)

    def rule(confidence: Mapping[int, float], step: int) -> list[int]:
        return _best(confidence, quotas[step])

    return rule


sdar_dynamic = llada2
"""The same rule; only the published defaults differ (block 4, steps 4, threshold 0.85)."""


def _quotas(block: int, steps: int) -> list[int]:
    """How many positions each step must fix: the block over the steps, the first ones one more."""
    return [block // steps + (step < block % steps) for step in range(steps)]


def _above(confidence: Mapping[int, float], threshold: float) -> list[int]:
    return [p for p, value in confidence.items() if value > threshold]


def _best(confidence: Mapping[int, float], count: int) -> list[int]:
    """The most confident positions; of equals, the first."""
    return sorted(confidence, key=lambda p: (-confidence[p], p))[:count]
