"""Numbers in words, and token texts that can be seen."""

import math
import unicodedata
from collections.abc import Callable

from isomoe.parity.run import Candidate

Decode = Callable[[int], str]
"""The text of one token id."""

UNKNOWN = "—"
"""Stands where a number is not known, or not finite."""

_LEAST_CHANCE = 1e-12


def number(value: float | None) -> str:
    """Three digits; a dash where it is not known or not finite."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.3g}"


def share(value: float | None) -> str:
    """A share as percent, never rounded up to all."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{math.floor(value * 1000) / 10:.1f}%"


def times(value: float | None) -> str:
    """An effect size, in times the noise floor."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return f"{value:,.0f}x" if abs(value) >= 1000 else f"{value:.3g}x"


def odds(chance: float | None) -> str:
    """A probability as odds: 0.0001 is "1 in 10,000"."""
    if chance is None or math.isnan(chance):
        return UNKNOWN
    if chance < _LEAST_CHANCE:
        return "less than 1 in 10^12"
    if chance > 0.5:
        return "over 1 in 2"
    against = 1.0 / chance
    if against < 10:
        return f"1 in {against:.2g}"
    digits = 1 - math.floor(math.log10(against))
    return f"1 in {round(against, digits):,.0f}"


def token_text(token: Candidate, decode: Decode | None) -> str:
    """The text of a token: its own, else the tokenizer's, else its id."""
    if token.text is not None:
        return token.text
    if token.token_id is None:
        return "?"
    return decode(token.token_id) if decode is not None else f"#{token.token_id}"


def visible(text: str) -> str:
    """A text whose spaces, line ends and control characters can be seen."""
    return "".join(map(_visible, text)) or "∅"


def readable(text: str) -> str:
    """A text as it is, except that what shows nothing, or moves other letters, can be seen."""
    return "".join(letter if letter in " \n" else _visible(letter) for letter in text)


def one_line(text: str) -> str:
    """A text in one line, whose control characters can be seen instead of being obeyed."""
    return "".join(letter if letter == " " else _visible(letter) for letter in text)


def _visible(letter: str) -> str:
    known = _SIGNS.get(letter)
    if known is not None:
        return known
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    if unicodedata.category(letter) in _UNSEEN:
        return f"⟨{ord(letter):x}⟩"
    return letter


_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
"""Unicode categories of characters that show nothing, or move others (bidi controls)."""
