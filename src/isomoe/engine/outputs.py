"""What a request gets back."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class TokenLogprob(NamedTuple):
    """The log-probability of one token: log_softmax of the raw logits, in fp32.

    Attributes:
        token_id: the token.
        logprob: its own.
        top: the most likely tokens in its place, likeliest first: (token id, logprob).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Update:
    """What a step brought one request.

    Attributes:
        token_ids: the new tokens: one, or those of a block; none where the step brought prompt
            logprobs alone, or the end of a request that asks for no token.
        finish_reason: None if it goes on.
        cached_tokens: prompt tokens found in the prefix cache, with the first tokens.
        logprobs: one for each new token, if asked for.
        prompt_logprobs: those of further prompt tokens, if asked for.
    """

    request_id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a request has brought since the last one.

    Attributes:
        text: ready to be shown; text that may yet turn out to begin a stop text is held back.
        token_ids: new tokens of the output.
        logprobs: one for each of them, if asked for.
        prompt_logprobs: those of further prompt tokens, if asked for; the prompt's first token
            has none.
        finish_reason: None if it goes on.
        stop_reason: the stop token or stop text that ended it; None for the model's end token.
        cached_tokens: prompt tokens found in the prefix cache, told once.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        prompt: the text, where the prompt was given as text.
        prompt_token_ids: the prompt as the model saw it.
        text: the output's text, cut before a stop text; empty without a tokenizer.
        token_ids: the output; the token that ended it is included.
        finish_reason: `stop` for an end token or a stop text, `length` for max_tokens or the
            context length, `abort` for one that was ended early.
        stop_reason: the stop token or stop text that ended it; None for the model's end token.
        logprobs: one for each output token, if asked for.
        prompt_logprobs: one for each prompt token from `prompt_logprobs_start` on, None for the
            prompt's first, if asked for.
        cached_tokens: prompt tokens that were found in the prefix cache.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0

    def to_json(self) -> dict[str, object]:
        """The same as plain lists and dicts."""
        out: dict[str, object] = {
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": str(self.finish_reason),
            "stop_reason": self.stop_reason,
            "cached_tokens": self.cached_tokens,
        }
        if self.logprobs is not None:
            out["logprobs"] = [_to_json(token) for token in self.logprobs]
        if self.prompt_logprobs is not None:
            out["prompt_logprobs"] = [token and _to_json(token) for token in self.prompt_logprobs]
        return out


def _to_json(token: TokenLogprob) -> dict[str, object]:
    return {
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top": [list(candidate) for candidate in token.top],
    }
