"""What a request gets back."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        prompt: the text, where the prompt was given as text.
        prompt_token_ids: the prompt as the model saw it.
        text: the output's text, cut before a stop text; empty without a tokenizer.
        token_ids: the output; the token that ended it is included.
        finish_reason: `stop` for an end token or a stop text, `length` for max_tokens or the
            context length.
        logprobs: one for each output token, if asked for.
        prompt_logprobs: one for each prompt token, None for the first, if asked for.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def to_json(self) -> dict[str, object]:
        """The same as plain lists and dicts."""
        out: dict[str, object] = {
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": str(self.finish_reason),
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
