"""What SGLang's `/generate` is asked for.

Names and meanings are those of SGLang's `GenerateReqInput` and `SamplingParams`. Fields that would
change the answer and are not supported are refused, others ignored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from isomoe.engine import SamplingParams
from isomoe.engine.sampling_params import MAX_LOGPROBS
from isomoe.errors import RequestError
from isomoe.server.bounds import MAX_BIASES, MAX_CHOICES, MAX_N, MAX_STOP, MAX_STOP_TOKENS
from isomoe.server.http import TokenIds, at_most, check_nesting

T = TypeVar("T")


def _refuse(value: Any) -> Any:
    if value:
        raise ValueError("is not supported")
    return value


Unsupported = Annotated[Any, AfterValidator(_refuse)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Top = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Start = Annotated[int, Field(ge=-1)]


class SamplingFields(BaseModel):
    """`sampling_params`; null is the default, but for `max_new_tokens`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    max_new_tokens: Count | None = Field(128, description="null: as many as the context holds")
    min_new_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, at_most(MAX_BIASES)] = None
    sampling_seed: int | None = None
    stop: str | Annotated[Texts, Field(max_length=MAX_STOP)] | None = None
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    denoising_strategy: str | None = None
    denoising_steps: int | None = None
    confidence_threshold: float | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    ebnf: Unsupported = None
    structural_tag: Unsupported = None
    stop_regex: Unsupported = None
    no_stop_trim: Unsupported = None

    def params(
        self, defaults: Mapping[str, Any], context_length: int, **more: Any
    ) -> SamplingParams:
        """The engine's own, with `more` of its fields, and `defaults` for what is left open.

        Raises:
            RequestError: if a value is out of range.
        """
        unlimited = self.max_new_tokens is None
        schema = self.json_schema
        if isinstance(schema, str):
            check_nesting(schema.encode(), "json_schema")
        elif schema is not None:
            schema = msgspec.json.encode(schema).decode()
        fields: dict[str, Any] = {
            "max_tokens": context_length if unlimited else self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": None if self.logit_bias is None else _pairs(self.logit_bias),
            "seed": self.sampling_seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "json_schema": schema,
            "regex": self.regex,
            "denoising_strategy": self.denoising_strategy,
            "denoising_steps": self.denoising_steps,
            "confidence_threshold": self.confidence_threshold,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return SamplingParams(**{**defaults, **given, **more})


class GenerateRequest(BaseModel):
    """A prompt, or a batch of them, as `text` or as `input_ids`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    text: str | Texts | None = None
    input_ids: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] | None = None
    sampling_params: (
        SamplingFields | Annotated[list[SamplingFields], Field(fail_fast=True)] | None
    ) = None
    rid: str | Texts | None = None
    return_logprob: bool | Annotated[list[bool], Field(fail_fast=True)] | None = None
    logprob_start_len: Start | Annotated[list[Start], Field(fail_fast=True)] | None = Field(
        None, description="the first prompt token to score; -1: the output alone"
    )
    top_logprobs_num: Top | Annotated[list[Top], Field(fail_fast=True)] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    token_ids_logprob: Unsupported = None
    input_embeds: Unsupported = None
    image_data: Unsupported = None
    video_data: Unsupported = None
    audio_data: Unsupported = None
    lora_path: Unsupported = None
    session_params: Unsupported = None
    custom_logit_processor: Unsupported = None
    return_hidden_states: Unsupported = None
    return_routed_experts: Unsupported = None

    def items(self) -> Iterator["Item"]:
        """The outputs that are asked for: those of one prompt after those of the one before.

        Raises:
            RequestError: if the fields do not fit each other.
        """
        prompts = self._prompts()
        self._check_lengths(len(prompts))
        default = SamplingFields.model_validate({})
        each = [_at(self.sampling_params, index) or default for index in range(len(prompts))]
        outputs = sum(sampling.n or 1 for sampling in each)
        if outputs > MAX_CHOICES:
            raise RequestError(
                f"{outputs} outputs of {len(prompts)} prompts are more than {MAX_CHOICES}; send "
                "several requests"
            )
        for index, (prompt, sampling) in enumerate(zip(prompts, each, strict=True)):
            n = sampling.n or 1
            for sample in range(n):
                yield Item(
                    prompt=prompt,
                    sampling=sampling,
                    rid=self._rid(index, sample, n),
                    returns_logprobs=bool(_at(self.return_logprob, index)),
                    start=_or(_at(self.logprob_start_len, index), -1),
                    top=_at(self.top_logprobs_num, index) or 0,
                )

    @property
    def is_single(self) -> bool:
        """Whether the answer is an object instead of a list of them."""
        if self._is_batch:
            return False
        sampling = _at(self.sampling_params, 0)
        return sampling is None or (sampling.n or 1) == 1

    @property
    def _is_batch(self) -> bool:
        if self.text is not None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)  # type: ignore[index]

    def _prompts(self) -> Sequence[str | list[int]]:
        given = [prompt for prompt in (self.text, self.input_ids) if prompt is not None]
        if len(given) != 1:
            raise RequestError("text, input_ids: exactly one of them must be given")
        if given[0] == []:
            raise RequestError("text, input_ids: there is no prompt in the list")
        return given[0] if self._is_batch else given  # type: ignore[return-value]

    def _check_lengths(self, prompts: int) -> None:
        for name in (
            "sampling_params",
            "rid",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
        ):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != prompts:
                raise RequestError(f"{name}: has {len(value)} entries for {prompts} prompts")

    def _rid(self, index: int, sample: int, n: int) -> str | None:
        """SGLang's: a lone text is numbered over the whole batch."""
        if isinstance(self.rid, list):
            return self.rid[index] if n == 1 else f"{self.rid[index]}_{sample}"
        if self.rid is None or self.is_single:
            return self.rid
        return f"{self.rid}_{index * n + sample}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One output that is asked for.

    Attributes:
        returns_logprobs: those of the output, and of the prompt after position `start`.
        start: position in the prompt, -1 for its last token.
        top: candidates that each token comes with.
    """

    prompt: str | list[int]
    sampling: SamplingFields
    rid: str | None
    returns_logprobs: bool
    start: int
    top: int


def _at(value: T | list[T] | None, index: int) -> T | None:
    """One prompt's own value, where every prompt may have one."""
    return value[index] if isinstance(value, list) else value


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _pairs(logit_bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = [token for token in logit_bias if not (token.isascii() and token.isdecimal())]
    if wrong:
        raise RequestError(f"logit_bias: {wrong[0][:80]!r} is not a token id")
    return tuple((int(token), bias) for token, bias in logit_bias.items())
