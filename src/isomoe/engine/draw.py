"""What the requests of a step ask of its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from isomoe.engine.diffusion import UNKNOWN, Draft, fixed
from isomoe.engine.step import Request
from isomoe.kernels import RowSampling

_STEP_STRIDE = 1 << 40
"""Beyond every position: the draws of one place in different steps must not be the same."""


@dataclass(slots=True, eq=False)
class Draw:
    """One request's rows of logits in a step.

    Attributes:
        tokens: the request's tokens as far as the host knows them, prompt and output; a sampled
            one is appended when it arrives.
        start: position of its first row that has logits. The prompt tokens that follow those
            rows are scored, if asked for.
        wanted: how many rows of logits it has.
        samples: from how many of the last ones a token is drawn.
    """

    request: Request
    tokens: list[int]
    start: int
    wanted: int
    samples: int

    def row_sampling(self, index: int) -> RowSampling:
        """How the token of the row at `index`, of those that are drawn from, is drawn."""
        return self._sampling(self.start + self.wanted)

    def take(self, token_ids: Sequence[int]) -> None:
        """Takes the answer in: a token for each row that was drawn from."""
        self.tokens += token_ids

    def _sampling(self, position: int) -> RowSampling:
        params = self.request.params
        return RowSampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self.request.seed,
            position=position,
        )


@dataclass(slots=True, eq=False)
class BlockDraw(Draw):
    """The rows of a request's open block: each draws a candidate for its own place."""

    draft: Draft

    def row_sampling(self, index: int) -> RowSampling:
        return self._sampling(self.start + index + self.draft.step * _STEP_STRIDE)

    def take(self, token_ids: Sequence[int]) -> None:
        self.draft.take(token_ids)

    def settled(self, candidates: Sequence[int], confidence: Sequence[float]) -> list[int]:
        """The candidates that become tokens; UNKNOWN at the other places of the block.

        Args:
            candidates, confidence: for each place, a token and its probability.
        """
        chosen = set(fixed(confidence, self.draft, self.request.params))
        return [token if place in chosen else UNKNOWN for place, token in enumerate(candidates)]
