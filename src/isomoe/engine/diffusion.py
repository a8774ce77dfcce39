"""Block diffusion: a block of tokens starts as masks, and each step fixes some of them.

The sequence is cut into blocks of B absolute positions. A row sees all of its own block and all
earlier ones, and its logits are about the token at its own place. So the keys of a block's rows are
final once they have run with its final tokens: those of the prompt's whole blocks after prefill,
those of a generated block one step after its last mask has gone, beside the first step of the next
block. What is left of the prompt opens the first block.

Compared with the published loops is greedy decoding alone. Above temperature 0 a candidate is drawn
from what temperature, top-k, top-p and min-p leave; its confidence is still its probability in the
model's own logits, as its logprob is.

Sources: Arriola et al., Block Diffusion (2025); SGLang's LowConfidence; the loops published with
LLaDA2.0 and SDAR. No torch, no model.
"""

from collections.abc import Sequence

from isomoe.engine.generation import NOTHING, Brought, Generation, Rows
from isomoe.engine.outputs import FinishReason, TokenLogprob
from isomoe.engine.sampling_params import DenoisingStrategy, SamplingParams
from isomoe.engine.step import Request
from isomoe.errors import RequestError

_THRESHOLD = 0.95
UNKNOWN = -1
"""Stands for a token that is still masked."""


class Draft:
    """A request's tokens and its open block, as the scheduler and every rank follow them.

    The mask token is no sign of a mask: prompts and outputs may hold it.

    Attributes:
        tokens: prompt and output, up to the last finished block.
        block: tokens of the open block, UNKNOWN where a mask stands.
        step: how many steps have worked on it.
    """

    __slots__ = ("block", "size", "step", "tokens")

    def __init__(self, tokens: list[int], block_size: int) -> None:
        self.tokens = tokens
        self.size = block_size
        self.restart()

    @property
    def start(self) -> int:
        """The open block's first position: what comes before has its final tokens."""
        return len(self.tokens) // self.size * self.size

    @property
    def unknown(self) -> list[int]:
        """The masks, as places in the open block."""
        return [place for place, token in enumerate(self.block) if token == UNKNOWN]

    def restart(self) -> None:
        """Masks all of the open block that is not of the prompt."""
        known = self.tokens[self.start :]
        self.block = [*known, *[UNKNOWN] * (self.size - len(known))]
        self.step = 0

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Fixes masks, and opens the next block when none is left.

        Args:
            token_ids: one for each place of the block, UNKNOWN where nothing is fixed. What stands
                at a place that is no mask is not looked at.

        Returns:
            The new tokens of the block that this finishes.
        """
        for place in self.unknown:
            self.block[place] = token_ids[place]
        self.step += 1
        if UNKNOWN in self.block:
            return []
        new = self.block[len(self.tokens) - self.start :]
        self.tokens += new
        self.restart()
        return new


class BlockDiffusing(Generation):
    """Block after block, for the scheduler.

    A step has the open block's rows, all of them drawn from, once all that comes before is computed
    or in the same step. One that was retracted starts its open block again.
    """

    __slots__ = ("_awaits", "_draft", "_logprobs")

    def __init__(self, request: Request, block_size: int) -> None:
        super().__init__(request)
        self._draft = Draft(self.tokens, block_size)
        self._awaits = False
        self._logprobs: list[TokenLogprob | None] = []
        self._open()

    @property
    def can_run(self) -> bool:
        return not self._awaits

    @property
    def reusable(self) -> int:
        return self._draft.start

    def decode(self) -> None:
        raise AssertionError("a block has more rows than one")

    def rows(self, most: int, most_scored: int) -> Rows | None:
        size = self._draft.size
        final = self._draft.start - self.computed
        tokens = min(final, most // size * size)
        fits = tokens == final and tokens + size <= most and size <= most_scored
        drawn = size if fits else 0
        if not tokens + drawn:
            return None
        self.computed += tokens
        self.under_way += 1
        self._awaits = fits
        return Rows(tokens + drawn, drawn, drawn, drawn)

    def take(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> Brought:
        self.under_way -= 1
        if not token_ids or not self._awaits:  # retracted meanwhile, if it does not await any
            return NOTHING
        self._awaits = False
        for place, logprob in enumerate(logprobs):
            if token_ids[place] != UNKNOWN:
                self._logprobs[place] = logprob
        before = len(self.tokens)
        new = self._draft.take(token_ids)
        if not new:
            return NOTHING
        scored = self._logprobs[before % self._draft.size :]
        self._open()
        new, reason = self._ended(new, before)
        found = tuple([one for one in scored[: len(new)] if one is not None])
        return Brought(tuple(new), found, reason)

    def rewind(self) -> None:
        super().rewind()
        self._draft.restart()
        self._awaits = False
        self._open()

    def _open(self) -> None:
        size = self._draft.size
        self.length = self._draft.start + size
        self._logprobs = [None] * size

    def _ended(self, new: list[int], before: int) -> tuple[list[int], FinishReason | None]:
        """What of a finished block counts, and why it is the last one."""
        new = new[: self.end - before]
        stop_ids = self.request.stop_ids
        stop = next((place for place, token in enumerate(new) if token in stop_ids), None)
        if stop is not None:
            return new[: stop + 1], FinishReason.STOP
        return new, FinishReason.LENGTH if before + len(new) >= self.end else None


def fixed(confidence: Sequence[float], draft: Draft, params: SamplingParams) -> list[int]:
    """The masks that a step fixes, as places in the block; at least one.

    Args:
        confidence: for each place of the block, its candidate's probability.
    """
    unknown = draft.unknown
    quota = _quota(draft, params.denoising_steps or draft.size)
    if params.denoising_strategy is DenoisingStrategy.SEQUENTIAL:
        return unknown[:quota]
    if params.denoising_strategy is not DenoisingStrategy.STATIC:
        threshold = params.confidence_threshold
        threshold = _THRESHOLD if threshold is None else threshold
        above = [place for place in unknown if confidence[place] > threshold]
        if len(above) >= quota:
            return above
    return sorted(unknown, key=lambda place: -confidence[place])[:quota]


def _quota(draft: Draft, steps: int) -> int:
    """Places of a block that its step must fix; the first steps take what does not divide."""
    return draft.size // steps + (draft.step < draft.size % steps)


def check_request(params: SamplingParams, block_size: int) -> None:
    """Raises RequestError if block diffusion cannot do what is asked."""
    for asked, what in (
        (params.presence_penalty, "presence_penalty"),
        (params.frequency_penalty, "frequency_penalty"),
        (params.repetition_penalty != 1.0, "repetition_penalty"),
        (params.logit_bias, "logit_bias"),
        (params.min_tokens, "min_tokens"),
        (params.json_schema is not None, "json_schema"),
        (params.regex is not None, "regex"),
        (params.prompt_logprobs is not None, "prompt_logprobs"),
        (not params.max_tokens, "max_tokens 0"),
    ):
        if asked:
            raise RequestError(f"{what}: is not supported by a block-diffusion model; leave it out")
    steps = params.denoising_steps
    if steps is not None and steps > block_size:
        raise RequestError(
            f"denoising_steps {steps}: must be from 1 to the model's block size of {block_size}"
        )
