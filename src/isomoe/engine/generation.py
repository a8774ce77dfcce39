"""How a request's tokens come about: which rows it runs next, and what the answer does to it.

A class for each kind of generation, for the scheduler. No torch, no model. What it says to the
workers is the rows alone; `residents` has their side of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from isomoe.engine.outputs import FinishReason, TokenLogprob
from isomoe.engine.step import Request


class Rows(NamedTuple):
    """What a request runs in a step.

    Attributes:
        tokens: its rows.
        wanted: how many of the last ones get logits.
        drawn: from how many of the last ones a token is drawn.
        scored: how many of its rows count as `Limits.max_scored_rows` does.
    """

    tokens: int
    wanted: int
    drawn: int
    scored: int = 0


class Brought(NamedTuple):
    """What an answer brings a request.

    Attributes:
        token_ids: new tokens of its output.
        logprobs: one for each, if asked for.
        reason: why it ends; None if it goes on.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: FinishReason | None = None


NOTHING = Brought()


class Generation(ABC):
    """One request's tokens, from its prompt to its end.

    Attributes:
        tokens: prompt and output so far, as far as `take` was told.
        computed: those whose keys are cached for good, a step's included once it is scheduled.
        length: the places in the KV cache that its next rows reach.
        end: its tokens when all that it may have are generated.
        decodes: whether it has one row in each step from here on, so that `decode` schedules it.
        under_way: scheduled steps with rows of it that `take` was not told of.
    """

    __slots__ = ("computed", "decodes", "end", "length", "request", "tokens", "under_way")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt_token_ids)
        self.computed = 0
        self.length = len(self.tokens)
        self.end = len(self.tokens) + request.max_tokens
        self.decodes = False
        self.under_way = 0

    @property
    @abstractmethod
    def can_run(self) -> bool:
        """Whether a step can have rows of it: not if they depend on one that is under way."""

    @property
    @abstractmethod
    def reusable(self) -> int:
        """Its first tokens that need not be computed if their keys are cached."""

    @abstractmethod
    def decode(self) -> None:
        """Schedules the one row of a request that decodes."""

    @abstractmethod
    def rows(self, most: int, most_scored: int) -> Rows | None:
        """Schedules its next rows; None if it has none within these bounds."""

    @abstractmethod
    def take(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> Brought:
        """Takes in a step's answer: a token for each row that was drawn from.

        Args:
            logprobs: of the same rows, None where not asked for; empty if nobody asked.
        """

    def rewind(self) -> None:
        """Its pages are gone; it starts again with the tokens that it has."""
        self.computed = 0
        self.decodes = False


class Autoregressive(Generation):
    """One token after the other: the last row of the tokens so far gives the next one.

    `length` counts the tokens that steps under way will sample.
    """

    __slots__ = ("_unscored",)

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        params = request.params
        # The first prompt row whose logits are still wanted; None if none is.
        self._unscored: int | None = None
        if params.prompt_logprobs is not None:
            self._unscored = max(0, params.prompt_logprobs_start - 1)

    @property
    def can_run(self) -> bool:
        return self.computed < self.length and not (self.decodes and self.length >= self.end)

    @property
    def reusable(self) -> int:
        most = len(self.tokens) - 1
        return most if self._unscored is None else min(most, self._unscored)

    def decode(self) -> None:
        self.computed += 1
        self.length += 1
        self.under_way += 1

    def rows(self, most: int, most_scored: int) -> Rows | None:
        begin = self.computed
        tokens = min(len(self.tokens) - begin, most)
        if self._unscored is not None:
            tokens = min(tokens, max(0, self._unscored - begin) + most_scored)
            if not tokens:
                return None
        self.computed += tokens
        self.under_way += 1
        last = self.computed == len(self.tokens) and self.end > len(self.tokens)
        wanted, scored = int(last), 0
        if self._unscored is not None and self.computed > self._unscored:
            wanted = scored = self.computed - max(begin, self._unscored)
            done = self.computed >= len(self.request.prompt_token_ids)
            self._unscored = None if done else self.computed
        if last:
            self.decodes = True
            self.length += 1
        return Rows(tokens, wanted, int(last), scored)

    def take(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> Brought:
        self.under_way -= 1
        if not token_ids:
            if self.computed == len(self.tokens) == self.end and not self.under_way:
                return Brought(reason=FinishReason.LENGTH)
            return NOTHING
        (token,) = token_ids
        self.tokens.append(token)
        reason = None
        if token in self.request.stop_ids:
            reason = FinishReason.STOP
        elif len(self.tokens) >= self.end:
            reason = FinishReason.LENGTH
        found = tuple([one for one in logprobs if one is not None]) if logprobs else ()
        return Brought((token,), found, reason)
