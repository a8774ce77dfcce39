"""What OpenAI's clients send, checked and turned into `SamplingParams`.

Ranges are checked by `SamplingParams`, token ids by the engine. Unknown fields are ignored, null is
the default, and a field that would change the output but is not supported is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from isomoe.engine import SamplingParams
from isomoe.errors import RequestError
from isomoe.server.bounds import MAX_BIASES, MAX_CHOICES, MAX_N, MAX_STOP, MAX_STOP_TOKENS
from isomoe.server.http import TokenIds, at_most, check_nesting, decode

MAX_TOP_LOGPROBS = 20
"""The most candidates beside a token of a chat, OpenAI's bound."""
_INT64 = 1 << 63
_SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "denoising_strategy",
    "denoising_steps",
    "confidence_threshold",
    "ignore_eos",
    "min_tokens",
)
"""Fields of `SamplingFields` that go to `SamplingParams` as they are."""


def _unsupported(value: Any) -> Any:
    if value:
        raise ValueError("is not supported; leave it out")
    return value


def _with_special_tokens(value: Any) -> Any:
    if value is False:
        raise ValueError("false is not supported; return_token_ids gives the special tokens")
    return value


def _stop_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """One text or list of ids, or several of one kind, as several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value):
            return [tuple(value)]
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise ValueError(
        "must be a text, token ids (integers of at most 64 bits), "
        "or a list of texts or of lists of token ids that is not empty"
    )


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and -_INT64 <= item < _INT64 for item in items)


def _content(value: Any) -> Any:
    """Content as one text; parts are joined by line breaks, as vLLM does."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            named = f"of type {kind[:40]!r}" if isinstance(kind, str) else "without a type"
            raise ValueError(f"holds a part {named}; only 'text' is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("holds a part of type 'text' whose text is no string")
        texts.append(part["text"])
    return "\n".join(texts)


Schema = dict[str, Any] | bool
Unsupported = Annotated[Any, BeforeValidator(_unsupported)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class StreamOptions(_Part):
    """Which usage a stream brings: in a last chunk, or beside every chunk too."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class NamedSchema(_Part):
    """A schema under a name, which has no effect."""

    name: str | None = None
    schema_: Schema = Field(alias="schema")


class ResponseFormat(_Part):
    """What form the output must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(_Part):
    """vLLM's way to ask for a form."""

    schema_: str | Schema | None = Field(None, alias="json")
    regex: str | None = None


class SamplingFields(_Part):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, at_most(MAX_BIASES)] = None
    stop: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None,
        BeforeValidator(_stop_texts, json_schema_input_type=str | list[str] | None),
    ] = Field(None, max_length=MAX_STOP)
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None

    denoising_strategy: str | None = None
    denoising_steps: int | None = None
    confidence_threshold: float | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None

    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: Annotated[bool | None, BeforeValidator(_with_special_tokens)] = None

    use_beam_search: Unsupported = None
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    include_stop_str_in_output: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends in a chunk with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_running_usage(self) -> bool:
        """Whether every chunk of a stream brings the usage so far."""
        options = self.stream_options
        return self.includes_usage and bool(options and options.continuous_usage_stats)

    def params(self, defaults: Mapping[str, Any], **own: Any) -> list[SamplingParams]:
        """One for each choice; with a seed, each has the next one.

        Args:
            defaults: for fields that the body leaves open.
            own: what the kinds of completion do not share; None is the default.

        Raises:
            RequestError: if a value is out of range, or two of them contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs needs stream=false")
        given = {
            **{name: getattr(self, name) for name in _SAME_NAMES},
            "logit_bias": None if self.logit_bias is None else tuple(self.logit_bias.items()),
            **own,
        }
        asked = {name: value for name, value in given.items() if value is not None}
        first = SamplingParams(**{**defaults, **asked, **self._form()})
        if self.seed is None:
            return [first] * (self.n or 1)
        seeds = [
            (self.seed + index + _INT64) % (2 * _INT64) - _INT64 for index in range(self.n or 1)
        ]
        return [replace(first, seed=seed) for seed in seeds]

    @property
    def constrains(self) -> bool:
        """Whether a form of the output is asked for."""
        return bool(self._form())

    def _form(self) -> dict[str, str]:
        asked: list[tuple[str, Any]] = []
        if (form := self.response_format) is not None:
            if form.type == "json_object":
                asked.append(("json_schema", {"type": "object"}))
            elif form.type == "json_schema":
                if form.json_schema is None:
                    raise RequestError("response_format: type 'json_schema' needs json_schema")
                asked.append(("json_schema", form.json_schema.schema_))
        if (structured := self.structured_outputs) is not None:
            if (structured.schema_ is None) == (structured.regex is None):
                raise RequestError("structured_outputs: must have one of json and regex")
            asked += [("json_schema", structured.schema_), ("regex", structured.regex)]
        asked += [("json_schema", self.guided_json), ("regex", self.guided_regex)]
        found = [(kind, value) for kind, value in asked if value is not None]
        if len(found) > 1:
            raise RequestError(
                "response_format, structured_outputs, guided_json, guided_regex: "
                "only one of them can be asked for"
            )
        for kind, value in found:
            if kind == "json_schema" and isinstance(value, str):
                check_nesting(value.encode(), kind)
        return {
            kind: value if isinstance(value, str) else json.dumps(value) for kind, value in found
        }


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Annotated[
        list[Any],
        PlainValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
    suffix: Unsupported = None

    def sampling(self, defaults: Mapping[str, Any], **own: Any) -> list[SamplingParams]:
        """As `params`, with what only this kind of completion has."""
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise RequestError(f"best_of {self.best_of}: must be n, here {n}, or left out")
        if len(self.prompt) * n > MAX_CHOICES:
            raise RequestError(
                f"prompt, n: {len(self.prompt)} prompts with {n} choices each are more than "
                f"{MAX_CHOICES} choices; send several requests"
            )
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return self.params(
            defaults,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((top for top in wanted if top is not None), default=None),
            **own,
        )


class Function(_Part):
    """A function that the model may call, as it is shown to the model."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Part):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: Function


class _Name(_Part):
    name: str


class NamedTool(_Part):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: _Name


class _CalledFunction(_Part):
    name: str
    arguments: str | dict[str, Any] = ""


class _CalledTool(_Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _CalledFunction


class TextPart(_Part):
    """A part of a message's content; there are no other kinds."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None,
        BeforeValidator(_content, json_schema_input_type=str | list[TextPart] | None),
    ] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CalledTool] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: arguments as an object, and content always a text.

        Raises:
            RequestError: if the arguments of a call are no JSON object, or there is no content
                where there must be.
        """
        if self.content is None and self.role != "assistant":
            raise RequestError(f"messages: a message of role {self.role!r} must have content")
        found = self.model_dump(exclude_none=True)
        found.setdefault("content", "")
        if self.role == "developer":
            found["role"] = "system"  # OpenAI's newer name for it; templates know the older one
        for call in found.get("tool_calls", ()):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        return found


def _arguments(given: str | dict[str, Any]) -> dict[str, Any]:
    try:
        found = decode((given or "{}").encode()) if isinstance(given, str) else given
    except RequestError:
        found = None
    if not isinstance(found, dict):
        raise RequestError("messages: the arguments of a tool call must be a JSON object")
    return found


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None

    chat_template: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    echo: Unsupported = None

    def sampling(
        self, defaults: Mapping[str, Any], context_length: int, **own: Any
    ) -> list[SamplingParams]:
        """As `params`, with what only this kind of completion has."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true")
        most = self.max_completion_tokens
        if most is None:
            most = context_length if self.max_tokens is None else self.max_tokens
        return self.params(
            defaults,
            max_tokens=most,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
            **own,
        )
