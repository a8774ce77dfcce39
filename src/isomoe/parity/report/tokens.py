"""The tokens of every prompt as compact JSON, of which the page builds what a reader expands.

The size is bounded. Where not all fit, the prompts and the places with the largest deltas stay.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isomoe.parity.report.model import Report, TokenView, is_forced, token_views
from isomoe.parity.report.words import Decode, readable, token_text, visible
from isomoe.parity.run import Candidate, Place, Prompt
from isomoe.parity.verdict import Row

MOST_BYTES = 9_000_000
"""Of all tokens and candidates on a page; at most half of it for the tokens themselves."""
_TOKEN_BYTES = 32
_CANDIDATE_BYTES = 12
"""What one of them takes, on average."""
MOST_PROMPT = 4_000
"""Characters shown of a prompt."""
_MOST_PROMPTS = 600_000
"""Characters shown of all prompts."""

_UNITS = 10_000
"""Log-probabilities are written as whole numbers of 1/10,000 nat."""


class _Texts:
    """The texts of all tokens, each once; a token is an index into them."""

    def __init__(self, decode: Decode | None) -> None:
        self._decode = decode
        self._index: dict[tuple[int | None, str | None], int] = {}
        self.texts: list[str] = []
        self.ids: list[int | None] = []

    def index(self, token: Candidate) -> int:
        key = (token.token_id, token.text)
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.texts)
            self.texts.append(visible(token_text(token, self._decode)))
            self.ids.append(token.token_id)
        return found


def token_data(report: Report, decode: Decode | None = None) -> dict[str, Any]:
    """Of all rows: what `page.js` reads.

    "texts" and "ids" are the vocabulary; "prompts" the prompts' texts; "rows" has for each row and
    prompt the tokens `t`, the baseline's logprobs `l`, the deltas `d`, the other's ranks `r`, the
    place of the first difference `at` and what the other chose there `o`, and the candidates `c`
    of both sides in each place; null for a prompt that was left out.
    """
    texts = _Texts(decode)
    rows = [row for row in report.rows if row.comparison.prompts]
    most_bytes = MOST_BYTES // max(1, len(rows))
    found = {id(row): _row(row, texts, most_bytes) for row in rows}
    return {
        "prompts": _prompt_texts(report.baseline.prompts, decode),
        "rows": [found.get(id(row), []) for row in report.rows],
        "texts": texts.texts,
        "ids": texts.ids,
    }


def _prompt_texts(prompts: Sequence[Prompt], decode: Decode | None) -> list[str]:
    most = min(MOST_PROMPT, _MOST_PROMPTS // max(1, len(prompts)))
    return [readable(_bounded(_prompt_text(prompt, decode), most)) for prompt in prompts]


def _prompt_text(prompt: Prompt, decode: Decode | None) -> str:
    if prompt.text is not None:
        return prompt.text
    ids = prompt.token_ids or ()
    if decode is None:
        return " ".join(f"#{one}" for one in ids)
    return "".join(map(decode, ids))


def _bounded(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    left = text[: most // 2]
    right = text[len(text) - most // 2 :]
    return f"{left}\n[… {len(text) - len(left) - len(right):,} characters …]\n{right}"


def _row(row: Row, texts: _Texts, most_bytes: int) -> list[dict[str, Any] | None]:
    views = {index: token_views(row, index) for index in range(len(row.comparison.prompts))}
    shown = _prompts_that_fit(views, most_bytes // 2 // _TOKEN_BYTES)
    left = most_bytes - _TOKEN_BYTES * sum(len(views[index]) for index in shown)
    fitting = {index: views[index] for index in shown}
    places = _places_that_fit(fitting, left // _CANDIDATE_BYTES)
    return [
        _prompt(row, index, found, places, texts) if index in shown else None
        for index, found in views.items()
    ]


def _prompts_that_fit(views: Mapping[int, Sequence[TokenView]], most: int) -> set[int]:
    worst = sorted(views, key=lambda index: -max(map(_weight, views[index]), default=0.0))
    found: set[int] = set()
    for index in worst:
        if len(views[index]) <= most:
            most -= len(views[index])
            found.add(index)
    return found


def _places_that_fit(views: Mapping[int, Sequence[TokenView]], most: int) -> set[tuple[int, int]]:
    """(prompt, place) of those whose candidates are shown."""
    sizes = {
        (index, place): (_weight(view), _candidates(view))
        for index, found in views.items()
        for place, view in enumerate(found)
    }
    chosen = set()
    for key, (_, size) in sorted(sizes.items(), key=lambda item: -item[1][0]):
        most -= size
        if most < 0:
            break
        chosen.add(key)
    return chosen


def _weight(view: TokenView) -> float:
    """|delta|; what is not finite, or was not compared, weighs most and least."""
    if view.delta is None:
        return 0.0 if view.theirs is None else math.inf
    return abs(view.delta) if math.isfinite(view.delta) else math.inf


def _candidates(view: TokenView) -> int:
    return len(view.ours.top) + (len(view.theirs.top) if view.theirs else 0)


def _prompt(
    row: Row,
    index: int,
    views: Sequence[TokenView],
    places: set[tuple[int, int]],
    texts: _Texts,
) -> dict[str, Any]:
    parting = row.comparison.prompts[index].first_difference
    chosen = parting.other if parting is not None else None
    return {
        "forced": is_forced(row),
        "t": [texts.index(view.ours.token) for view in views],
        "l": [_units(view.ours.logprob) for view in views],
        "d": [_short(view.delta) for view in views],
        "r": [view.theirs.rank if view.theirs else None for view in views],
        "at": parting.place if parting is not None else None,
        "o": texts.index(chosen) if chosen is not None else None,
        "c": [
            [_side(view.ours, texts), _side(view.theirs, texts)]
            if (index, place) in places
            else None
            for place, view in enumerate(views)
        ],
    }


def _side(place: Place | None, texts: _Texts) -> list[int | None]:
    """Token, logprob, token, logprob, ..."""
    return [
        value
        for one in (place.top if place else ())
        for value in (texts.index(one), _units(one.logprob))
    ]


def _units(logprob: float) -> int | None:
    return round(logprob * _UNITS) if math.isfinite(logprob) else None


def _short(delta: float | None) -> float | str | None:
    """Three digits; null where nothing was compared, "nan" where it is not finite."""
    if delta is None:
        return None
    return float(f"{delta:.3g}") if math.isfinite(delta) else "nan"
