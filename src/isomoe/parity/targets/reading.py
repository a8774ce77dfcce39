"""Reads the replies of servers, and takes nothing on trust."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from isomoe.errors import ConfigError
from isomoe.parity.run import Candidate, Place, Text

T = TypeVar("T")

MOST_LOGPROB = 1e-3
"""A log-probability is at most 0; softmax in low precision may round it a little above."""
MOST_ID = 1 << 31
"""No vocabulary is so large."""
_MOST_INT = 1 << 53
"""Whole numbers below it are floats, too."""
_FINISHED = ("stop", "length")


class BadReply(Exception):
    """A reply that cannot be right; the message says what is wrong."""


class OtherForm(BadReply):
    """A reply in another form than the dialect's: it may be another dialect."""


class ReadOtherwise(BadReply):
    """A server that takes texts read one as other tokens than it was made of."""


def understood(read: Callable[[], T]) -> T:
    """What `read` makes of a reply.

    Raises:
        OtherForm: also if it stumbles over a type or a number that nobody thought of.
    """
    try:
        return read()
    except ConfigError:
        raise
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise OtherForm(f"the reply cannot be read ({type(error).__name__})") from None


def member(document: Any, name: str, kind: type[T]) -> T:
    """A field that must be there, of this type.

    Raises:
        OtherForm: if it is not.
    """
    if not isinstance(document, dict):
        raise OtherForm(f"{short(document)} stands where an object with {name!r} should")
    found = document.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise OtherForm(f"{name!r} is {short(found)}, and should be of type {kind.__name__}")
    return found


def only_choice(document: Any) -> dict[str, Any]:
    """The one choice of a reply in OpenAI's form.

    Raises:
        OtherForm: if the reply has no choices.
        BadReply: if it has more or fewer.
    """
    choices = member(document, "choices", list)
    if len(choices) != 1:
        raise BadReply(f"{len(choices)} outputs came, 1 was asked for")
    if not isinstance(choices[0], dict):
        raise OtherForm(f"a choice is {short(choices[0])}, and should be an object")
    return choices[0]


def logprob_of(value: Any) -> float:
    """A log-probability, in nats.

    Raises:
        BadReply: if it is none: null, NaN, infinite or positive.
    """
    is_known = type(value) is float and math.isfinite(value)
    if not is_known and not (type(value) is int and abs(value) < _MOST_INT):
        raise BadReply(f"a log-probability is {short(value)}, and should be a finite number")
    if value > MOST_LOGPROB:
        raise BadReply(f"a log-probability is {value:g}, and cannot be positive")
    return float(value)


def token_id_of(value: Any) -> int:
    """A token id.

    Raises:
        OtherForm: if it is none.
    """
    if type(value) is not int or not 0 <= value < MOST_ID:
        raise OtherForm(f"a token id is {short(value)}, and should be a whole number from 0")
    return value


def candidates(found: Iterable[tuple[int | None, str | None, Any]]) -> list[Candidate]:
    """The likeliest tokens of a place, likeliest first; those of probability 0 are left out.

    Raises:
        BadReply: if a log-probability is none.
    """
    known = [
        Candidate(token_id, text, logprob_of(logprob))
        for token_id, text, logprob in found
        if logprob != -math.inf
    ]
    return sorted(known, key=lambda one: -one.logprob)


def place(token: Candidate, top: Sequence[Candidate], most: int, rank: int | None = None) -> Place:
    """A token in its place, with at most `most` candidates.

    Args:
        rank: as the server tells it; None takes it from the likeliest `most`, if the token is one.
            (Servers add the token itself to its candidates, however many are likelier.)
    """
    likeliest = tuple(top[:most])
    if rank is None and any(one.is_token_of(token) for one in likeliest):
        rank = 1 + sum(one.logprob > token.logprob for one in likeliest)
    return Place(token, likeliest, rank)


def same_length(**lists: Sequence[Any]) -> None:
    """Makes sure that lists which go together are equally long.

    Raises:
        BadReply: if they are not.
    """
    lengths = {name: len(found) for name, found in lists.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise BadReply(f"lists that go together differ in length: {listed}")


def check_output(output: Text, finished: Any, max_tokens: int, *, full: bool) -> None:
    """Makes sure that an output is whole.

    Args:
        finished: why it ended.
        full: whether it was asked to go on after end tokens.

    Raises:
        BadReply: if it is not.
    """
    check_finished(finished)
    if not output:
        raise OtherForm("there is no output token")
    if len(output) > max_tokens:
        raise BadReply(f"{len(output)} output tokens came, {max_tokens} were asked for")
    if len(output) < max_tokens and (full or finished == "length"):
        raise BadReply(
            f"{len(output)} of {max_tokens} output tokens came: some are lost, or the context "
            "is full"
        )


def check_finished(reason: Any) -> None:
    """Makes sure that an output ended by itself, or because it was long enough.

    Raises:
        BadReply: if it did not.
    """
    if reason not in _FINISHED:
        raise BadReply(f"the output ended for the reason {short(reason)}")


def check_count(found: Any, sent: int, what: str) -> None:
    """Makes sure that a server counts as many tokens as it was sent, if it counts them.

    Raises:
        BadReply: if it does not.
    """
    if isinstance(found, int) and found != sent:
        raise BadReply(f"{sent} {what} were sent, and the server counts {found}")


def check_spelling(given: Text, found: Text) -> None:
    """Makes sure that a server spells most token ids as the one that they come from.

    A few may differ: servers disagree on parts of characters and on special tokens.

    Raises:
        BadReply: if it does not: its tokenizer is another one.
    """
    pairs = [
        (ours.token, theirs.token)
        for ours, theirs in zip(given, found, strict=True)
        if ours.token.text and theirs.token.text and "\ufffd" not in ours.token.text
    ]
    other = [pair for pair in pairs if _spelling(pair[0]) != _spelling(pair[1])]
    if len(other) > len(pairs) / 2:
        ours, theirs = other[0]
        raise BadReply(
            f"another tokenizer: token {theirs.token_id} is {short(theirs.text)} there and "
            f"{short(ours.text)} at the baseline"
        )


def _spelling(token: Candidate) -> str:
    """The text less what servers write in different ways: a space before a word."""
    return (token.text or "").strip(" \u2581\u0120")


def short(value: Any) -> str:
    """A value as a message shows it: one line of bounded length, in printable characters."""
    try:
        text = "null" if value is None else repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        text = type(value).__name__
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= 80 else f"{text[:77]}..."
