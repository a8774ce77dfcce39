"""From a step's logits to tokens and log-probabilities.  L rows of logits, V vocabulary."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isomoe.comm import Communicator
from isomoe.engine.outputs import TokenLogprob
from isomoe.engine.step import GroupOutput, Request
from isomoe.errors import EngineDeadError
from isomoe.kernels import RowSampling, logprobs, sample, top_logprobs

_SCORED_ROWS = 256
"""Rows that are turned into fp32 log-probabilities at once: bounds the memory of long prompts."""


class Draw(NamedTuple):
    """One request's rows of logits in a step.

    Attributes:
        tokens: the request's tokens so far; a sampled one is appended.
        start: position of the request's first row in the step.
        wanted: its rows of logits, its last rows in the step.
        samples: whether a token is drawn from the last one.
    """

    request: Request
    tokens: list[int]
    start: int
    wanted: int
    samples: bool


class Sampler:
    """Draws on the first rank of an attention group, and tells the others.

    Args:
        first: whether this is the first rank.
    """

    def __init__(self, comm: Communicator, first: bool) -> None:
        self._comm = comm
        self._first = first
        self._attn_tp = comm.seat.mesh.attn_tp

    def run(self, logits: Tensor, draws: Sequence[Draw]) -> GroupOutput | None:
        """Samples, and appends each token to its request.

        Args:
            logits: [L, V], the rows of the draws, in order.

        Returns:
            The group's answer on its first rank, None on the others.
        """
        output = GroupOutput()
        if self._first:
            self._score_prompts(logits, draws, output)
        drawing = [draw for draw in draws if draw.samples]
        if drawing:
            if logits.shape[0] != len(drawing):
                logits = logits.index_select(0, _last_rows(draws, logits.device))
            ids = self._draw(logits, drawing)
            output.token_ids.extend(ids.tolist())
            for draw, token in zip(drawing, output.token_ids, strict=True):
                draw.tokens.append(token)
            if self._first:
                output.logprobs.extend(_chosen(logits, ids, drawing))
        return output if self._first else None

    def _draw(self, logits: Tensor, drawing: list[Draw]) -> Tensor:
        if self._first:
            best, ids = logits.float().max(dim=-1)  # slow in bf16 on CPUs
            if not bool(best.isfinite().all()):
                raise EngineDeadError("logits are not finite: do the weights hold NaN?")
        else:
            ids = torch.empty(len(drawing), dtype=torch.int64, device=logits.device)
        if self._first and any(draw.request.params.temperature for draw in drawing):
            ids = sample(logits, [_row_sampling(draw) for draw in drawing])
        return self._comm.broadcast(ids, self._attn_tp) if self._attn_tp else ids

    def _score_prompts(self, logits: Tensor, draws: Sequence[Draw], output: GroupOutput) -> None:
        row = 0
        for draw in draws:
            request, start = draw.request, draw.start
            top = request.params.prompt_logprobs
            prompt = request.prompt_token_ids
            if top is not None and start < len(prompt):
                targets = prompt[start + 1 : start + 1 + draw.wanted]
                found: list[TokenLogprob] = []
                for at in range(0, len(targets), _SCORED_ROWS):
                    some = targets[at : at + _SCORED_ROWS]
                    piece = logits[row + at : row + at + len(some)]
                    found += _scored(piece, some, [top] * len(some))
                output.prompt_logprobs[request.request_id] = found
            row += draw.wanted


def _last_rows(draws: Sequence[Draw], device: torch.device) -> Tensor:
    """The row from which each sampling request draws."""
    rows, row = [], 0
    for draw in draws:
        row += draw.wanted
        if draw.samples:
            rows.append(row - 1)
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _row_sampling(draw: Draw) -> RowSampling:
    params = draw.request.params
    return RowSampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=draw.request.seed,
        position=len(draw.tokens),
    )


def _chosen(logits: Tensor, ids: Tensor, drawing: list[Draw]) -> list[TokenLogprob | None]:
    """The drawn tokens' logprobs, None where not asked for; empty if nobody asked."""
    tops = [draw.request.params.logprobs for draw in drawing]
    asked = [index for index, top in enumerate(tops) if top is not None]
    if not asked:
        return []
    if len(asked) < len(drawing):
        index = torch.tensor(asked, dtype=torch.int64, device=logits.device)
        logits, ids = logits.index_select(0, index), ids.index_select(0, index)
    scored = iter(_scored(logits, ids.tolist(), [top for top in tops if top is not None]))
    return [None if top is None else next(scored) for top in tops]


def _scored(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Each row's token and likeliest candidates. logits: [rows, V]."""
    every = logprobs(logits)
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    own = every.gather(1, index.unsqueeze(1)).squeeze(1).tolist()
    most = min(max(tops), logits.shape[1])
    if not most:
        return [TokenLogprob(*pair) for pair in zip(tokens, own, strict=True)]
    values, ids = top_logprobs(every, most)
    return [
        TokenLogprob(token, logprob, tuple(zip(row_ids[:top], row_values[:top], strict=True)))
        for token, logprob, top, row_ids, row_values in zip(
            tokens, own, tops, ids.tolist(), values.tolist(), strict=True
        )
    ]
