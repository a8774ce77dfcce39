"""Replies and their chunks, from an engine that brings what the test says."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import chain
from typing import Any

import msgspec
import pytest
from scripted_engine import Script, ScriptedEngine

from isomoe.engine import Delta, FinishReason, TokenLogprob
from isomoe.errors import EngineDeadError, IsomoeError, RequestError
from isomoe.server.openai.chat import chat, stream_chat
from isomoe.server.openai.completions import complete, stream_completion
from isomoe.server.openai.protocol import ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def says(*texts: str, cached: int = 0, reason: FinishReason = FinishReason.STOP) -> Script:
    """One token for each text; the last one ends it."""
    return [
        Delta(
            text=text,
            token_ids=(10 + index,),
            logprobs=(TokenLogprob(10 + index, -1.0, ((10 + index, -1.0), (5, -2.0))),),
            finish_reason=reason if index == len(texts) - 1 else None,
            cached_tokens=cached if index == 0 else 0,
        )
        for index, text in enumerate(texts)
    ]


def engine_that(script: Script | Callable[[int], Script | IsomoeError]) -> ScriptedEngine:
    return ScriptedEngine(script if callable(script) else lambda index: script)


def plain(reply: Any) -> Any:
    """As a client reads it."""
    return json.loads(msgspec.json.encode(reply))


def completion(engine: ScriptedEngine, **fields: Any) -> Any:
    body = CompletionRequest.model_validate({"prompt": "Hi", **fields})
    return plain(asyncio.run(complete(engine.as_engine(), body)))


def chat_reply(engine: ScriptedEngine, **fields: Any) -> Any:
    body = ChatRequest.model_validate({"messages": MESSAGES, **fields})
    return plain(asyncio.run(chat(engine.as_engine(), body)))


def completion_chunks(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    body = CompletionRequest.model_validate({"prompt": "Hi", "stream": True, **fields})
    return asyncio.run(_collect(stream_completion(engine.as_engine(), body)))


def chat_chunks(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    body = ChatRequest.model_validate({"messages": MESSAGES, "stream": True, **fields})
    return asyncio.run(_collect(stream_chat(engine.as_engine(), body)))


async def _collect(chunks: AsyncGenerator[Any, None]) -> list[Any]:
    return [plain(chunk) async for chunk in chunks]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return [*chain.from_iterable(lists)]


def choices(chunks: list[Any], index: int = 0) -> list[Any]:
    return [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]


def test_a_completion_has_its_choices_and_usage() -> None:
    engine = engine_that(says("a", "b", cached=1))
    reply = completion(engine)
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "text": "ab",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert reply["object"] == "text_completion"
    assert reply["model"] == "scripted"
    assert reply["id"].startswith("cmpl-")
    prompt_tokens = len(engine.tokenizer.encode("Hi"))
    assert reply["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 2,
        "total_tokens": prompt_tokens + 2,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_choices_are_ordered_by_prompt_and_a_prompt_counts_once() -> None:
    engine = engine_that(lambda index: says(f"<{index}>", cached=index))
    reply = completion(engine, prompt=[[1, 2], [3]], n=2)
    assert [choice["text"] for choice in reply["choices"]] == ["<0>", "<1>", "<2>", "<3>"]
    assert [request.prompt_token_ids for request in engine.requests] == [(1, 2), (1, 2), (3,), (3,)]
    usage = reply["usage"]
    assert usage["prompt_tokens"] == 3
    assert usage["completion_tokens"] == 4
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0 + 2


def test_chunks_make_the_same_choices_as_the_reply() -> None:
    def script(index: int) -> Script:
        scored = Delta(prompt_logprobs=(TokenLogprob(7, -3.0, ((5, -0.5),)),))
        return [scored, *says(*"abcdef"[: index + 2], reason=FinishReason.LENGTH)]

    asked: dict[str, Any] = {
        "prompt": [[6, 7], [8, 7]],
        "n": 2,
        "logprobs": 1,
        "echo": True,
        "max_tokens": 6,
        "return_token_ids": True,
    }
    whole = completion(engine_that(script), **asked)
    chunks = completion_chunks(engine_that(script), **asked)
    for choice in whole["choices"]:
        parts = choices(chunks, choice["index"])
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"] == "length"
        assert joined(part["token_ids"] for part in parts) == choice["token_ids"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert all("prompt_token_ids" not in part for part in parts[1:])
        for name, values in choice["logprobs"].items():
            assert joined(part["logprobs"][name] for part in parts) == values


def test_an_echoed_prompt_comes_first_and_whole() -> None:
    """Its logprobs come in pieces, before the first token."""
    scored = [TokenLogprob(token, -float(token), ((5, -0.5),)) for token in (21, 22, 23)]
    script = [
        Delta(prompt_logprobs=tuple(scored[:2])),
        Delta(prompt_logprobs=tuple(scored[2:])),
        *says(" a", "b"),
    ]
    asked: dict[str, Any] = {"prompt": [20, 21, 22, 23], "echo": True, "logprobs": 1}
    first, second = choices(completion_chunks(engine_that(script), **asked))
    engine = engine_that(script)
    prompt = engine.tokenizer.decode((20, 21, 22, 23))
    assert first["text"] == prompt + " a"
    assert second["text"] == "b"
    assert first["logprobs"]["token_logprobs"] == [None, -21.0, -22.0, -23.0, -1.0]
    (whole,) = completion(engine, **asked)["choices"]
    assert whole["text"] == prompt + " ab"
    logprobs = whole["logprobs"]
    assert logprobs["token_logprobs"] == [None, -21.0, -22.0, -23.0, -1.0, -1.0]
    assert logprobs["top_logprobs"][0] is None
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        if offset < len(prompt):
            assert prompt.startswith(token, offset)


def test_a_prompt_can_be_scored_alone() -> None:
    script = [
        Delta(
            prompt_logprobs=(TokenLogprob(21, -3.0, ((5, -0.5),)),),
            finish_reason=FinishReason.LENGTH,
        )
    ]
    asked: dict[str, Any] = {"prompt": [20, 21], "echo": True, "logprobs": 1, "max_tokens": 0}
    (whole,) = completion(engine_that(script), **asked)["choices"]
    assert whole["logprobs"]["token_logprobs"] == [None, -3.0]
    assert choices(completion_chunks(engine_that(script), **asked)) == [whole]


def test_prompt_logprobs_have_vllms_form() -> None:
    script = [Delta(prompt_logprobs=(TokenLogprob(21, -3.0, ((5, -0.5),)),)), *says("a")]
    engine = engine_that(script)
    (choice,) = completion(engine, prompt=[20, 21], prompt_logprobs=1)["choices"]
    known = engine.tokenizer.token
    wanted = [
        None,
        {
            "21": {"logprob": -3.0, "rank": None, "decoded_token": known(21)},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": known(5)},
        },
    ]
    assert choice["prompt_logprobs"] == wanted
    assert chat_reply(engine_that(script), prompt_logprobs=1)["prompt_logprobs"] == wanted


def test_without_a_tokenizer_tokens_are_told_by_their_ids() -> None:
    engine = ScriptedEngine(lambda index: says("", ""), has_tokenizer=False)
    (choice,) = completion(engine, prompt=[1], logprobs=1)["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:10", "token_id:11"]
    assert choice["logprobs"]["top_logprobs"][0] == {"token_id:10": -1.0}
    assert not engine.requests[0].params.detokenize


def test_tokens_can_be_asked_for_by_their_ids() -> None:
    asked = {"logprobs": True, "return_tokens_as_token_ids": True}
    (choice,) = chat_reply(engine_that(says("a")), **asked)["choices"]
    assert choice["logprobs"]["content"][0]["token"] == "token_id:10"


def test_usage_comes_in_a_last_chunk_if_asked_for() -> None:
    asked = {"stream_options": {"include_usage": True}, "n": 2}
    for made in (completion_chunks, chat_chunks):
        *chunks, last = made(engine_that(says("a", "b", cached=1)), **asked)
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        assert all("usage" not in chunk for chunk in made(engine_that(says("a"))))


def test_usage_can_come_with_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = completion_chunks(engine_that(says("a", "b")), stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


def test_a_stop_reason_is_told() -> None:
    script = [Delta(text="a", token_ids=(1,), finish_reason=FinishReason.STOP, stop_reason="\n")]
    assert completion(engine_that(script))["choices"][0]["stop_reason"] == "\n"
    assert choices(chat_chunks(engine_that(script)))[-1]["stop_reason"] == "\n"


def test_a_chat_reply_has_a_message() -> None:
    reply = chat_reply(engine_that(says("a", "b")))
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None


def test_a_chat_streams_the_role_then_content_then_the_end() -> None:
    parts = choices(chat_chunks(engine_that(says("a", "", "b"))))
    assert [part["delta"] for part in parts] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": ""},
        {"content": "b"},
        {},
    ]
    assert [part["finish_reason"] for part in parts] == [None, None, None, None, "stop"]


def test_a_chat_streams_each_tokens_logprobs_once() -> None:
    asked = {"logprobs": True, "top_logprobs": 1, "n": 2, "return_token_ids": True}
    script = says("a", "b", "")
    chunks = chat_chunks(engine_that(script), **asked)
    reply = chat_reply(engine_that(script), **asked)
    for choice in reply["choices"]:
        parts = choices(chunks, choice["index"])
        scored = [part["logprobs"]["content"] for part in parts if part["logprobs"]]
        assert joined(scored) == choice["logprobs"]["content"]
        assert len(choice["logprobs"]["content"]) == 3
        told = [part["token_ids"] for part in parts if "token_ids" in part]
        assert joined(told) == choice["token_ids"] == [10, 11, 12]
    assert [chunk.get("prompt_token_ids") for chunk in chunks].count(None) == len(chunks) - 1
    assert chunks[0]["prompt_token_ids"] == reply["prompt_token_ids"]


def test_a_tool_call_is_found_and_its_tags_are_not_shown() -> None:
    script = says("I add.", "\n", *CALL, "\n")
    (choice,) = chat_reply(engine_that(script), tools=TOOLS)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I add."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a":1}'}
    assert call["type"] == "function"
    parts = choices(chat_chunks(engine_that(script), tools=TOOLS))
    assert [part["delta"] for part in parts[:2]] == [
        {"role": "assistant", "content": ""},
        {"content": "I add."},
    ]
    (streamed,) = parts[2]["delta"].pop("tool_calls")
    assert streamed.pop("id") != call.pop("id")
    assert streamed == {"index": 0, **call}
    assert parts[3]["finish_reason"] == "tool_calls"
    assert len(parts) == 4


def test_a_lone_call_has_no_content() -> None:
    (choice,) = chat_reply(engine_that(says(CALL, "\n", CALL)), tools=TOOLS)["choices"]
    assert choice["message"]["content"] is None
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2


def test_only_the_first_call_is_told_where_they_may_not_be_parallel() -> None:
    asked = {"tools": TOOLS, "parallel_tool_calls": False}
    script = says(CALL, CALL)
    assert len(chat_reply(engine_that(script), **asked)["choices"][0]["message"]["tool_calls"]) == 1
    parts = choices(chat_chunks(engine_that(script), **asked))
    assert sum("tool_calls" in part["delta"] for part in parts) == 1


def test_logprobs_of_hidden_tokens_are_streamed_too() -> None:
    script = says(*CALL)
    parts = choices(chat_chunks(engine_that(script), tools=TOOLS, logprobs=True))
    scored = joined(part["logprobs"]["content"] for part in parts if part["logprobs"])
    assert len(scored) == len(CALL)


def test_a_call_that_was_cut_is_content_and_ends_with_length() -> None:
    script = says(CALL[:30], reason=FinishReason.LENGTH)
    (choice,) = chat_reply(engine_that(script), tools=TOOLS)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == CALL[len("<tool_call>") : 30]
    assert "tool_calls" not in choice["message"]


def test_without_tools_tags_are_content() -> None:
    (choice,) = chat_reply(engine_that(says(CALL)))["choices"]
    assert choice["message"]["content"] == CALL


def test_a_demanded_call_is_the_whole_output() -> None:
    named = {"type": "function", "function": {"name": "add"}}
    engine = engine_that(says('{"a"', ": 1}"))
    (choice,) = chat_reply(engine, tools=TOOLS, tool_choice=named)["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert choice["finish_reason"] == "stop"
    assert engine.requests[0].params.json_schema is not None
    script = says('[{"name": "add",', ' "arguments": {}}]')
    parts = choices(chat_chunks(engine_that(script), tools=TOOLS, tool_choice="required"))
    assert parts[1]["delta"]["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    assert parts[-1]["finish_reason"] == "tool_calls"


def test_the_chat_template_makes_the_prompt() -> None:
    engine = engine_that(says("a"))
    chat_reply(engine)
    text = engine.tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_final_message_can_go_on() -> None:
    engine = engine_that(says("a"))
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    chat_reply(engine, messages=messages, continue_final_message=True)
    text = engine.tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nWell, ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt: only one can be true",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' cannot be set here"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' cannot be set here"),
    ],
)
def test_a_template_is_not_misled(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_reply(engine_that(says("a")), **fields)


def test_requests_are_closed_when_the_reply_is_done() -> None:
    for made in (completion, completion_chunks, chat_reply, chat_chunks):
        engine = engine_that(says("a", "b"))
        made(engine, n=3)
        assert [request.closed for request in engine.requests] == [True] * 3


def test_a_refused_prompt_closes_those_before_it() -> None:
    for made in (completion, completion_chunks):
        engine = engine_that(
            lambda index: RequestError("too long", 400) if index == 3 else says("a")
        )
        with pytest.raises(RequestError, match=r"^prompt\[1\]: too long$"):
            made(engine, prompt=[[1], [2], [3]], n=2)
        assert [request.closed for request in engine.requests] == [True] * 3


def test_a_full_queue_keeps_its_status() -> None:
    engine = engine_that(lambda index: RequestError("full", 429))
    with pytest.raises(RequestError, match=r"^full$") as refused:
        completion(engine)
    assert refused.value.status == 429


def test_a_dead_engine_fails_every_choice() -> None:
    dead = EngineDeadError("gone")
    for made in (completion, completion_chunks, chat_reply, chat_chunks):
        engine = engine_that([*says("a", "b")[:1], dead])
        with pytest.raises(EngineDeadError, match="gone"):
            made(engine, n=3)
        assert [request.closed for request in engine.requests] == [True] * 3


def test_a_client_that_leaves_closes_its_requests() -> None:
    engine = engine_that(says(*"abcdef"))
    body = ChatRequest.model_validate({"messages": MESSAGES, "stream": True, "n": 3})

    async def leave() -> None:
        chunks = stream_chat(engine.as_engine(), body)
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(leave())
    assert [request.closed for request in engine.requests] == [True] * 3


def test_a_slow_choice_does_not_hold_up_another() -> None:
    async def merged() -> list[tuple[int, str]]:
        blocked = asyncio.Event()
        engine = engine_that(lambda index: [*([] if index else [blocked]), *says("a", "b")])
        body = CompletionRequest.model_validate({"prompt": "Hi", "stream": True, "n": 2})
        found = []
        async for chunk in stream_completion(engine.as_engine(), body):
            (choice,) = chunk["choices"]
            found.append((choice["index"], choice["text"]))
            if len(found) == 2:
                blocked.set()
        return found

    assert asyncio.run(merged()) == [(1, "a"), (1, "b"), (0, "a"), (0, "b")]
