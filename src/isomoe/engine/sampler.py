"""From a step's logits to tokens and log-probabilities.  L rows of logits, V vocabulary.

Penalties, biases and grammars adjust the logits that tokens are drawn from. The logprobs that are
reported are those of the model's own logits, as vLLM's `raw_logprobs`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from isomoe.comm import Communicator
from isomoe.engine.adjuster import Adjuster
from isomoe.engine.draw import BlockDraw, Draw
from isomoe.engine.grammar import GrammarFactory
from isomoe.engine.outputs import TokenLogprob
from isomoe.engine.step import GroupOutput, Request
from isomoe.engine.transfer import Later, to_device, to_host
from isomoe.errors import EngineDeadError
from isomoe.kernels import RowSampling, chosen_logprobs, greedy, logprobs, sample, top_logprobs
from isomoe.kernels.sampling import RowAdjustment, adjust

_SCORED_ROWS = 256
"""Rows that are turned into fp32 log-probabilities at once: bounds the memory of long prompts."""


Scores = Callable[[], list[TokenLogprob]]
Answer = Later[GroupOutput]
"""A group's answer to a step, once its device has it."""


class Sampled(NamedTuple):
    """What a step's sampling has been told to do.

    Attributes:
        ids: [rows drawn from] int64, the drawn tokens, on the device; None if nobody samples.
        answer: what the group answers; None on a rank that does not answer, or knows no tokens.
    """

    ids: Tensor | None
    answer: Answer | None


class Sampler:
    """Draws on the first rank of an attention group, and tells the others.

    Args:
        first: whether this is the first rank.
        grammars: for requests that have one; used on the first rank alone.
        keeps_tokens: whether the next step finds the drawn tokens on the device. The host then
            hears of them when it waits for the answer; else before `launch` returns.
    """

    def __init__(
        self,
        comm: Communicator,
        first: bool,
        grammars: GrammarFactory,
        keeps_tokens: bool = False,
    ) -> None:
        self._comm = comm
        self._first = first
        self._grammars = grammars
        self._keeps_tokens = keeps_tokens
        self._known: set[int] = set()
        self._adjusters: dict[int, Adjuster] = {}
        self._attn_tp = comm.seat.mesh.attn_tp
        self._open: deque[Answer] = deque()

    def launch(self, logits: Tensor, draws: Sequence[Draw]) -> Sampled:
        """Tells the device to sample and to score; waits for it only where a draw depends on it.

        Args:
            logits: [L, V], the rows of the draws, in order; what follows them is padding.
        """
        scores = self._score_prompts(logits, draws) if self._first else {}
        drawing = [draw for draw in draws if draw.samples]
        ids, finite, chosen = None, None, None
        if drawing:
            if sum([draw.samples for draw in drawing]) < logits.shape[0]:
                logits = _last_rows(logits, draws)
            ids, finite = self._draw(logits, drawing)
            if self._first:
                chosen = _chosen(logits, ids, drawing)
        if not self._first and self._keeps_tokens:
            return Sampled(ids, None)  # the tokens stay on the device
        host_ids = None if ids is None else to_host(ids)
        host_finite = None if finite is None else to_host(finite)

        def answer() -> GroupOutput:
            output = GroupOutput()
            if host_finite is not None and not bool(host_finite.all()):
                raise EngineDeadError("logits are not finite: do the weights hold NaN?")
            if host_ids is not None:
                output.token_ids.extend(host_ids.tolist())
                at = 0
                for draw in drawing:
                    draw.take(output.token_ids[at : at + draw.samples])
                    at += draw.samples
            if chosen is not None:
                output.logprobs.extend(chosen(output.token_ids))
            for request_id, pieces in scores.items():
                found = [token for piece in pieces for token in piece()]
                output.prompt_logprobs[request_id] = found
            return output

        later = Later(answer, logits.device)
        if not self._keeps_tokens:
            later.wait()
        elif ids is not None:
            self._open.append(later)
        return Sampled(ids, later if self._first else None)

    def forget(self, request_id: int) -> None:
        """Drops what is kept of a request. Should it return, its tokens tell all again."""
        self._known.discard(request_id)
        self._adjusters.pop(request_id, None)

    def _draw(self, logits: Tensor, drawing: list[Draw]) -> tuple[Tensor, Tensor | None]:
        """The tokens, and on the first rank whether their logits were finite."""
        if not self._first:
            ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
            return self._comm.broadcast(ids, self._attn_tp), None
        ids, finite = greedy(logits)
        rows = [(draw, index) for draw in drawing for index in range(draw.samples)]
        adjusted = self._adjustments(drawing, logits.shape[1])
        if adjusted:
            found = adjust(_rows(logits, list(adjusted)), list(adjusted.values()))
            found = sample(found, [_row_sampling(rows[i]) for i in adjusted])
            ids.index_copy_(0, to_device(list(adjusted), torch.int64, ids.device), found)
        warm = [
            index
            for index, (draw, _) in enumerate(rows)
            if draw.request.params.temperature and index not in adjusted
        ]
        if warm:
            found = sample(_rows(logits, warm), [_row_sampling(rows[i]) for i in warm])
            if len(warm) == len(rows):
                ids = found
            else:
                ids.index_copy_(0, to_device(warm, torch.int64, ids.device), found)
        if isinstance(drawing[0], BlockDraw):  # then they all are
            ids = _settled(ids, logits, drawing)
        return self._comm.broadcast(ids, self._attn_tp) if self._attn_tp else ids, finite

    def _adjustments(self, drawing: list[Draw], vocab_size: int) -> dict[int, RowAdjustment]:
        """By row, for those that are not drawn from the model's own logits.

        Only requests with one row to draw from can ask for that.
        """
        for draw in drawing:
            if draw.request.request_id not in self._known:
                self._meet(draw.request, vocab_size)
        asked = [
            (index, self._adjusters[draw.request.request_id])
            for index, draw in enumerate(drawing)
            if draw.request.request_id in self._adjusters
        ]
        wait = any(adjuster.needs_tokens for _, adjuster in asked)
        while self._open and (wait or self._open[0].ready):
            self._open.popleft().wait()
        found: dict[int, RowAdjustment] = {}
        for index, adjuster in asked:
            adjustment = adjuster.next(drawing[index].tokens)
            if adjustment is not None:
                found[index] = adjustment
        return found

    def _meet(self, request: Request, vocab_size: int) -> None:
        self._known.add(request.request_id)
        if request.params.adjusts_logits:
            self._adjusters[request.request_id] = Adjuster(request, vocab_size, self._grammars)

    def _score_prompts(self, logits: Tensor, draws: Sequence[Draw]) -> dict[int, list[Scores]]:
        """By request, its scored prompt tokens in pieces, for when they have arrived."""
        row = 0
        scores: dict[int, list[Scores]] = {}
        for draw in draws:
            request, first = draw.request, draw.start + 1
            top = request.params.prompt_logprobs
            if top is not None and first < len(request.prompt_token_ids):
                targets = request.prompt_token_ids[first : first + draw.wanted]
                pieces: list[Scores] = []
                for at in range(0, len(targets), _SCORED_ROWS):
                    some = targets[at : at + _SCORED_ROWS]
                    piece = logits[row + at : row + at + len(some)]
                    ids = to_device(some, torch.int64, logits.device)
                    scored = _scored(piece, ids, [top] * len(some))
                    pieces.append(partial(scored, some))
                scores[request.request_id] = pieces
            row += draw.wanted
        return scores


def _last_rows(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The rows from which requests draw."""
    rows: list[int] = []
    row = 0
    for draw in draws:
        row += draw.wanted
        rows.extend(range(row - draw.samples, row))
    if rows == list(range(len(rows))):
        return logits[: len(rows)]
    return logits.index_select(0, to_device(rows, torch.int64, logits.device))


def _rows(logits: Tensor, indices: list[int]) -> Tensor:
    if len(indices) == logits.shape[0]:
        return logits
    return logits.index_select(0, to_device(indices, torch.int64, logits.device))


def _row_sampling(row: tuple[Draw, int]) -> RowSampling:
    draw, index = row
    return draw.row_sampling(index)


def _settled(ids: Tensor, logits: Tensor, drawing: Sequence[Draw]) -> Tensor:
    """The tokens of blocks, -1 where a candidate is not sure enough yet."""
    candidates, confidence = ids.tolist(), chosen_logprobs(logits, ids).exp().tolist()
    settled: list[int] = []
    for draw in drawing:
        assert isinstance(draw, BlockDraw)
        own = slice(len(settled), len(settled) + draw.samples)
        settled += draw.settled(candidates[own], confidence[own])
    return to_device(settled, torch.int64, ids.device)


def _chosen(
    logits: Tensor, ids: Tensor, drawing: list[Draw]
) -> Callable[[Sequence[int]], list[TokenLogprob | None]] | None:
    """From the drawn tokens to their logprobs; None if nobody asked.

    None stands where not asked for, and where a mask stays.
    """
    tops = [draw.request.params.logprobs for draw in drawing for _ in range(draw.samples)]
    asked = [index for index, top in enumerate(tops) if top is not None]
    if not asked:
        return None
    if len(asked) < len(tops):
        index = to_device(asked, torch.int64, logits.device)
        logits, ids = logits.index_select(0, index), ids.index_select(0, index)
    scored = _scored(logits, ids.clamp(min=0), [top for top in tops if top is not None])

    def chosen(tokens: Sequence[int]) -> list[TokenLogprob | None]:
        found = dict(zip(asked, scored([tokens[index] for index in asked]), strict=True))
        return [None if token < 0 else found.get(row) for row, token in enumerate(tokens)]

    return chosen


def _scored(
    logits: Tensor, ids: Tensor, tops: Sequence[int]
) -> Callable[[Sequence[int]], list[TokenLogprob]]:
    """From each row's token to it and the likeliest candidates, once the device has them.

    logits: [rows, V]; ids: [rows] int64, the tokens, which the host may not know yet.
    """
    most = min(max(tops), logits.shape[1])
    if not most:
        own = to_host(chosen_logprobs(logits, ids))
        return lambda tokens: [
            TokenLogprob(*pair) for pair in zip(tokens, own.tolist(), strict=True)
        ]
    every = logprobs(logits)
    own = to_host(every.gather(1, ids.unsqueeze(1)).squeeze(1))
    values, candidates = map(to_host, top_logprobs(every, most))

    def scored(tokens: Sequence[int]) -> list[TokenLogprob]:
        columns = zip(tokens, own.tolist(), tops, candidates.tolist(), values.tolist(), strict=True)
        return [
            TokenLogprob(token, logprob, tuple(zip(row_ids[:top], row_values[:top], strict=True)))
            for token, logprob, top, row_ids, row_values in columns
        ]

    return scored
