"""From what a user asks to a request that the engine can serve, or a reason why not."""

from collections.abc import Sequence
from itertools import count
from random import Random

from isomoe.engine.diffusion import check_request
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.scheduler import Limits
from isomoe.engine.step import Request
from isomoe.errors import RequestError
from isomoe.tokenizer import Tokenizer


class Intake:
    """Checks every request before the engine hears of it. Threads may share one.

    Args:
        random_seed: where the seeds of requests without one come from.
    """

    def __init__(
        self, info: ModelInfo, limits: Limits, tokenizer: Tokenizer, random_seed: int
    ) -> None:
        self.info = info
        self.limits = limits
        self.tokenizer = tokenizer
        self._seeds = Random(random_seed)
        self._grammars = info.grammars()
        self._ids = count()

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            RequestError: if it is so long that it cannot fit: to find out how many tokens a text
                has takes time, and for one long word, time that grows faster than the word.
        """
        limit = self.info.context_length
        if len(text) > limit * self.tokenizer.longest_token:
            raise RequestError(
                f"a text of {len(text)} characters does not fit the context length of {limit} "
                "tokens; shorten it"
            )
        return self.tokenizer.encode(text, add_special_tokens)

    def request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """The request for a prompt.

        Raises:
            RequestError: if the prompt is empty or too long, ids are not of the vocabulary, or
                the parameters need what the checkpoint, or its kind of generation, has not.
        """
        ids = tuple(prompt_token_ids)
        if params.stop and not self.tokenizer.exists:
            raise RequestError(f"stop texts need a tokenizer; {self.info.folder} has none")
        if self.info.diffusion is not None:
            check_request(params, self.info.diffusion.block_size)
        elif params.denoises:
            raise RequestError(
                "denoising_strategy, denoising_steps, confidence_threshold: the model is no "
                "block-diffusion model; leave them out"
            )
        self.check_prompt(ids, params.max_tokens)
        self.check_ids("stop_token_ids", params.stop_token_ids)
        self.check_ids("logit_bias", [token for token, _ in params.logit_bias])
        max_tokens = min(params.max_tokens, self.info.context_length - len(ids))
        self.limits.check_fits(len(ids), max_tokens)
        self._grammars.check(params)
        end = frozenset() if params.ignore_eos else self.info.eos_token_ids
        drawn = self._seeds.getrandbits(63)
        return Request(
            request_id=next(self._ids),
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            stop_ids=end | frozenset(params.stop_token_ids),
            seed=drawn if params.seed is None else params.seed,
        )

    def check_prompt(self, ids: Sequence[int], max_tokens: int = 0) -> None:
        """Raises RequestError if the prompt is empty or too long, or not of the vocabulary."""
        if not ids:
            raise RequestError("the prompt is empty")
        limit = self.info.context_length
        if len(ids) + min(max_tokens, 1) > limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the context length is {limit} "
                "with at least one token of output; shorten the prompt"
            )
        self.check_ids("the prompt's token ids", ids)

    def check_ids(self, what: str, ids: Sequence[int]) -> None:
        """Raises RequestError unless all are token ids."""
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise RequestError(f"{what} must be integers, not {token!r}")
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.info.vocab_size:
                raise RequestError(
                    f"{what} hold {token}; the vocabulary is 0 to {self.info.vocab_size - 1}"
                )
