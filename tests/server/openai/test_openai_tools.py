"""Tool calls in an output: found wherever it is cut, and demanded where the request says so."""

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.errors import RequestError
from isomoe.server.openai.protocol import ChatRequest
from isomoe.server.openai.tools import (
    Found,
    ListParser,
    NamedParser,
    Parser,
    QwenParser,
    ToolCall,
    tool_use,
)

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<x>"}}\n</tool_call>'
ADD = ToolCall("add", '{"a":1,"b":"<x>"}')


def read(parser: Parser, *pieces: str) -> Found:
    """What the pieces hold, neighbouring content joined."""
    found: Found = []
    for part in [*(part for piece in pieces for part in parser.feed(piece)), *parser.end()]:
        assert part != "", "nothing is found as an empty text"
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("  just text \n", ["  just text \n"]),
        (CALL, [ADD]),
        (f"I add.\n\n{CALL}\n", ["I add.", ADD]),
        (f"{CALL}\n{CALL}", [ADD, ADD]),
        (f"{CALL} Done. ", [ADD, "Done. "]),
        (f"{CALL}\n\nThen\n{CALL}", [ADD, "Then", ADD]),
        ('<tool_call>{"name":"now"}</tool_call>', [ToolCall("now", "{}")]),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
        # Cut by the token limit: a whole object is a call, a part of one is content.
        (CALL.removesuffix("</tool_call>"), [ADD]),
        (CALL.removesuffix("ll>"), [ADD]),
        ('<tool_call>\n{"name": "ad', ['\n{"name": "ad']),
        ("a < b <tool_cal", ["a < b <tool_cal"]),
        # Not calls: content without the tags.
        ("x <tool_call>{oops}</tool_call> y", ["x {oops} y"]),
        ("<tool_call>[1]</tool_call>", ["[1]"]),
        ('<tool_call>{"name": 5}</tool_call>', ['{"name": 5}']),
        ('<tool_call>{"name": "f", "arguments": NaN}</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', None),
        (f'<tool_call>{{"name": "f", "arguments": {"[" * 5000}</tool_call>', None),
        ("<tool_call></tool_call>", []),
        ("</tool_call>", ["</tool_call>"]),
    ],
)
def test_what_a_text_holds_wherever_it_is_cut(text: str, found: list[Any] | None) -> None:
    expected = read(QwenParser(), text)
    if found is None:  # no call, and the body is content
        found = [text.removeprefix("<tool_call>").removesuffix("</tool_call>")]
    assert expected == found
    for at in range(min(len(text), 200)):
        assert read(QwenParser(), text[:at], text[at:]) == expected
    assert read(QwenParser(), *text) == expected


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<", " ", "\n", "a", CALL, '{"name":']
)


@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_cuts_change_nothing(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(QwenParser(), *pieces) == read(QwenParser(), text)


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", " ", "\n", "a"])).map("".join))
def test_without_a_call_only_tags_are_lost(text: str) -> None:
    untagged = re.sub(r"<tool_call>(.*?)(?:</tool_call>|$)", r"\1", text, flags=re.DOTALL)
    assert read(QwenParser(), text) == ([untagged] if untagged else [])


@pytest.mark.parametrize("arguments", ["{}", '{"city": "Bern"}', '{"cut": '])
def test_a_named_call_has_the_whole_output_as_its_arguments(arguments: str) -> None:
    assert read(NamedParser("f"), *arguments) == [ToolCall("f", arguments)]


def test_a_list_of_calls_is_read_whole() -> None:
    text = '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
    assert read(ListParser(), *text) == [ToolCall("f", '{"a":1}'), ToolCall("g", "{}")]


@pytest.mark.parametrize("text", ['[{"name": "f", "argu', "{}", '[{"name": "f"}, 3]'])
def test_what_is_no_list_of_calls_is_content(text: str) -> None:
    assert read(ListParser(), *text) == [text]


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
WITH_DEFINITION = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/Point"}},
    "required": ["at"],
    "$defs": {"Point": POINT},
}


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "description": name.title(), "strict": True}
    return {
        "type": "function",
        "function": found | ({"parameters": parameters} if parameters else {}),
    }


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "?"}], **fields})


def test_tools_are_shown_as_they_were_sent() -> None:
    tools = [function("move", WITH_DEFINITION), function("stop")]
    use = tool_use(request(tools=tools))
    assert use.shown == tools
    assert use.parser is QwenParser
    assert use.json_schema is None


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "none"}, {"tools": []}])
def test_without_tools_the_output_is_content(fields: dict[str, Any]) -> None:
    use = tool_use(request(**fields))
    assert use.parser is None
    assert use.shown is None


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    use = tool_use(request(tools=[function("f")], tool_choice="none"))
    assert use.shown is None
    assert use.parser is None


def test_a_demanded_call_satisfies_the_schema_of_its_function() -> None:
    tools = [function("move", WITH_DEFINITION), function("stop"), function("go", POINT)]
    use = tool_use(request(tools=tools, tool_choice="required"))
    assert use.json_schema is not None
    schema = json.loads(use.json_schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    good = [
        {"name": "move", "arguments": {"at": {"x": 1}}},
        {"name": "stop", "arguments": {}},
        {"name": "go", "arguments": {"x": 1}},
    ]
    jsonschema.validate(good, schema)
    for bad in (
        [],
        [{"name": "other", "arguments": {}}],
        [{"name": "move", "arguments": {"at": {"x": "1"}}}],
        [{"name": "stop", "arguments": {"x": 1}}],
        [{"name": "go"}],
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_only_one_call_is_allowed_where_they_may_not_be_parallel() -> None:
    fields = {"tools": [function("stop")], "tool_choice": "required", "parallel_tool_calls": False}
    call = {"name": "stop", "arguments": {}}
    schema = json.loads(tool_use(request(**fields)).json_schema or "")
    jsonschema.validate([call], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([call, call], schema)


def test_a_named_call_satisfies_its_parameters() -> None:
    named = {"type": "function", "function": {"name": "move"}}
    use = tool_use(request(tools=[function("move", WITH_DEFINITION)], tool_choice=named))
    assert json.loads(use.json_schema or "") == WITH_DEFINITION
    assert use.parser is not None
    assert read(use.parser(), "{}") == [ToolCall("move", "{}")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "auto"}, "tool_choice needs tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice needs tools"),
        (
            {"tools": [function("f")], "tool_choice": {"function": {"name": "g"}}},
            "tool_choice: no tool is named 'g'",
        ),
        (
            {
                "tools": [function("f")],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice: a demanded call leaves no room for another output format",
        ),
        (
            {
                "tools": [
                    function("f", WITH_DEFINITION),
                    function("g", {**WITH_DEFINITION, "$defs": {"Point": {"type": "string"}}}),
                ],
                "tool_choice": "required",
            },
            "tools: two functions define $defs 'Point' differently",
        ),
        (
            {"tools": [function("f", {"$defs": 5})], "tool_choice": "required"},
            "tools: $defs of a function's parameters must be an object",
        ),
    ],
)
def test_a_choice_that_cannot_be_followed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        tool_use(request(**fields))
    assert str(refused.value) == message
