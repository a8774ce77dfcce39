"""Calls of tools: how they are found in a model's output, and how one is forced."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec

from isomoe.engine.reply import overlap
from isomoe.errors import RequestError
from isomoe.server.http import decode
from isomoe.server.openai.protocol import ChatRequest, Function, NamedTool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


Found = list[str | ToolCall]
"""What a text holds, in order: content, and calls."""


class Parser(Protocol):
    """Takes an output in pieces, cut anywhere, and says what it holds."""

    def feed(self, text: str) -> Found:
        """What is certain with this piece."""

    def end(self) -> Found:
        """The rest, when no more text comes."""


class QwenParser:
    """Finds calls in Qwen's form: `<tool_call>`, a JSON object, `</tool_call>`.

    A call is found when it is complete, and the white space around it is dropped. The tags are
    never content; what stands between them is, if it is not a call. A tag in a JSON string counts
    as a tag.
    """

    def __init__(self) -> None:
        self._held = ""
        self._gap: str | None = None  # white space before an open tag; None outside
        self._after_call = False

    def feed(self, text: str) -> Found:
        self._held += text
        found: Found = []
        while self._step(found):
            pass
        return found

    def end(self) -> Found:
        found: Found = []
        if self._gap is not None:
            self._take_body(self._held[: len(self._held) - overlap(self._held, _CLOSE)], found)
        elif self._held and not (self._after_call and self._held.isspace()):
            found.append(self._held)
        self._held, self._gap = "", None
        return found

    def _step(self, found: Found) -> bool:
        """Takes what is certain up to the next tag; False if there is none."""
        if self._gap is not None:
            body, closed, rest = self._held.partition(_CLOSE)
            if closed:
                self._held = rest
                self._take_body(body, found)
                self._gap = None
            return bool(closed)
        if self._after_call:
            self._held = self._held.lstrip()
        before, opened, rest = self._held.partition(_OPEN)
        certain = before if opened else before[: len(before) - overlap(before, _OPEN)]
        content = certain.rstrip()
        if content:
            found.append(content)
            self._after_call = False
        if opened:
            self._gap = certain[len(content) :]
            self._held = rest
        else:
            self._held = self._held[len(content) :]
        return bool(opened)

    def _take_body(self, body: str, found: Found) -> None:
        call = _as_call(_decoded(body))
        if call is not None:
            found.append(call)
        elif content := f"{self._gap}{body}":
            found.append(content)
        self._after_call = call is not None


class NamedParser:
    """The whole output is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pieces: list[str] = []

    def feed(self, text: str) -> Found:
        self._pieces.append(text)
        return []

    def end(self) -> Found:
        return [ToolCall(self._name, "".join(self._pieces))]


class ListParser:
    """The whole output is a JSON list of calls; one that was cut is content."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def feed(self, text: str) -> Found:
        self._pieces.append(text)
        return []

    def end(self) -> Found:
        text = "".join(self._pieces)
        listed = _decoded(text)
        calls = [_as_call(item) for item in listed] if isinstance(listed, list) else [None]
        whole = [call for call in calls if call is not None]
        return [*whole] if len(whole) == len(calls) else [text]


def _decoded(text: str) -> Any:
    """The JSON value; None if it is none."""
    try:
        return decode(text.encode())
    except RequestError:
        return None


def _as_call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict | str):
        return None
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return ToolCall(name, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request's tools mean for its prompt and its output.

    Attributes:
        shown: the tools as the template gets them; None without.
        parser: makes a parser for one choice; None if the output is only content.
        json_schema: what the output must satisfy, if a call is demanded.
        finish_reason: how a choice with a call ends, where the model ended it.
    """

    shown: list[dict[str, Any]] | None = None
    parser: Callable[[], Parser] | None = None
    json_schema: str | None = None
    finish_reason: str = "tool_calls"


def tool_use(body: ChatRequest) -> ToolUse:
    """Follows tool_choice; without it, the model may call the tools that there are.

    Raises:
        RequestError: if the choice does not fit the tools, or the form of the output.
    """
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if choice == "none":
        return ToolUse()
    if not body.tools:
        raise RequestError("tool_choice needs tools")
    functions = [tool.function for tool in body.tools]
    shown = [
        {"type": "function", "function": function.model_dump(exclude_unset=True)}
        for function in functions
    ]
    if choice == "auto":
        return ToolUse(shown=shown, parser=QwenParser)
    if body.constrains:
        raise RequestError("tool_choice: a demanded call leaves no room for another output format")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        schemas = [_parameters(function) for function in functions if function.name == name]
        if not schemas:
            raise RequestError(f"tool_choice: no tool is named {name[:80]!r}")
        return ToolUse(
            shown=shown,
            parser=partial(NamedParser, name),
            json_schema=json.dumps(schemas[0]),
            finish_reason="stop",  # as OpenAI does
        )
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    schema = {**_list_of_calls(functions), **most}
    return ToolUse(shown=shown, parser=ListParser, json_schema=json.dumps(schema))


def _parameters(function: Function) -> dict[str, Any]:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    return nothing if function.parameters is None else function.parameters


def _list_of_calls(functions: Sequence[Function]) -> dict[str, Any]:
    """The schema of a list of calls. Definitions move to its root, where references seek them."""
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = dict(_parameters(function))
        own = parameters.pop("$defs", {})
        if not isinstance(own, dict):
            raise RequestError("tools: $defs of a function's parameters must be an object")
        for name in own.keys() & definitions.keys():
            if own[name] != definitions[name]:
                raise RequestError(f"tools: two functions define $defs {name[:80]!r} differently")
        definitions.update(own)
        call = {"name": {"const": function.name}, "arguments": parameters}
        calls.append({"type": "object", "properties": call, "required": [*call]})
    items = {"anyOf": calls}
    return {"type": "array", "minItems": 1, "items": items, "$defs": definitions}
