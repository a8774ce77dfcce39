"""Servers that are broken or hostile: each ends in a message that names the target."""

import math
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scripted_model
from asking import PROMPTS, decode, score, server
from reply_server import Answer, Question, ReplyServer

from isomoe.errors import ConfigError
from isomoe.parity.targets.base import TargetError

Change = Callable[[Any], Any]
DIALECTS = {"sglang": scripted_model.sglang, "vllm": scripted_model.vllm}


class Turncoat:
    """Answers well until it is told to change."""

    def __init__(self, dialect: str, change: Callable[[Question, Answer], Answer]) -> None:
        self._well = DIALECTS[dialect]
        self._change = change
        self.has_turned = False

    def __call__(self, question: Question) -> Answer:
        answer = self._well(question)
        if self.has_turned and question.body is not None:
            return self._change(question, answer)
        return answer


def error_of(
    dialect: str,
    change: Callable[[Question, Answer], Answer],
    *,
    scores: bool = False,
    **settings: Any,
) -> str:
    """How a server ends that turns bad once its dialect is known; it must name the target."""
    turncoat = Turncoat(dialect, change)
    with ReplyServer(turncoat) as fake, server(fake.url, **settings) as target:
        outputs = decode(target)
        turncoat.has_turned = True
        with pytest.raises(TargetError) as raised:
            _ = score(target, outputs) if scores else decode(target)
    said = str(raised.value)
    assert said.startswith(f"{fake.url}: ")
    assert said.isprintable()
    return said.removeprefix(f"{fake.url}: ")


def document(change: Change) -> Callable[[Question, Answer], Answer]:
    return lambda _, answer: replace(answer, document=change(answer.document))


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        TargetError, match=f"^{url}: /v1/models: no connection .*is the server started"
    ):
        server(url).__enter__()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_that_hangs_is_named(dialect: str) -> None:
    found = error_of(dialect, lambda _, answer: replace(answer, delay=60), timeout_seconds=0.5)
    assert "no whole answer within 0.5 s" in found


def test_a_server_that_hangs_from_the_start_is_named() -> None:
    with (
        ReplyServer(lambda _: Answer(delay=60)) as fake,
        pytest.raises(TargetError, match=f"^{fake.url}: /v1/models: no whole answer within 0.2 s"),
    ):
        server(fake.url, timeout_seconds=0.2).__enter__()


def test_a_server_that_never_ends_its_reply_is_cut_off() -> None:
    giant = Answer(document=b"[" * 4096, endless=True)
    assert "more than 100000 bytes" in error_of("sglang", lambda *_: giant, max_reply_bytes=100_000)


@pytest.mark.parametrize("status", [200, 500])
def test_a_giant_reply_is_cut_off(status: int) -> None:
    giant = Answer(document="x" * 200_000, status=status)
    assert "more than 100000 bytes" in error_of("vllm", lambda *_: giant, max_reply_bytes=100_000)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_connection_that_breaks_in_mid_reply_is_no_answer(dialect: str) -> None:
    assert "closed the connection" in error_of(dialect, lambda _, answer: replace(answer, cut=9))


@pytest.mark.parametrize(
    "body", [b'{"choices": [', b"<html>sorry</html>", b"", b"\xff\xfe", b"[" * 100_000]
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_reply_that_is_no_json_is_named(dialect: str, body: bytes) -> None:
    found = error_of(dialect, lambda _, answer: replace(answer, document=body))
    assert "the reply is broken or no JSON" in found


def in_meta(name: str, change: Change) -> Change:
    def changed(reply: Any) -> Any:
        return {
            **reply,
            "meta_info": {**reply["meta_info"], name: change(reply["meta_info"][name])},
        }

    return changed


def in_choice(name: str, change: Change) -> Change:
    def changed(reply: Any) -> Any:
        choice = reply["choices"][0]
        return {**reply, "choices": [{**choice, name: change(choice[name])}]}

    return changed


def first(value: Any) -> Change:
    """Puts another log-probability to SGLang's last token."""
    return lambda tokens: [*tokens[:-1], [value, *tokens[-1][1:]]]


OF_SGLANG = {
    "null": (in_meta("output_token_logprobs", first(None)), "a log-probability is null"),
    "nan": (in_meta("output_token_logprobs", first(math.nan)), "a log-probability is nan"),
    "infinite": (in_meta("output_token_logprobs", first(-math.inf)), "a log-probability is -inf"),
    "text": (in_meta("output_token_logprobs", first("-0.5")), "a log-probability is '-0.5'"),
    "positive": (in_meta("output_token_logprobs", first(0.5)), "is 0.5, and cannot be positive"),
    "fewer": (in_meta("output_token_logprobs", lambda all_: all_[1:]), "differ in length: 3 "),
    "no list": (in_meta("output_token_logprobs", lambda _: 7), "is 7, and should be of type list"),
    "no triple": (
        in_meta("output_token_logprobs", lambda _: [0.5] * 4),
        r"0.5 stands where \[logprob",
    ),
    "no top": (
        in_meta("output_top_logprobs", lambda all_: all_[1:]),
        "differ in length: 4 output_",
    ),
    "aborted": (in_meta("finish_reason", lambda _: {"type": "abort"}), "for the reason 'abort'"),
    "prompt": (
        in_meta("prompt_tokens", lambda count: count + 1),
        "prompt tokens were sent, and the",
    ),
    "weights": (
        in_meta("weight_version", lambda _: "step-2"),
        "model was 'default' and is 'step-2",
    ),
    "several": (lambda reply: [reply, reply], "stands where an object with 'meta_info' should"),
    "nothing": (lambda _: {}, "'meta_info' is null, and should be of type dict"),
    "error in 200": (lambda _: {"error": "oom"}, "'meta_info' is null"),
}


@pytest.mark.parametrize("name", OF_SGLANG)
def test_a_wrong_reply_of_sglang_is_named(name: str) -> None:
    change, message = OF_SGLANG[name]
    assert re.search(message, error_of("sglang", document(change)))


def lists(name: str, change: Change) -> Change:
    return in_choice("logprobs", lambda found: {**found, name: change(found[name])})


OF_VLLM = {
    "null": (lists("token_logprobs", lambda all_: [None, *all_[1:]]), "log-probability is null"),
    "nan": (lists("token_logprobs", lambda all_: [math.nan, *all_[1:]]), "log-probability is nan"),
    "positive": (lists("token_logprobs", lambda all_: [2, *all_[1:]]), "is 2, and cannot be"),
    "fewer": (lists("token_logprobs", lambda all_: all_[1:]), "4 tokens, 3 token_logprobs"),
    "no ids": (in_choice("token_ids", lambda all_: all_[1:]), "4 tokens, 3 token_ids"),
    "no logprobs": (in_choice("logprobs", lambda _: None), "null stands where an object"),
    "several": (lambda reply: {**reply, "choices": reply["choices"] * 2}, "2 outputs came, 1 was"),
    "none": (lambda reply: {**reply, "choices": []}, "0 outputs came, 1 was asked for"),
    "aborted": (in_choice("finish_reason", lambda _: None), "ended for the reason null"),
    "model": (lambda reply: {**reply, "model": "other"}, "model was 'rule-7b' and is 'other' now"),
    "counts": (lambda reply: {**reply, "usage": {"prompt_tokens": 1}}, "the server counts 1"),
}


@pytest.mark.parametrize("name", OF_VLLM)
def test_a_wrong_reply_of_vllm_is_named(name: str) -> None:
    change, message = OF_VLLM[name]
    assert re.search(message, error_of("vllm", document(change)))


ODD = [None, [], {}, -1, 10**400, 1e400, "x", True, [[]], {"a": 1}, b"[" * 5000]
"""What stands where something else should."""


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:8])
@pytest.mark.parametrize(("dialect", "name"), [("sglang", "meta_info"), ("vllm", "choices")])
def test_an_odd_reply_is_named_and_never_a_defect_of_ours(
    dialect: str, name: str, odd: object
) -> None:
    def changed(_: Question, answer: Answer) -> Answer:
        if isinstance(odd, bytes):
            return replace(answer, document=odd)
        return replace(answer, document={**answer.document, name: odd})

    error_of(dialect, changed)


def test_a_number_of_too_many_digits_is_named() -> None:
    def changed(_: Question, answer: Answer) -> Answer:
        digits = b"9" * 5000
        return replace(answer, document=answer.body.replace(b'"prompt_tokens": ', b"%s" % digits))

    assert "broken or no JSON" in error_of("sglang", changed)


@pytest.mark.parametrize(("count", "message"), [(6, "6 output tokens came, 4"), (2, "2 of 4 out")])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_output_of_another_length_is_named(dialect: str, count: int, message: str) -> None:
    def other(question: Question, _: Answer) -> Answer:
        body = {
            **question.body,
            "max_tokens": count,
            "sampling_params": {"max_new_tokens": count},
        }
        return DIALECTS[dialect](replace(question, body=body))

    assert message in error_of(dialect, other)


def test_other_tokens_than_were_sent_are_named() -> None:
    def shifted(tokens: Any) -> Any:
        return [[value, token_id + 1, text] for value, token_id, text in tokens]

    change = document(in_meta("input_token_logprobs", shifted))
    assert "was scored where" in error_of("sglang", change, scores=True)

    def renumbered(listed: Any) -> Any:
        return [None, *({f"{int(one) + 1}": v for one, v in each.items()} for each in listed[1:])]

    change = document(in_choice("prompt_logprobs", renumbered))
    assert "was sent, and others were scored" in error_of("vllm", change, scores=True)


def test_another_tokenizer_is_named() -> None:
    def respelled(tokens: Any) -> Any:
        return [[value, token_id, f"le{token_id}"] for value, token_id, _ in tokens]

    change = document(in_meta("input_token_logprobs", respelled))
    assert "another tokenizer: token " in error_of("sglang", change, scores=True)

    def spelled_anew(listed: Any) -> Any:
        return [
            None,
            *(
                {one: {**v, "decoded_token": "la"} for one, v in each.items()}
                for each in listed[1:]
            ),
        ]

    change = document(in_choice("prompt_logprobs", spelled_anew))
    assert "another tokenizer: token " in error_of("vllm", change, scores=True)


def test_a_space_before_a_word_makes_no_other_tokenizer() -> None:
    def stripped(question: Question) -> Answer:
        answer = scripted_model.sglang(question)
        if question.body is not None:
            meta = answer.document["meta_info"]
            meta["input_token_logprobs"] = [
                [value, token_id, text and text.strip()]
                for value, token_id, text in meta["input_token_logprobs"]
            ]
        return answer

    with ReplyServer(stripped) as fake, server(fake.url) as target:
        assert len(score(target, decode(target))) == len(PROMPTS)


@pytest.mark.parametrize("change", [lambda all_: all_[1:], lambda all_: [*all_, *all_]])
def test_scores_of_another_length_are_named(change: Change) -> None:
    found = error_of("vllm", document(in_choice("prompt_logprobs", change)), scores=True)
    assert "'prompt_logprobs' has" in found


def test_fewer_scores_than_tokens_are_named() -> None:
    def few(reply: Any) -> Any:
        meta = reply["meta_info"]
        names = ("input_token_logprobs", "input_top_logprobs")
        return {**reply, "meta_info": {**meta, **{name: meta[name][-2:] for name in names}}}

    assert "2 log-probabilities came of 4" in error_of("sglang", document(few), scores=True)


@pytest.mark.parametrize("status", [400, 404, 500, 502])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_of_http_is_told(dialect: str, status: int) -> None:
    refusal = Answer(document={"error": {"message": "out of \x1b[31mmemory"}}, status=status)
    found = error_of(dialect, lambda _, answer: refusal)
    assert f"{status} " in found
    assert "out of ?[31mmemory" in found


def test_a_wait_that_is_too_long_is_not_waited_for() -> None:
    for wait in ("3600", "Fri, 31 Dec 2100 23:59:59 GMT"):
        busy = Answer(document={}, status=429, headers={"Retry-After": wait})
        found = error_of("sglang", lambda *_, busy=busy: busy)
        assert "429 Too Many Requests" in found
        assert "the limit of all waits is 5 s" in found


def test_a_server_that_stays_busy_is_given_up() -> None:
    busy = Answer(document={}, status=503, headers={"Retry-After": "0"})
    assert "503 Service Unavailable: {}, 6 times in a row" in error_of(
        "vllm", lambda _, answer: busy
    )


def test_a_redirect_is_not_followed() -> None:
    away = Answer(status=307, headers={"Location": "http://elsewhere/generate?token=s3cret"})
    found = error_of("sglang", lambda _, answer: away)
    assert "a redirect to 'http://elsewhere/generate'" in found
    assert "s3cret" not in found


def test_one_bad_answer_among_many_spoils_all() -> None:
    def spoiled(question: Question, answer: Answer) -> Answer:
        bad = question.body["input_ids"] == list(PROMPTS[1].token_ids or ())
        return Answer(document={"error": "worker 3 died"}, status=500) if bad else answer

    assert "prompt 1: /generate: 500 " in error_of("sglang", spoiled)


def test_a_model_that_is_swapped_is_named() -> None:
    models = ["small"]

    def swapped(question: Question) -> Answer:
        answer = scripted_model.sglang(question)
        if question.path == "/v1/models":
            return replace(answer, document={"data": [{"id": each} for each in models]})
        return answer

    with ReplyServer(swapped) as fake, server(fake.url) as target:
        decode(target)
        models[:] = ["large"]
        with pytest.raises(TargetError, match=f"^{fake.url}: served 'small', and lists"):
            decode(target)


@pytest.mark.parametrize("path", ["/version", "/server_info"])
def test_an_optional_page_that_hangs_ends_nothing(path: str) -> None:
    def slow(question: Question) -> Answer:
        answer = scripted_model.sglang(question)
        return replace(answer, delay=60) if question.path == path else answer

    with ReplyServer(slow) as fake, server(fake.url, timeout_seconds=0.5) as target:
        assert len(decode(target)) == len(PROMPTS)


def test_a_list_of_models_that_hangs_in_mid_run_ends_nothing() -> None:
    delays = [0]

    def slow(question: Question) -> Answer:
        answer = scripted_model.sglang(question)
        return replace(answer, delay=delays[0]) if question.path == "/v1/models" else answer

    with ReplyServer(slow) as fake, server(fake.url, timeout_seconds=0.5) as target:
        delays[0] = 60
        assert len(decode(target)) == len(PROMPTS)


def test_the_facts_are_those_of_the_model_that_is_asked() -> None:
    def two(question: Question) -> Answer:
        answer = scripted_model.vllm(question)
        if question.path == "/v1/models":
            other = {"id": "other", "owned_by": "others", "max_model_len": 9}
            return replace(answer, document={"data": [other, *answer.document["data"]]})
        return answer

    with ReplyServer(two) as fake, server(fake.url, model="rule-7b") as target:
        assert (target.facts()["model"], target.facts()["owned_by"]) == ("rule-7b", "vllm")


def test_a_wrong_number_is_no_other_dialect() -> None:
    def broken(question: Question) -> Answer:
        answer = scripted_model.sglang(question)
        if question.body is None:
            return answer
        return replace(
            answer, document=in_meta("output_token_logprobs", first(math.nan))(answer.document)
        )

    with (
        ReplyServer(broken) as fake,
        pytest.raises(TargetError, match=f"^{fake.url}: sglang: a log-probability is nan"),
    ):
        server(fake.url).__enter__()


def test_a_server_of_another_kind_is_told_what_was_tried() -> None:
    with (
        ReplyServer(lambda _: Answer(document={"detail": "Not Found"}, status=404)) as fake,
        pytest.raises(TargetError, match=r"speaks no known dialect \(sglang: .*; text-chat: .*404"),
    ):
        server(fake.url).__enter__()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@127.0.0.1:1",
        "https://s3cret@host",
        "http://user:s3c/s3cret@host",
        "http://host:1/?key=s3cret",
        "http://host:1#s3cret",
    ],
)
def test_a_url_that_holds_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^target ") as raised:
        server(url)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://host:port",
        "http://[::1",
        "http://a b",
        "http://a..b",
        f"http://{'a' * 64}",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^target .*must be like http://127.0.0.1:30000"):
        server(url)


def test_a_key_that_would_break_the_request_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the API key: must be printable ASCII"):
        server("http://127.0.0.1:1", api_key="sk\r\nHost: elsewhere")
