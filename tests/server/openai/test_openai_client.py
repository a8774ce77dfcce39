"""The `openai` client against a real server."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
from idle import wait_idle
from openai.types.chat import ChatCompletionMessageParam

from isomoe.engine import LLM, SamplingParams
from isomoe.eval.tasks import Arith, Problem, read_problems
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint
from servers import Server, running

PROBLEMS = read_problems(bundled_checkpoint() / "heldout.jsonl")[:4]
PROMPT = Arith().prompt(PROBLEMS[0])
"""Its answer ends by itself."""


def ask(problem: Problem) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": problem.question}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_checkpoint())


def test_the_model_is_listed_with_its_context_length(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "arith-moe"
    assert model.to_dict()["max_model_len"] == 1024
    assert client.models.retrieve("arith-moe") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_a_chat_solves_a_problem(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="arith-moe", messages=ask(PROBLEMS[0]), temperature=0
    )
    (choice,) = reply.choices
    assert Arith().is_right(PROBLEMS[0], choice.message.content or "") == (True, True)
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_what_the_reply_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "arith-moe",
        "messages": ask(PROBLEMS[1]),
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        streamed = stream.get_final_completion()
    (one,), (other,) = reply.choices, streamed.choices
    assert other.message.content == one.message.content
    assert other.finish_reason == one.finish_reason == "stop"
    assert one.logprobs is not None
    assert other.logprobs is not None
    assert one.logprobs.content is not None
    assert other.logprobs.content is not None
    tokens = [token.token for token in one.logprobs.content]
    assert [token.token for token in other.logprobs.content] == tokens
    assert "".join(tokens) == f"{one.message.content}<|im_end|>"
    assert all(len(token.top_logprobs) == 2 for token in one.logprobs.content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in one.logprobs.content)
    assert reply.usage is not None
    assert streamed.usage is not None
    assert streamed.usage.completion_tokens == reply.usage.completion_tokens == len(tokens)


def test_completions_equal_the_offline_engines(client: openai.OpenAI) -> None:
    prompts = [Arith().prompt(problem) for problem in PROBLEMS]
    reply = client.completions.create(
        model="arith-moe",
        prompt=prompts,
        temperature=0,
        max_tokens=200,
        logprobs=1,
        extra_body={"return_token_ids": True},
    )
    with LLM() as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=200, logprobs=1))
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for choice, output in zip(reply.choices, outputs, strict=True):
        assert choice.text == output.text
        assert choice.finish_reason == output.finish_reason
        assert choice.to_dict()["token_ids"] == [*output.token_ids]
        assert choice.to_dict()["prompt_token_ids"] == [*output.prompt_token_ids]
        assert choice.logprobs is not None
        assert output.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(
            [token.logprob for token in output.logprobs], abs=1e-2
        )  # another batch adds up in another order


def test_a_prompt_can_be_text_or_token_ids(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(PROMPT)]
    asked: dict[str, Any] = {"model": "arith-moe", "temperature": 0, "max_tokens": 12}
    forms: list[Any] = [PROMPT, [PROMPT], ids, [ids]]
    texts = {client.completions.create(prompt=form, **asked).choices[0].text for form in forms}
    assert len(texts) == 1


def test_a_seed_decides_and_choices_differ(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "arith-moe", "prompt": "A", "max_tokens": 12}
    one, same, other = (
        client.completions.create(seed=seed, **asked).choices[0].text for seed in (5, 5, 6)
    )
    assert one == same != other
    choices = client.completions.create(seed=5, n=4, **asked).choices
    assert len({choice.text for choice in choices}) == 4


def test_streams_of_several_prompts_and_choices_are_told_apart(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "arith-moe",
        "prompt": [Arith().prompt(problem) for problem in PROBLEMS[:2]],
        "n": 2,
        "temperature": 0,
        "max_tokens": 200,
    }
    whole = client.completions.create(**asked)
    texts = [""] * 4
    reasons: list[str | None] = [None] * 4
    usage = None
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["stop"] * 4
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_an_echoed_prompt_is_scored(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(PROMPT)]
    reply = client.completions.create(
        model="arith-moe", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    (choice,) = reply.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert choice.text.startswith(PROMPT)
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset is not None
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text.startswith(token, offset)
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    (scored,) = client.completions.create(
        model="arith-moe", prompt=ids, echo=True, logprobs=1, max_tokens=0
    ).choices
    assert scored.text == PROMPT
    assert scored.logprobs is not None
    assert scored.logprobs.tokens == logprobs.tokens[:-1]
    assert len(scored.logprobs.token_logprobs or ()) == len(ids)


def test_stop_texts_end_a_completion(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "arith-moe", "prompt": PROMPT, "temperature": 0}
    asked["max_tokens"] = 200
    whole = client.completions.create(**asked).choices[0].text
    (choice,) = client.completions.create(**asked, stop=["####", "never"]).choices
    assert choice.text == whole.partition("####")[0]
    assert choice.finish_reason == "stop"
    assert choice.to_dict()["stop_reason"] == "####"
    streamed = [*client.completions.create(**asked, stop="####", stream=True)]
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_a_bias_decides(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (seven,) = tokenizer.encode("7")
    reply = client.completions.create(
        model="arith-moe", prompt="A", max_tokens=4, logit_bias={str(seven): 100}
    )
    assert reply.choices[0].text == "7777"


def test_a_stop_token_ends_a_completion_and_is_told(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "arith-moe",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 20,
    }
    extras = {"return_token_ids": True, "top_k": 5, "min_p": 0.1}
    ids: Any = client.completions.create(**asked, extra_body=extras).choices[0].to_dict()
    ids = ids["token_ids"]
    stop = ids[10]
    at = ids.index(stop) + 1
    extras = {"return_token_ids": True, "stop_token_ids": [stop]}
    choice = client.completions.create(**asked, extra_body=extras).choices[0].to_dict()
    assert choice["token_ids"] == ids[:at]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    extras |= {"min_tokens": at + 1}
    choice = client.completions.create(**asked, extra_body=extras).choices[0].to_dict()
    assert len(choice["token_ids"]) > at  # type: ignore[arg-type]


def test_a_prompt_is_scored_in_vllms_form(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    reply = client.completions.create(
        model="arith-moe", prompt=PROMPT, max_tokens=0, extra_body={"prompt_logprobs": 0}
    )
    first, *scored = reply.choices[0].to_dict()["prompt_logprobs"]  # type: ignore[misc]
    assert first is None
    ids = tokenizer.encode(PROMPT)
    assert [[*one] for one in scored] == [[str(token)] for token in ids[1:]]


def test_the_end_token_can_be_ignored(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="arith-moe",
        prompt=PROMPT,
        temperature=0,
        max_tokens=200,
        extra_body={"ignore_eos": True},
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 200


SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "answer": {"type": "integer", "minimum": 0, "maximum": 9999},
        "unit": {"enum": ["miles", "grams", "dollars"]},
    },
    "required": ["steps", "answer", "unit"],
    "additionalProperties": False,
}


def test_json_satisfies_its_schema(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="arith-moe",
        messages=ask(PROBLEMS[0]),
        n=4,
        seed=3,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        },
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="arith-moe",
        messages=ask(PROBLEMS[0]),
        seed=3,
        temperature=0.5,
        response_format={"type": "json_object"},
    )
    (choice,) = reply.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)
    else:
        assert (choice.message.content or "").lstrip().startswith("{")


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name}.",
            "parameters": {
                "type": "object",
                "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["count"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]
CALL = r'Well\.\n<tool_call>\n\{"name": "time", "arguments": \{"count": [0-9]\}\}\n</tool_call>'


def test_a_call_in_the_output_is_a_tool_call(client: openai.OpenAI) -> None:
    """The output is made one by a regular expression: the checkpoint knows no tools."""
    asked: dict[str, Any] = {
        "model": "arith-moe",
        "messages": ask(PROBLEMS[0]),
        "tools": TOOLS,
        "extra_body": {"guided_regex": CALL},
    }
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "time"
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[1]["function"]["parameters"])
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.content == "Well."
    assert streamed.message.tool_calls is not None
    assert streamed.message.tool_calls[0].function.name == "time"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_demanded_call_is_made(client: openai.OpenAI, choice: Any) -> None:
    reply = client.chat.completions.create(
        model="arith-moe",
        messages=ask(PROBLEMS[0]),
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        seed=1,
    )
    message = reply.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.function.name in (["weather"] if isinstance(choice, dict) else ["weather", "time"])
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])


def test_many_at_once_are_answered_as_one_alone(server: Server) -> None:
    async def answers(at_once: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            several = asyncio.Semaphore(at_once)

            async def answer(problem: Problem) -> str:
                async with several:
                    text = ""
                    async for chunk in await client.chat.completions.create(
                        model="arith-moe", messages=ask(problem), temperature=0, stream=True
                    ):
                        text += chunk.choices[0].delta.content or ""
                    return text

            return await asyncio.gather(*(answer(problem) for problem in PROBLEMS))

    assert asyncio.run(answers(4)) == asyncio.run(answers(1))


def test_a_cached_prompt_is_counted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "arith-moe", "prompt": PROMPT + " again", "max_tokens": 1}
    client.completions.create(**asked)
    usage = client.completions.create(**asked).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    assert 0 < cached < usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [[1], [640]]}, openai.BadRequestError, None),
        ({"prompt": "A " * 2000}, openai.BadRequestError, None),
        ({"prompt": [-1], "echo": True}, openai.BadRequestError, None),
        ({"prompt": [2**40], "echo": True}, openai.BadRequestError, None),
        ({"prompt": [7] * 9000, "echo": True}, openai.BadRequestError, None),
        ({"prompt": [[7] * 900] * 500, "echo": True, "logprobs": 10}, openai.BadRequestError, None),
        ({"temperature": 1e39}, openai.BadRequestError, None),
        ({"temperature": -1}, openai.BadRequestError, None),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"logit_bias": {"640": 1}}, openai.BadRequestError, None),
        ({"extra_body": {"guided_regex": "("}}, openai.BadRequestError, None),
        ({"extra_body": {"guided_json": {"type": "thing"}}}, openai.BadRequestError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_by_its_class_in_one_line(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str | None,
    stream: bool,
) -> None:
    with pytest.raises(error) as refused:
        client.completions.create(
            **{"model": "arith-moe", "prompt": "A", "stream": stream, **fields}
        )
    body: Any = refused.value.body
    assert body["message"]
    assert "\n" not in body["message"]
    assert body["param"] == param
    assert body["code"] == ("model_not_found" if error is openai.NotFoundError else None)


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xc3("}]}',
        b'{"messages": ' + b"[" * 100_000,
        json.dumps({**CHAT, "temperature": float("nan")}).encode(),
        json.dumps({**CHAT, "seed": 10**40}).encode(),
        json.dumps({**CHAT, "max_tokens": -(10**40)}).encode(),
        json.dumps({**CHAT, "top_logprobs": 10**40, "logprobs": True}).encode(),
        json.dumps({**CHAT, "chat_template_kwargs": {"self": 1}}).encode(),
        json.dumps({**CHAT, "messages": [{"role": "user", "content": None}]}).encode(),
        (json.dumps({**CHAT, "tools": "@"}).replace('"@"', "[" * 900 + "]" * 900)).encode(),
    ],
)
def test_a_malformed_body_is_a_bad_request(server: Server, body: bytes) -> None:
    reply = httpx2.post(f"{server.url}/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_ends_its_requests(server: Server, client: openai.OpenAI) -> None:
    def aborted() -> float:
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
        name = 'isomoe_requests_total{outcome="abort"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = aborted()
    asked: dict[str, Any] = {"model": "arith-moe", "prompt": "A", "n": 4, "max_tokens": 1000}
    asked["extra_body"] = {"ignore_eos": True}
    stream = client.completions.create(**asked, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**asked)
    wait_idle(server, 20)
    assert aborted() == before + 8


TEMPLATE = """{%- if tools %}Tools: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] -%}
{{ call.function.name }} {{ call.function.arguments.count }}
{% endfor %}{% endfor %}{% if style is defined %}({{ style }}){% endif %}"""


def test_tools_and_calls_reach_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "time", "arguments": '{"count": 3}'},
    }
    messages: list[Any] = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Noon"},
    ]
    with (
        running("--chat-template", str(file)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        reply = client.chat.completions.create(
            model=server.model,
            messages=messages,
            tools=TOOLS,
            max_tokens=1,
            extra_body={"return_token_ids": True, "chat_template_kwargs": {"style": "brief"}},
        )
    ids: Any = reply.to_dict()["prompt_token_ids"]
    assert tokenizer.decode(ids) == (
        f"Tools: {json.dumps(TOOLS)}\n"
        "user: What time is it?\nassistant: \ntime 3\ntool: Noon\n(brief)"
    )
