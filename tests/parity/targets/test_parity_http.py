"""Servers that answer as they should: what is asked of them, and what is made of it."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import scripted_model
from asking import PROMPTS, decode, score, server
from reply_server import NOT_FOUND, Answer, Question, ReplyServer

from isomoe.errors import ConfigError
from isomoe.parity.run import ALONE, PAIRS, Candidate, Place, Prompt
from isomoe.parity.targets import reading
from isomoe.parity.targets.base import TargetError

DIALECTS = {"sglang": scripted_model.sglang, "vllm": scripted_model.vllm}


@pytest.fixture(params=DIALECTS)
def spoken(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_dialect_is_found_and_the_tokens_are_read(spoken: str) -> None:
    with ReplyServer(DIALECTS[spoken]) as fake, server(fake.url) as target:
        assert (target.dialect, target.can_score, target.gives_logprobs) == (spoken, True, True)
        outputs = decode(target)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = list(prompt.token_ids or ())
        for place in output:
            assert place.token.token_id == scripted_model.next_id(ids)
            assert place.token.text == scripted_model.spell(scripted_model.next_id(ids))
            assert place.logprob == scripted_model.logprob(ids, scripted_model.next_id(ids))
            ids.append(scripted_model.next_id(ids))


def test_given_tokens_are_scored_in_their_places(spoken: str) -> None:
    with ReplyServer(DIALECTS[spoken]) as fake, server(fake.url) as target:
        outputs = decode(target)
        scores = score(target, outputs)
    for output, scored in zip(outputs, scores, strict=True):
        assert [place.token for place in scored] == [place.token for place in output]
    if spoken == "vllm":
        assert {place.rank for scored in scores for place in scored} == {3}


def test_texts_become_the_servers_own_token_ids(spoken: str) -> None:
    texts = (Prompt(None, "abc"), Prompt(None, "abc"))
    with ReplyServer(DIALECTS[spoken]) as fake, server(fake.url) as target:
        encoded = target.encode(texts)
        scores = score(target, decode(target, texts), texts)
    assert encoded == [Prompt((97, 98, 99), "abc")] * 2
    assert [len(scored) for scored in scores] == [4, 4]


def test_a_composition_bounds_the_open_requests(spoken: str) -> None:
    many = tuple(Prompt((number, 1)) for number in range(8))
    together = threading.Event()

    def slowly(question: Question) -> Answer:
        """Until as many are open as may be: a slow machine opens them late."""
        if fake.most_open >= most:
            together.set()
        together.wait(5)
        answer = DIALECTS[spoken](question)
        return Answer(document=answer.document, status=answer.status, delay=0.01)

    for composition, limit, most in (
        (ALONE, 32, 1),
        (PAIRS, 32, 2),
        (PAIRS._replace(batch=8), 3, 3),
    ):
        together.set()
        with (
            ReplyServer(slowly) as fake,
            server(fake.url, max_concurrency=limit) as target,
        ):
            fake.most_open = 0
            together.clear()
            decode(target, many, composition=composition)
        assert fake.most_open == most, composition


def test_a_backward_composition_sends_the_last_prompt_first(spoken: str) -> None:
    with ReplyServer(DIALECTS[spoken]) as fake, server(fake.url) as target:
        before = len(fake.questions)
        outputs = decode(target, composition=ALONE._replace(backwards=True))
        sent = [question.body for question in fake.questions[before:] if question.body]
        assert outputs == decode(target)
    prompts = [tuple(body.get("input_ids") or body.get("prompt")) for body in sent]
    assert prompts == [prompt.token_ids for prompt in reversed(PROMPTS)]


def test_greedy_is_asked_for_whatever_the_defaults_of_the_model(spoken: str) -> None:
    with ReplyServer(DIALECTS[spoken]) as fake, server(fake.url) as target:
        score(target, decode(target))
    for question in fake.questions:
        if question.path in ("/generate", "/v1/completions"):
            params = question.body.get("sampling_params", question.body)
            assert params["temperature"] == 0.0
            assert params["repetition_penalty"] == 1.0


def test_a_key_is_sent_and_shown_nowhere(spoken: str) -> None:
    def locked(question: Question) -> Answer:
        if question.headers.get("Authorization") != "Bearer sk-secret":
            return Answer(document={"error": {"message": "no sk-secret here"}}, status=401)
        return DIALECTS[spoken](question)

    with ReplyServer(locked) as fake:
        with server(fake.url, api_key="sk-secret") as target:
            decode(target)
            shown = f"{target.name} {target.facts()} {target.notes} {target!r} {vars(target)}"
        with pytest.raises(TargetError, match=r"asks for an API key, and --api-key-env NAME"):
            server(fake.url).__enter__()
        with pytest.raises(TargetError, match=r"Incorrect|takes another API key") as raised:
            server(fake.url, api_key="secret").__enter__()
    assert "sk-" not in shown
    assert "secret" not in str(raised.value)


def test_a_key_that_a_server_echoes_is_in_no_note_and_no_fact(spoken: str) -> None:
    def echoes(question: Question) -> Answer:
        answer = DIALECTS[spoken](question)
        if question.path == "/v1/models":
            return replace(answer, document={"data": [{"id": "m", "owned_by": "sk-secret"}]})
        return answer if answer.status == 200 else replace(answer, document={"error": "sk-secret"})

    with ReplyServer(echoes) as fake, server(fake.url, api_key="sk-secret") as target:
        assert target.facts()["owned_by"] == "***"
        assert "sk-secret" not in f"{target.facts()} {target.notes}"


def test_a_stand_in_for_a_key_is_blotted_out_of_no_number(spoken: str) -> None:
    with ReplyServer(DIALECTS[spoken]) as fake:
        with server(fake.url) as target:
            expected = decode(target)
        with server(fake.url, api_key="1") as target:
            assert decode(target) == expected


def test_settings_of_the_server_are_facts_and_its_keys_are_not() -> None:
    with ReplyServer(scripted_model.sglang) as fake, server(fake.url) as target:
        facts = target.facts()
    assert facts == {"model": "rule-7b", "version": "0.5.16", "tp_size": 2}


def test_a_busy_server_is_asked_again(spoken: str) -> None:
    refused = threading.Event()

    def busy_once(question: Question) -> Answer:
        if question.body and not refused.is_set():
            refused.set()
            return Answer(document={}, status=429, headers={"Retry-After": "0"})
        return DIALECTS[spoken](question)

    with ReplyServer(busy_once) as fake, server(fake.url) as target:
        assert target.dialect == spoken
    assert refused.is_set()


def test_a_token_that_was_added_to_the_candidates_has_no_rank_by_its_place() -> None:
    """Servers list the likeliest and the token itself, however many are likelier than it."""
    top = [Candidate(1, None, -0.5), Candidate(2, None, -1.0), Candidate(3, None, -4.0)]
    assert reading.place(top[2], top, most=2) == Place(top[2], tuple(top[:2]), None)
    assert reading.place(top[1], top, most=2).rank == 2
    assert reading.place(top[2], top, most=2, rank=17).rank == 17


def test_a_forced_dialect_is_the_only_one_tried() -> None:
    with ReplyServer(scripted_model.vllm) as fake:
        with server(fake.url, dialect="vllm") as target:
            decode(target)
        assert "/generate" not in {question.path for question in fake.questions}
        with pytest.raises(TargetError, match=r"speaks no known dialect \(sglang: .*404"):
            server(fake.url, dialect="sglang").__enter__()
        with pytest.raises(ConfigError, match=r"--dialect latin: must be one of sglang, vllm"):
            server(fake.url, dialect="latin").__enter__()


def test_an_old_vllm_tells_ids_as_texts() -> None:
    def old(question: Question) -> Answer:
        answer = scripted_model.vllm(question)
        if question.path == "/v1/completions":
            del answer.document["choices"][0]["token_ids"]
        return answer

    with ReplyServer(old) as fake, server(fake.url) as target:
        outputs = decode(target)
        assert target.can_score
        assert [len(scored) for scored in score(target, outputs)] == [4, 4, 4]
    assert {place.token.text for output in outputs for place in output} == {None}


def test_a_server_without_a_tokenizer_tells_ids_alone() -> None:
    def silent(question: Question) -> Answer:
        if question.body and question.body["return_text_in_logprobs"]:
            return Answer(document={"error": "there is no tokenizer"}, status=400)
        return scripted_model.sglang(question)

    with ReplyServer(silent) as fake, server(fake.url) as target:
        outputs = decode(target)
    assert {place.token.text for output in outputs for place in output} == {None}


def echoing(takes_ids: bool, least: int, question: Question) -> Answer:
    """An OpenAI server: texts, echo, and words that are tokens."""
    if question.path != "/v1/completions":
        return NOT_FOUND
    body = question.body
    prompt = body["prompt"]
    known = {"model", "prompt", "max_tokens", "temperature", "logprobs", "echo"}
    if set(body) - known or (not takes_ids and not isinstance(prompt, str)):
        return Answer(document={"error": {"message": "unknown field"}}, status=422)
    if body["max_tokens"] < least:
        return Answer(document={"error": {"message": "max_tokens"}}, status=400)
    echoed = [f" {each}" for each in prompt.split()] if body.get("echo") else []
    tokens = [*echoed, *(f" n{at}" for at in range(body["max_tokens"]))]
    values = [None if echoed and not at else -0.25 * at for at in range(len(tokens))]
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None}
    choice = {"index": 0, "text": "".join(tokens), "logprobs": logprobs, "finish_reason": "length"}
    return Answer(document={"choices": [choice]})


@pytest.mark.parametrize("least", [0, 1])
def test_a_plain_server_scores_what_it_echoes(least: int) -> None:
    prompts = (Prompt(None, "a b c"),)
    with (
        ReplyServer(lambda question: echoing(False, least, question)) as fake,
        server(fake.url) as target,
    ):
        assert (target.dialect, target.can_score) == ("openai-completions", True)
        outputs = decode(target, prompts)
        (scored,) = score(target, outputs, prompts)
    assert [place.token.text for place in scored] == [" n0", " n1", " n2", " n3"]
    assert [place.logprob for place in scored] == [-0.75, -1.0, -1.25, -1.5]


def test_a_text_that_is_read_as_other_tokens_is_no_score() -> None:
    prompts = (Prompt(None, "a b c"),)
    with (
        ReplyServer(lambda question: echoing(False, 0, question)) as fake,
        server(fake.url) as target,
    ):
        (output,) = decode(target, prompts)
        split = (output[0]._replace(token=output[0].token._replace(text=" n0 n1")), *output[2:])
        with pytest.raises(TargetError, match=r"prompt 0: output token 0 was .* n0 n1.* is read"):
            score(target, [split], prompts)


def test_token_ids_are_refused_for_a_server_that_takes_texts() -> None:
    with (
        ReplyServer(lambda question: echoing(False, 0, question)) as fake,
        server(fake.url) as target,
        pytest.raises(ConfigError, match=r"^http://.* takes texts, and the prompts are token ids"),
    ):
        decode(target, (Prompt((1, 2)),))


def chat(with_logprobs: bool, question: Question) -> Answer:
    if question.path != "/v1/chat/completions":
        return NOT_FOUND
    content: list[dict[str, Any]] = [
        {"token": f" c{at}", "logprob": -0.5, "bytes": None, "top_logprobs": []}
        for at in range(question.body["max_tokens"])
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": " c0 c1 c2 c3"},
        "logprobs": {"content": content, "refusal": None} if with_logprobs else None,
        "finish_reason": "length",
    }
    return Answer(document={"model": "m", "choices": [choice]})


@pytest.mark.parametrize(
    ("with_logprobs", "dialect"), [(True, "openai-chat"), (False, "text-chat")]
)
def test_a_chat_server_is_compared_as_it_runs_freely(with_logprobs: bool, dialect: str) -> None:
    with (
        ReplyServer(lambda question: chat(with_logprobs, question)) as fake,
        server(fake.url) as target,
    ):
        outputs = decode(target)
        assert (target.dialect, target.can_score) == (dialect, False)
        assert target.gives_logprobs is with_logprobs
        notes = " ".join(target.notes)
    assert "chat template" in notes
    assert ("cannot be asked to go on" in notes) is not with_logprobs
    assert ("not comparable" in notes) is not with_logprobs
    assert [[place.token.text for place in output] for output in outputs] == [
        [" c0", " c1", " c2", " c3"]
    ] * 3
