"""What a request asks of the sampler; vLLM's names and meanings."""

from dataclasses import dataclass

from isomoe.errors import RequestError

MAX_LOGPROBS = 100
"""The most candidates a token may come with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled.

    Attributes:
        max_tokens: the most tokens to generate; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_p: the nucleus; 1 is off.
        top_k: the most likely tokens to draw from; -1 or 0 is off.
        min_p: least probability, as a share of the most likely token's; 0 is off.
        seed: makes the draws reproducible; None takes one from the engine's seed.
        stop: texts at which to end; the output text is cut before them.
        stop_token_ids: tokens at which to end, besides the model's own.
        ignore_eos: do not end at the model's own end tokens.
        logprobs: candidates that each output token comes with, beside itself; 0 gives the
            token's own logprob alone, None gives none.
        prompt_logprobs: the same for each token of the prompt.
        detokenize: make text of the output. Without it no tokenizer is loaded for a prompt of ids.

    Raises:
        RequestError: if a value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # type: ignore[unreachable]
            raise RequestError(f"stop {self.stop!r}: must be a tuple of strings")
        for name in ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise RequestError(f"{name} {value!r}: must be an integer")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise RequestError(f"{name} {value!r}: must be a number")
        for wrong, name, need in (
            (self.max_tokens < 0, "max_tokens", "at least 0"),
            (not 0.0 <= self.temperature < float("inf"), "temperature", "at least 0 and finite"),
            (not 0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (self.top_k < -1, "top_k", "-1 or 0 (off) or positive"),
            (not 0.0 <= self.min_p <= 1.0, "min_p", "from 0 to 1"),
            (not _in_range(self.logprobs), "logprobs", f"from 0 to {MAX_LOGPROBS}"),
            (not _in_range(self.prompt_logprobs), "prompt_logprobs", f"from 0 to {MAX_LOGPROBS}"),
            (any(not text for text in self.stop), "stop", "made of texts that are not empty"),
        ):
            if wrong:
                raise RequestError(f"{name} {getattr(self, name)!r}: must be {need}")
        if self.stop and not self.detokenize:
            raise RequestError("stop needs detokenize=True, since it is sought in the text")


def _in_range(count: int | None) -> bool:
    return count is None or 0 <= count <= MAX_LOGPROBS
