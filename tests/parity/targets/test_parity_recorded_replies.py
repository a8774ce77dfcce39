"""Replies in the forms that SGLang and vLLM document, from files."""

import json
from pathlib import Path
from typing import Any

import pytest
from asking import decode, score, server
from reply_server import NOT_FOUND, Answer, Question, ReplyServer

from isomoe.parity.run import Prompt, Text

REPLIES = sorted((Path(__file__).parent / "replies").glob("*.json"))


def answer(recorded: dict[str, Any], question: Question) -> Answer:
    """The reply to the first recorded question whose fields are all asked."""
    if question.body is None:
        found = recorded["pages"].get(question.path)
        return NOT_FOUND if found is None else Answer(document=found)
    for exchange in recorded["exchanges"]:
        asks = exchange["asks"]
        asked = {name: question.body.get(name) for name in asks}
        if question.path == exchange["path"] and asks == asked:
            return Answer(document=exchange["reply"])
    return NOT_FOUND


def plain(text: Text) -> list[list[Any]]:
    return [list(place.token) for place in text]


def test_there_are_replies() -> None:
    assert [file.stem for file in REPLIES] == ["sglang", "vllm"]


@pytest.mark.parametrize("file", REPLIES, ids=lambda file: file.stem)
def test_a_documented_reply_is_read(file: Path) -> None:
    recorded = json.loads(file.read_text())
    wants = recorded["wants"]
    text = (Prompt(None, "the capital of France is"),)
    with (
        ReplyServer(lambda question: answer(recorded, question)) as fake,
        server(fake.url) as target,
    ):
        assert target.dialect == wants["dialect"]
        prompts = tuple(target.encode(text))
        assert [list(prompt.token_ids or ()) for prompt in prompts] == [wants["prompt_ids"]]
        (output,) = decode(target, prompts, top=3)
        (scored,) = score(target, [output], prompts, top=3)
        facts = dict(target.facts())
    assert plain(output) == wants["output"]
    assert plain(scored) == wants["scores"]
    assert [place.rank for place in scored] == wants["ranks"]
    assert [[one.token_id for one in place.top] for place in scored] == wants["top_ids"]
    assert facts.items() >= wants["facts"].items()
    assert "sk-never-shown" not in str(facts)
