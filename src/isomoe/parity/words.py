"""Outputs as words: what is left to compare where a target tells texts alone. Pure."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

from isomoe.parity.run import Candidate, Place, Run, Text

_WORD = re.compile(r"\s*\S+|\s+")

Decode = Callable[[tuple[int, ...]], str]
"""Token ids to text."""


def words_of(text: str) -> Text:
    """Word by word, each with the blanks before it: joined, they are the text again."""
    return tuple(Place(Candidate(None, word, math.nan)) for word in _WORD.findall(text))


def in_words(run: Run, decode: Decode | None) -> Run:
    """The run's outputs cut at white space, without log-probabilities.

    Args:
        decode: of the model, for a run that tells ids alone; without it such a run stays as it is.
    """
    if run.error is not None:
        return run
    outputs = []
    for output in run.outputs:
        text = _text(output, decode)
        if text is None:
            return run
        outputs.append(words_of(text.strip()))
    return replace(run, outputs=tuple(outputs), scores=None, again={}, gives_logprobs=False)


def _text(output: Text, decode: Decode | None) -> str | None:
    texts = [place.token.text for place in output]
    if None not in texts:
        return "".join(text or "" for text in texts)
    ids = tuple(place.token.token_id or 0 for place in output)
    return None if decode is None else decode(ids)
