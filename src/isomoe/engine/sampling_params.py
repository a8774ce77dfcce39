"""What a request asks of the sampler; vLLM's names and meanings."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from isomoe.errors import RequestError

_HOTTEST = 1e6  # as good as uniform, and far from where fp32 ends
MAX_LOGPROBS = 100
"""The most candidates a token may come with."""

_INT_FIELDS = ("max_tokens", "top_k", "min_tokens", "prompt_logprobs_start")
_OPTIONAL_INT_FIELDS = ("seed", "logprobs", "prompt_logprobs", "denoising_steps")
_NUMBER_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_OPTIONAL_NUMBER_FIELDS = ("confidence_threshold",)
_BOOL_FIELDS = ("ignore_eos", "detokenize")
# A larger grammar would hold up everybody's next token while it is compiled.
_LONGEST_GRAMMAR = 1 << 17


class DenoisingStrategy(StrEnum):
    """Which masks of a block a step fixes; its quota is a share of the block for each step.

    LOW_CONFIDENCE: all whose candidates are more probable than a threshold, but at least the quota,
        the most probable first. DYNAMIC is the same: one is SGLang's name for it, one SDAR's.
    STATIC: the quota, the most probable first.
    SEQUENTIAL: the quota, from left to right.
    """

    LOW_CONFIDENCE = "low_confidence"
    DYNAMIC = "dynamic"
    STATIC = "static"
    SEQUENTIAL = "sequential"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled.

    Lists are taken as tuples, and a mapping as the pairs of `logit_bias`.

    Attributes:
        max_tokens: the most tokens to generate; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_p: the nucleus; 1 is off.
        top_k: the most likely tokens to draw from; -1 or 0 is off.
        min_p: least probability, as a share of the most likely token's; 0 is off.
        presence_penalty: taken from the logit of every token that the output holds.
        frequency_penalty: taken from a token's logit once for each time the output holds it.
        repetition_penalty: divides the positive and multiplies the negative logits of the tokens
            that prompt or output hold; 1 is off.
        logit_bias: pairs of a token id and what is added to its logit.
        seed: makes the draws reproducible; None takes one from the engine's seed.
        min_tokens: neither an end token nor a stop text ends the output before it has so many.
        stop: texts at which to end; the output text is cut before them.
        stop_token_ids: tokens at which to end, besides the model's own.
        ignore_eos: do not end at the model's own end tokens.
        json_schema: text of a JSON schema that the output satisfies if it ends by itself;
            '{"type": "object"}' asks for any JSON object.
        regex: regular expression that the output matches as a whole if it ends by itself.
        logprobs: candidates that each output token comes with, beside itself; 0 gives the
            token's own logprob alone, None gives none.
        prompt_logprobs: the same for each token of the prompt.
        prompt_logprobs_start: first position of the prompt whose logprob is wanted.
        detokenize: make text of the output. Without it no tokenizer is loaded for a prompt of ids.
        denoising_strategy: for block-diffusion models, like the next two: which masks of a block a
            step fixes; None is low_confidence.
        denoising_steps: the steps of a block, which set each one's quota; None is one for each of
            its tokens.
        confidence_threshold: a candidate more probable than this may be fixed at once; None is
            0.95. Static and sequential have none.

    Raises:
        RequestError: if a value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    json_schema: str | None = None
    regex: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    detokenize: bool = True
    denoising_strategy: DenoisingStrategy | None = None
    denoising_steps: int | None = None
    confidence_threshold: float | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        for wrong, name, need in (
            (self.max_tokens < 0, "max_tokens", "at least 0"),
            (not 0.0 <= self.temperature <= _HOTTEST, "temperature", f"from 0 to {_HOTTEST:g}"),
            (not 0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (self.top_k < -1, "top_k", "-1 or 0 (off) or positive"),
            (not 0.0 <= self.min_p <= 1.0, "min_p", "from 0 to 1"),
            (not -2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "from -2 to 2"),
            (not -2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "from -2 to 2"),
            (self.repetition_penalty <= 0.0, "repetition_penalty", "above 0"),
            (
                not 0 <= self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"from 0 to max_tokens, here {self.max_tokens}",
            ),
            (not _in_range(self.logprobs), "logprobs", f"from 0 to {MAX_LOGPROBS}"),
            (not _in_range(self.prompt_logprobs), "prompt_logprobs", f"from 0 to {MAX_LOGPROBS}"),
            (self.prompt_logprobs_start < 0, "prompt_logprobs_start", "at least 0"),
            (
                self.denoising_steps is not None and self.denoising_steps < 1,
                "denoising_steps",
                "at least 1",
            ),
            (
                not 0.0 <= (self.confidence_threshold or 0.0) <= 1.0,
                "confidence_threshold",
                "from 0 to 1",
            ),
        ):
            if wrong:
                raise RequestError(f"{name} {getattr(self, name)!r}: must be {need}")
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise RequestError("prompt_logprobs_start needs prompt_logprobs")
        if self.stop and not self.detokenize:
            raise RequestError("stop needs detokenize=True, since it is sought in the text")
        unsure = (DenoisingStrategy.STATIC, DenoisingStrategy.SEQUENTIAL)
        if self.confidence_threshold is not None and self.denoising_strategy in unsure:
            raise RequestError(
                f"confidence_threshold: denoising_strategy {self.denoising_strategy} has none"
            )
        if self.json_schema is not None:
            if self.regex is not None:
                raise RequestError("json_schema and regex: only one of them can be asked for")
            _check_schema(self.json_schema)

    @property
    def has_penalties(self) -> bool:
        """Whether any of the three penalties is on."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def has_grammar(self) -> bool:
        """Whether the output is held to a schema or a regular expression."""
        return self.json_schema is not None or self.regex is not None

    @property
    def denoises(self) -> bool:
        """Whether anything is asked for that block-diffusion models alone have."""
        asked = (self.denoising_strategy, self.denoising_steps, self.confidence_threshold)
        return any(one is not None for one in asked)

    @property
    def adjusts_logits(self) -> bool:
        """Whether tokens are drawn from logits other than the model's own."""
        return (
            self.has_penalties or bool(self.logit_bias) or self.min_tokens > 0 or self.has_grammar
        )

    def _check_kinds(self) -> None:
        for name in _INT_FIELDS + _OPTIONAL_INT_FIELDS:
            value = getattr(self, name)
            if not (_is_int(value) or (value is None and name in _OPTIONAL_INT_FIELDS)):
                raise RequestError(f"{name} {_short(value)}: must be an integer of at most 64 bits")
        for name in _NUMBER_FIELDS + _OPTIONAL_NUMBER_FIELDS:
            value = getattr(self, name)
            if not (_is_number(value) or (value is None and name in _OPTIONAL_NUMBER_FIELDS)):
                raise RequestError(f"{name} {_short(value)}: must be a finite number")
        for name in _BOOL_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} {_short(value)}: must be true or false")
        self._check_strategy()
        for name in ("json_schema", "regex"):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise RequestError(f"{name} {_short(value)}: must be text")
            if value is not None and len(value) > _LONGEST_GRAMMAR:
                raise RequestError(
                    f"{name} has {len(value)} characters, the most is {_LONGEST_GRAMMAR}"
                )
        for name, holds, of in (
            ("stop", _is_stop_text, "texts that are not empty"),
            ("stop_token_ids", _is_token_id, "token ids, integers of at least 0"),
            ("logit_bias", _is_bias, "pairs of a token id and a number from -100 to 100"),
        ):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = tuple(value.items())
            if not isinstance(value, list | tuple):
                raise RequestError(f"{name} {_short(value)}: must be a tuple of {of}")
            for item in value:
                if not holds(item):
                    raise RequestError(f"{name} holds {_short(item)}: must be {of}")
            members = tuple(tuple(item) if isinstance(item, list) else item for item in value)
            object.__setattr__(self, name, members)

    def _check_strategy(self) -> None:
        value = self.denoising_strategy
        if value is None:
            return
        if value not in list(DenoisingStrategy):
            known = ", ".join(DenoisingStrategy)
            raise RequestError(f"denoising_strategy {_short(value)}: must be one of {known}")
        object.__setattr__(self, "denoising_strategy", DenoisingStrategy(value))


def _in_range(count: int | None) -> bool:
    return count is None or 0 <= count <= MAX_LOGPROBS


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: object) -> bool:
    """Whether this is a string that can be written as UTF-8: no lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_stop_text(value: object) -> bool:
    return _is_text(value) and value != ""


def _is_token_id(value: object) -> bool:
    return _is_int(value) and value >= 0  # type: ignore[operator]


def _is_bias(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    token, bias = value
    return _is_token_id(token) and _is_number(bias) and -100 <= bias <= 100


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"json_schema {_short(text)}: cannot be read as JSON ({reason})"
        ) from None
    if not isinstance(schema, dict | bool):
        raise RequestError(f"json_schema {_short(text)}: must be an object, true or false")


def _short(value: object) -> str:
    """A value as a message shows it: one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
