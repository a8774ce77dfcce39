import asyncio
from typing import Any

import pytest
from fake_server import VOCAB, FakeServer

from isomoe.bench import Endpoint, Target, find_target
from isomoe.errors import ConfigError
from isomoe.http import HttpClient, Url


def find(server: FakeServer, **changes: Any) -> Target:
    asked: dict[str, Any] = {
        "endpoint": Endpoint.COMPLETIONS, "model": None, "vocab_size": None, "sample": None,
        "ignore_eos": True, "timeout_seconds": 10.0,
    }  # fmt: skip

    async def main() -> Target:
        http = HttpClient(Url.parse(server.url), changes.pop("key", None))
        try:
            return await find_target(http, **(asked | changes))
        finally:
            http.close()

    return asyncio.run(main())


def test_model_and_vocabulary_are_what_the_server_says() -> None:
    with FakeServer() as server:
        target = find(server)
    assert (target.client.model, target.vocab_size, target.notes) == ("fake", VOCAB, ())
    assert server.requests[-1]["prompt"] == [VOCAB - 1]
    assert server.requests[-1]["max_tokens"] == 1


def test_flags_have_precedence_over_what_the_server_says() -> None:
    with FakeServer() as server:
        target = find(server, model="other", vocab_size=7)
    assert (target.client.model, target.vocab_size) == ("other", 7)


def test_a_server_that_does_not_describe_itself_gets_ids_that_every_vocabulary_has() -> None:
    with FakeServer(describes=False) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("isomoe.bench.target._LEAST_VOCAB", 30)
        target = find(server)
    assert target.vocab_size == 30
    assert target.notes == (
        "the server does not say its vocabulary's size: token ids are below 30",
    )


def test_a_server_that_refuses_token_ids_gets_words() -> None:
    with FakeServer(takes_ids=False) as server:
        target = find(server)
    assert target.vocab_size is None
    assert target.notes == (
        "the server refuses token ids (400 Bad Request: prompt must be a string): "
        "prompts are words",
    )


def test_a_vocabulary_that_the_user_has_wrong_is_refused() -> None:
    with (
        FakeServer() as server,
        pytest.raises(ConfigError, match=r"--vocab-size 99: token id 98 is refused \(400 .*out of"),
    ):
        find(server, vocab_size=99)


def test_chat_gets_words() -> None:
    with FakeServer() as server:
        assert find(server, endpoint=Endpoint.CHAT).vocab_size is None


def test_a_server_that_refuses_a_field_says_so_before_the_measurement() -> None:
    with (
        FakeServer(ignores_eos=False) as server,
        pytest.raises(ConfigError, match=r"one token failed .*unknown field ignore_eos"),
    ):
        find(server)


def test_a_given_prompt_is_tried_first() -> None:
    with FakeServer() as server, pytest.raises(ConfigError, match="out of the vocabulary"):
        find(server, sample=(1, VOCAB))


def test_a_wrong_key_is_said_and_the_right_one_works() -> None:
    with FakeServer(key="secret") as server:
        with pytest.raises(ConfigError, match="401 Unauthorized: wrong key"):
            find(server)
        assert find(server, key="secret").client.model == "fake"


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(HttpClient(Url(host="h", port=1), "secret"))


def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    with FakeServer() as server:
        pass
    with pytest.raises(ConfigError, match=r"not reachable .*`isomoe serve` starts") as caught:
        find(server)
    assert "\n" not in str(caught.value)
