"""From bodies to sampling parameters, and bodies that are refused."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from isomoe.engine import SamplingParams
from isomoe.errors import RequestError
from isomoe.server.openai.protocol import MAX_STOP, ChatRequest, CompletionRequest

CONTEXT = 1024
DEEP = '{"items":' * 150 + "{}" + "}" * 150
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **fields})


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


def params(**fields: Any) -> SamplingParams:
    (only,) = completion(**fields).sampling({})
    return only


def chat_params(**fields: Any) -> SamplingParams:
    (only,) = chat(**fields).sampling({}, CONTEXT)
    return only


def test_defaults_are_openais() -> None:
    assert params() == SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0)
    assert chat_params() == SamplingParams(max_tokens=CONTEXT, temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_null_is_the_default_and_unknown_fields_are_ignored(model: type) -> None:
    required = {"prompt", "messages"}
    nulls = {name: None for name in model.model_fields if name not in required}  # type: ignore[attr-defined]
    body = completion if model is CompletionRequest else chat
    assert body(**nulls, user="me", store=True) == body()


def test_every_field_reaches_the_sampler() -> None:
    same = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "min_tokens": 3,
        "max_tokens": 9,
    }
    sent = {
        **same,
        "stop": ["a", "b"],
        "stop_token_ids": [4, 5],
        "logit_bias": {"3": -100, "14": 2.5},
        "prompt_logprobs": 2,
    }
    wanted = {
        **same,
        "stop": ("a", "b"),
        "stop_token_ids": (4, 5),
        "logit_bias": ((3, -100.0), (14, 2.5)),
        "prompt_logprobs": 2,
    }
    assert params(**sent, logprobs=1) == SamplingParams(**wanted, logprobs=1)
    assert chat_params(**sent, logprobs=True, top_logprobs=1) == SamplingParams(
        **wanted, logprobs=1
    )


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": []}, {}),
        ({"best_of": 1}, {}),
        ({"suffix": ""}, {}),
        ({"echo": True, "logprobs": 3}, {"logprobs": 3, "prompt_logprobs": 3}),
        ({"echo": True}, {}),
        (
            {"echo": True, "logprobs": 3, "prompt_logprobs": 5},
            {"logprobs": 3, "prompt_logprobs": 5},
        ),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type": "object"}'}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json_schema": json.dumps(SCHEMA)},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": json.dumps(SCHEMA)}),
        ({"structured_outputs": {"regex": "[0-9]+"}}, {"regex": "[0-9]+"}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}),
        ({"guided_regex": "a|b"}, {"regex": "a|b"}),
    ],
)
def test_a_completion_asks_the_sampler_for(sent: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert params(**sent) == SamplingParams(**wanted)


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False}, {}),
        ({"top_logprobs": 0}, {}),
        ({"guided_json": True}, {"json_schema": "true"}),
    ],
)
def test_a_chat_asks_the_sampler_for(sent: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert chat_params(**sent) == SamplingParams(**{"max_tokens": CONTEXT, **wanted})


def test_each_choice_has_the_next_seed() -> None:
    seeds = [each.seed for each in completion(n=3, seed=7).sampling({})]
    assert seeds == [7, 8, 9]
    highest = 2**63 - 1
    assert [each.seed for each in chat(n=2, seed=highest).sampling({}, CONTEXT)] == [
        highest,
        -(2**63),
    ]


def test_choices_without_a_seed_draw_their_own() -> None:
    assert [each.seed for each in completion(n=2).sampling({})] == [None, None]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_a_prompt_is_one_or_several(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": None},
        {"prompt": 3},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": ["a", [1]]},
        {"prompt": [True]},
        {"prompt": [1.0]},
        {"prompt": [2**64]},
        {"prompt": [[1], ["a"]]},
        {"n": 0},
        {"n": 129},
        {"n": 10**30},
        {"n": "many"},
        {"seed": 2**63},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": "x"}},
        {"logit_bias": [1]},
        {"stop": 5},
        {"stop": ["a"] * (MAX_STOP + 1)},
        {"stop_token_ids": ["x"]},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"logit_bias": {str(token): 1 for token in range(5000)}},
        {"suffix": "end"},
        {"use_beam_search": True},
        {"allowed_token_ids": [1]},
        {"guided_choice": ["a"]},
        {"skip_special_tokens": False},
    ],
)
def test_a_body_of_another_form_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        completion(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_of": 2}, "best_of 2: must be n, here 1, or left out"),
        ({"stream_options": {}}, "stream_options needs stream=true"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs needs stream=false"),
        ({"prompt": ["a"] * 9, "n": 128}, "send several requests"),
        ({"logprobs": 101}, "logprobs 101: must be from 0 to 100"),
        ({"max_tokens": -1}, "max_tokens -1"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty 2.5: must be from -2 to 2"),
        ({"logit_bias": {"1": 101}}, "from -100 to 100"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema"),
        ({"guided_json": DEEP}, "json_schema is nested more than 100 deep"),
        ({"structured_outputs": {"json": DEEP}}, "json_schema is nested more than 100 deep"),
        ({"structured_outputs": {}}, "must have one of json and regex"),
        ({"structured_outputs": {"json": "{}", "regex": "a"}}, "must have one of json and regex"),
        ({"guided_regex": "a", "guided_json": "{}"}, "only one of them"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "only one of them"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        completion(**fields).sampling({})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.status == 400


def test_top_logprobs_of_a_chat_are_bounded_and_need_logprobs() -> None:
    with pytest.raises(ValidationError):
        chat(logprobs=True, top_logprobs=21)
    with pytest.raises(RequestError, match="top_logprobs needs logprobs=true"):
        chat(top_logprobs=1).sampling({}, CONTEXT)


def templated(message: dict[str, Any]) -> dict[str, Any]:
    return ChatRequest.model_validate({"messages": [message]}).messages[0].for_template()


def test_messages_are_what_templates_read() -> None:
    assert templated({"role": "user", "content": "a", "name": "n"}) == {
        "role": "user",
        "content": "a",
        "name": "n",
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert templated({"role": "user", "content": parts})["content"] == "a\nb"
    assert templated({"role": "developer", "content": "a"})["role"] == "system"
    assert templated({"role": "tool", "content": "4", "tool_call_id": "c"})["tool_call_id"] == "c"


@pytest.mark.parametrize("arguments", ['{"a": [1]}', {"a": [1]}])
def test_the_arguments_of_earlier_calls_are_objects(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    found = templated({"role": "assistant", "content": None, "tool_calls": [call]})
    assert found["content"] == ""
    assert found["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": [1]}}


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"a": NaN}', DEEP, "[" * 10_000])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError, match="arguments of a tool call must be a JSON object"):
        templated({"role": "assistant", "tool_calls": [call]})


@pytest.mark.parametrize(
    "message",
    [
        {},
        "hello",
        {"role": "user", "content": 5},
        {"role": "robot", "content": "x"},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": [{"type": {"a": 1}, "text": "x"}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
    ],
)
def test_a_message_of_another_form_is_refused(message: Any) -> None:
    with pytest.raises(ValidationError):
        templated(message)


def test_only_the_assistant_may_say_nothing() -> None:
    assert templated({"role": "assistant"})["content"] == ""
    with pytest.raises(RequestError, match="a message of role 'user' must have content"):
        templated({"role": "user"})


def test_an_image_is_refused_by_its_name() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(ValidationError, match="a part of type 'image_url'; only 'text'"):
        templated({"role": "user", "content": [image]})


def test_a_chat_has_a_message() -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": []})


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function"}],
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "retrieval", "function": {"name": "f"}}],
        [{"type": "function", "function": {"name": "f", "parameters": "x"}}],
        "f",
    ],
)
def test_tools_of_another_form_are_refused(tools: Any) -> None:
    with pytest.raises(ValidationError):
        chat(tools=tools)


def test_a_temperature_near_the_end_of_fp32_is_refused() -> None:
    with pytest.raises(RequestError, match=r"temperature 1e[+]39: must be from 0 to 1e[+]06"):
        completion(temperature=1e39).sampling({})


def test_what_the_body_leaves_open_is_the_models_own() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    (open_,) = completion().sampling(defaults)
    (said,) = completion(temperature=0.0).sampling(defaults)
    assert (open_.temperature, open_.top_k) == (0.6, 20)
    assert (said.temperature, said.top_k) == (0.0, 20)
    (chatted,) = chat(top_k=-1).sampling(defaults, CONTEXT)
    assert (chatted.temperature, chatted.top_k) == (0.6, -1)
