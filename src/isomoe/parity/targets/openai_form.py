"""What the dialects of OpenAI's API have in common.

Source: OpenAI's reference of `/v1/completions` (lists of tokens and of log-probabilities) and of
`/v1/chat/completions` (a list of objects, which llama.cpp sends from both).
"""

from collections.abc import Mapping
from typing import Any

from isomoe.parity.run import Candidate, Place, Text
from isomoe.parity.targets.reading import (
    BadReply,
    OtherForm,
    candidates,
    logprob_of,
    member,
    place,
    same_length,
    short,
    token_id_of,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_AS_ID = "token_id:"
_MOST_DIGITS = 12
"""Of a token id; `int` refuses texts of thousands."""


def body_of(model: str | None, max_tokens: int, **more: Any) -> dict[str, Any]:
    """What every request holds; greedy."""
    named = {} if model is None else {"model": model}
    return {**named, "max_tokens": max_tokens, "temperature": 0.0, **more}


def usage_of(reply: Any) -> Mapping[str, Any]:
    """How many tokens the server counts; empty if it does not say."""
    found = reply.get("usage")
    return found if isinstance(found, dict) else {}


def places_of(logprobs: Any, top: int, start: int = 0, stop: int | None = None) -> Text:
    """The places that log-probabilities in either form tell of, or some of them.

    Raises:
        OtherForm: if they are in neither form.
        BadReply: if they cannot be right.
    """
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        return tuple(_place_of(each, top) for each in logprobs["content"][start:stop])
    tokens = member(logprobs, "tokens", list)
    values = member(logprobs, "token_logprobs", list)
    listed = _list_of(logprobs.get("top_logprobs")) or [None] * len(tokens)
    same_length(tokens=tokens, token_logprobs=values, top_logprobs=listed)
    rows = list(zip(tokens, values, listed, strict=True))[start:stop]
    return tuple(_place_of_lists(*row, top) for row in rows)


def token_of(text: Any) -> tuple[int | None, str | None]:
    """Id and text of what stands for a token: vLLM may write `token_id:17`.

    Raises:
        OtherForm: if it is no text.
    """
    if not isinstance(text, str):
        raise OtherForm(f"a token is {short(text)}, and should be a text")
    number = text.removeprefix(_AS_ID)
    is_id = number != text and number.isdecimal() and len(number) <= _MOST_DIGITS
    return (token_id_of(int(number)), None) if is_id else (None, text)


def with_ids(places: Text, token_ids: list[Any]) -> Text:
    """The same places, whose tokens' ids are known.

    Raises:
        BadReply: if there are not as many ids, or if they are other tokens.
    """
    same_length(tokens=places, token_ids=token_ids)
    return tuple(_with_id(each, token_id) for each, token_id in zip(places, token_ids, strict=True))


def _with_id(found: Place, token_id: Any) -> Place:
    token_id = token_id_of(token_id)
    if found.token.token_id not in (None, token_id):
        raise BadReply(f"token {found.token.token_id} has the id {token_id} elsewhere in the reply")
    token = found.token._replace(token_id=token_id)
    top = tuple(token if one == found.token else one for one in found.top)
    return Place(token, top, found.rank)


def _place_of_lists(text: Any, logprob: Any, listed: Any, top: int) -> Place:
    token = Candidate(*token_of(text), logprob_of(logprob))
    if not isinstance(listed, dict | None):
        raise OtherForm(f"the candidates of a place are {short(listed)}, and should be an object")
    known = candidates((*token_of(one), value) for one, value in (listed or {}).items())
    return place(token, known, top)


def _place_of(item: Any, top: int) -> Place:
    token_id, text, logprob = _item(item)
    known = candidates(map(_item, _list_of(item.get("top_logprobs"))))
    return place(Candidate(token_id, text, logprob_of(logprob)), known, top)


def _list_of(value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise OtherForm(f"'top_logprobs' is {short(value)}, and should be a list")
    return value or []


def _item(item: Any) -> tuple[int | None, str | None, Any]:
    if not isinstance(item, dict):
        raise OtherForm(f"{short(item)} stands where a token with its log-probability should")
    token_id, text = token_of(item.get("token"))
    found = item.get("id")
    return (token_id_of(found) if type(found) is int else token_id), text, item.get("logprob")
