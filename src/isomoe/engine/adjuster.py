"""What one request asks of the logits that its tokens are drawn from."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from isomoe.engine.grammar import GrammarFactory
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.step import Request
from isomoe.kernels.sampling import RowAdjustment, RowPenalties, pack_bits


class Adjuster:
    """Follows one request's tokens, and says how its next row of logits is adjusted.

    All that it knows follows from the request and its tokens, so that another one can take over
    at any time.
    """

    def __init__(self, request: Request, vocab_size: int, grammars: GrammarFactory) -> None:
        params = request.params
        self._prompt_len = len(request.prompt_token_ids)
        self._taken = 0
        self._min_tokens = params.min_tokens
        self._bias = _bias(params)
        self._counts = _TokenCounts(request) if params.has_penalties else None
        self._unended: Tensor | None = None
        if params.min_tokens and 0 < len(request.stop_ids) < vocab_size:
            self._unended = _all_but(request.stop_ids, vocab_size)
        self._matcher = grammars.matcher(params) if params.has_grammar else None

    @property
    def needs_tokens(self) -> bool:
        """Whether the next adjustment depends on the tokens before; a bias alone does not."""
        counts, ends = self._counts is not None, self._unended is not None
        return counts or self._matcher is not None or (ends and self._taken < self._min_tokens)

    def next(self, tokens: Sequence[int]) -> RowAdjustment | None:
        """How the row is adjusted from which the token after `tokens`, prompt and output, comes.

        None leaves it as it is.
        """
        new = tokens[self._prompt_len + self._taken :]
        self._taken += len(new)
        if self._counts is not None:
            self._counts.add(new)
        if self._matcher is not None:
            self._matcher.advance(new)
        penalties = None if self._counts is None else self._counts.penalties()
        allowed = self._allowed()
        if self._bias is None and penalties is None and allowed is None:
            return None
        return RowAdjustment(bias=self._bias, penalties=penalties, allowed=allowed)

    def _allowed(self) -> Tensor | None:
        """The tokens that may be drawn; None if all may, or none could.

        A grammar that is complete ends an output even before `min_tokens`.
        """
        unended = self._unended if self._taken < self._min_tokens else None
        if self._matcher is None:
            return unended
        matching = self._matcher.allowed()
        if unended is not None and (matching & unended).any():
            return matching & unended
        return matching if matching.any() else None


class _TokenCounts:
    """The distinct tokens that penalties apply to, and how often the output holds each."""

    def __init__(self, request: Request) -> None:
        self._params = request.params
        # The others apply to the output alone.
        repeats = self._params.repetition_penalty != 1.0
        self._ids = array("q", dict.fromkeys(request.prompt_token_ids) if repeats else ())
        self._counts = array("q", bytes(8 * len(self._ids)))
        self._slots = {token: slot for slot, token in enumerate(self._ids)}

    def add(self, token_ids: Sequence[int]) -> None:
        """Counts further tokens of the output."""
        for token in token_ids:
            slot = self._slots.setdefault(token, len(self._ids))
            if slot == len(self._ids):
                self._ids.append(token)
                self._counts.append(0)
            self._counts[slot] += 1

    def penalties(self) -> RowPenalties | None:
        """None as long as there are no tokens."""
        if not self._ids:
            return None
        return RowPenalties(
            # Copies: an array cannot grow while a tensor shares its memory.
            token_ids=torch.frombuffer(self._ids, dtype=torch.int64).clone(),
            counts=torch.frombuffer(self._counts, dtype=torch.int64).clone(),
            presence=self._params.presence_penalty,
            frequency=self._params.frequency_penalty,
            repetition=self._params.repetition_penalty,
        )


def _bias(params: SamplingParams) -> tuple[Tensor, Tensor] | None:
    if not params.logit_bias:
        return None
    token_ids, values = zip(*params.logit_bias, strict=True)
    return torch.tensor(token_ids, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)


def _all_but(token_ids: frozenset[int], vocab_size: int) -> Tensor:
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[[token for token in token_ids if token < vocab_size]] = False
    return pack_bits(allowed)
