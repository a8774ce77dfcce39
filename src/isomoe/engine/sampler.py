"""From a step's logits to tokens and log-probabilities.  L rows of logits, V vocabulary.

Penalties, biases and grammars adjust the logits that tokens are drawn from. The logprobs that are
reported are those of the model's own logits, as vLLM's `raw_logprobs`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isomoe.comm import Communicator
from isomoe.engine.adjuster import Adjuster
from isomoe.engine.grammar import GrammarFactory
from isomoe.engine.outputs import TokenLogprob
from isomoe.engine.step import GroupOutput, Request
from isomoe.errors import EngineDeadError
from isomoe.kernels import RowSampling, logprobs, sample, top_logprobs
from isomoe.kernels.sampling import RowAdjustment, adjust

_SCORED_ROWS = 256
"""Rows that are turned into fp32 log-probabilities at once: bounds the memory of long prompts."""


class Draw(NamedTuple):
    """One request's rows of logits in a step.

    Attributes:
        tokens: the request's tokens so far, prompt and output; a sampled one is appended.
        start: position of its first row that has logits. The prompt tokens that follow those
            rows are scored, if asked for.
        wanted: how many rows of logits it has.
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
        grammars: for requests that have one; used on the first rank alone.
    """

    def __init__(self, comm: Communicator, first: bool, grammars: GrammarFactory) -> None:
        self._comm = comm
        self._first = first
        self._grammars = grammars
        self._known: set[int] = set()
        self._adjusters: dict[int, Adjuster] = {}
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

    def forget(self, request_id: int) -> None:
        """Drops what is kept of a request. Should it return, its tokens tell all again."""
        self._known.discard(request_id)
        self._adjusters.pop(request_id, None)

    def _draw(self, logits: Tensor, drawing: list[Draw]) -> Tensor:
        if self._first:
            best, ids = logits.float().max(dim=-1)  # slow in bf16 on CPUs
            if not bool(best.isfinite().all()):
                raise EngineDeadError("logits are not finite: do the weights hold NaN?")
            adjusted = self._adjustments(drawing, logits.shape[1])
            if adjusted:
                found = adjust(_rows(logits, list(adjusted)), list(adjusted.values()))
                ids[list(adjusted)] = sample(found, [_row_sampling(drawing[i]) for i in adjusted])
            warm = [
                index
                for index, draw in enumerate(drawing)
                if draw.request.params.temperature and index not in adjusted
            ]
            if warm:
                found = sample(_rows(logits, warm), [_row_sampling(drawing[i]) for i in warm])
                ids[warm] = found
        else:
            ids = torch.empty(len(drawing), dtype=torch.int64, device=logits.device)
        return self._comm.broadcast(ids, self._attn_tp) if self._attn_tp else ids

    def _adjustments(self, drawing: list[Draw], vocab_size: int) -> dict[int, RowAdjustment]:
        """By row, for those that are not drawn from the model's own logits."""
        for draw in drawing:
            if draw.request.request_id not in self._known:
                self._meet(draw.request, vocab_size)
        found: dict[int, RowAdjustment] = {}
        if self._adjusters:
            for index, draw in enumerate(drawing):
                adjuster = self._adjusters.get(draw.request.request_id)
                adjustment = None if adjuster is None else adjuster.next(draw.tokens)
                if adjustment is not None:
                    found[index] = adjustment
        return found

    def _meet(self, request: Request, vocab_size: int) -> None:
        self._known.add(request.request_id)
        if request.params.adjusts_logits:
            self._adjusters[request.request_id] = Adjuster(request, vocab_size, self._grammars)

    def _score_prompts(self, logits: Tensor, draws: Sequence[Draw], output: GroupOutput) -> None:
        row = 0
        for draw in draws:
            request, first = draw.request, draw.start + 1
            top = request.params.prompt_logprobs
            if top is not None and first < len(request.prompt_token_ids):
                targets = request.prompt_token_ids[first : first + draw.wanted]
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


def _rows(logits: Tensor, indices: list[int]) -> Tensor:
    if len(indices) == logits.shape[0]:
        return logits
    return logits.index_select(0, torch.tensor(indices, device=logits.device))


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
