"""Log-probabilities in the three forms that clients read."""

import math

from isomoe.engine import TokenLogprob
from isomoe.server.openai.logprobs import (
    LEAST,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)

TEXTS = {0: "Hello", 1: " wörld", 2: "!", 3: "\ufffd", 4: "\ufffd"}
GREEDY = TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5), (3, -3.0)))
UNLIKELY = TokenLogprob(2, -9.0, ((0, -0.25), (1, -2.0), (3, -3.0)))


def test_a_completion_has_each_token_with_its_offset_and_candidates() -> None:
    found = completion_logprobs((0, 1, 2), (None, GREEDY, UNLIKELY), 2, TEXTS)
    assert found == {
        "text_offset": [0, 5, 11],
        "token_logprobs": [None, -0.5, -9.0],
        "tokens": ["Hello", " wörld", "!"],
        "top_logprobs": [
            None,
            {" wörld": -0.5, "!": -1.5},
            {"Hello": -0.25, " wörld": -2.0, "!": -9.0},  # the token itself is always among them
        ],
    }


def test_offsets_go_on_where_the_choice_has_come_to() -> None:
    found = completion_logprobs((2, 1), (UNLIKELY, GREEDY), 0, TEXTS, offset=100)
    assert found["text_offset"] == [100, 101]
    assert found["top_logprobs"] == [{"!": -9.0}, {" wörld": -0.5}]


def test_of_tokens_with_the_same_text_the_likeliest_counts() -> None:
    """lm-evaluation-harness compares a token's own with the greatest to see if it is greedy."""
    other = TokenLogprob(4, -2.0, ((3, -0.1),))
    (top,) = completion_logprobs((4,), (other,), 1, TEXTS)["top_logprobs"]
    assert top == {"\ufffd": -0.1}


def test_minus_infinity_is_a_number() -> None:
    never = TokenLogprob(2, -math.inf, ((0, 0.0), (1, -math.inf)))
    found = completion_logprobs((2,), (never,), 2, TEXTS)
    assert found["token_logprobs"] == [LEAST]
    assert found["top_logprobs"] == [{"Hello": 0.0, " wörld": LEAST, "!": LEAST}]
    assert chat_logprobs((never,), TEXTS)["content"][0]["logprob"] == LEAST


def test_a_chat_has_each_token_with_its_bytes() -> None:
    (found,) = chat_logprobs((GREEDY,), TEXTS)["content"]
    assert found["token"] == " wörld"
    assert bytes(found["bytes"]).decode() == " wörld"
    assert found["logprob"] == -0.5
    assert [(top["token"], top["logprob"]) for top in found["top_logprobs"]] == [
        (" wörld", -0.5),
        ("!", -1.5),
        ("\ufffd", -3.0),
    ]


def test_a_prompt_has_each_token_with_its_rank_if_that_is_known() -> None:
    first, greedy, unlikely = prompt_logprobs((None, GREEDY, UNLIKELY), 1, TEXTS)
    assert first is None
    assert greedy == {"1": {"logprob": -0.5, "rank": 1, "decoded_token": " wörld"}}
    assert unlikely == {
        "2": {"logprob": -9.0, "rank": None, "decoded_token": "!"},
        "0": {"logprob": -0.25, "rank": 1, "decoded_token": "Hello"},
    }
