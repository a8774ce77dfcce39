"""What one target said: the tokens that it chose, and what it makes of the baseline's.

Pure data: no engine, no torch. A run saves itself as JSON, so that it can be compared on another
day or another machine.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from isomoe.errors import ConfigError
from isomoe.files import write_atomically

T = TypeVar("T")

Ids = tuple[int, ...]

FORMAT = "isomoe-parity-run/1"
"""Names the file format; a reader refuses any other."""


class Prompt(NamedTuple):
    """A prompt, as ids, as text, or both: `text` encodes to `token_ids` by the model's tokenizer.

    Attributes:
        token_ids: None where there is no tokenizer; a server is then sent the text.
        text: None for random ids without a tokenizer.
        kind: what sort of text it is ("code", "german"), for the report.
    """

    token_ids: Ids | None
    text: str | None = None
    kind: str = ""


class Candidate(NamedTuple):
    """A token that a target could have put in a place.

    Attributes:
        token_id: None from a server that tells only texts.
        text: None where the target tells only ids.
    """

    token_id: int | None
    text: str | None
    logprob: float

    def is_token_of(self, other: "Candidate") -> bool:
        """Whether both are the same token: by id where both have one, else by text."""
        if self.token_id is not None and other.token_id is not None:
            return self.token_id == other.token_id
        return self.text is not None and self.text == other.text


class Place(NamedTuple):
    """One token in its place, and what the target said of that place.

    Attributes:
        token: the token that stands there, with its log-probability in nats.
        top: the likeliest candidates in its place, likeliest first; empty if not told.
        rank: of the token among all of the vocabulary, from 1; None if not known.
    """

    token: Candidate
    top: tuple[Candidate, ...] = ()
    rank: int | None = None

    @property
    def logprob(self) -> float:
        """Of the token that stands there, in nats; NaN where the target tells none."""
        return self.token.logprob

    def logprob_of(self, token: Candidate) -> float | None:
        """What a token got in this place; None if it is not among those recorded."""
        for known in (self.token, *self.top):
            if known.is_token_of(token):
                return known.logprob
        return None


Text = tuple[Place, ...]
"""Consecutive tokens of one prompt's output."""


def token_ids(text: Text) -> Ids | None:
    """The ids of its tokens; None if one has none."""
    found = [place.token.token_id for place in text]
    return None if None in found else tuple(each for each in found if each is not None)


class Composition(NamedTuple):
    """How requests are batched, which moves results within the noise floor.

    Attributes:
        name: for the report.
        batch: how many requests are open at once; None for all.
        backwards: whether the last prompt is sent first.
    """

    name: str
    batch: int | None = None
    backwards: bool = False


TOGETHER = Composition("together")
ALONE = Composition("alone", batch=1)
PAIRS = Composition("in pairs, backwards", batch=2, backwards=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one target gave.

    Attributes:
        name: the target's, as typed, without secrets.
        dialect: how it was spoken to: "engine", "transformers", "sglang", "vllm", "openai", ...
        facts: versions, model, dtype and whatever else its numbers depend on.
        prompts: what it was asked.
        outputs: its own greedy continuation of each prompt.
        scores: teacher-forced, what it says of the baseline's output tokens after each prompt, in
            one prefill; None from a target that cannot score given tokens.
        again: the same as `scores` under other batch compositions, by their names. The baseline
            has these: they are its noise floor.
        gives_logprobs: whether it tells log-probabilities; where it does, NaN is a broken one.
        max_tokens, ignore_eos, top: how it was asked to decode. None where that is not known: a
            file of an older version.
        alone: how many of the last prompts were sent one at a time; None where it is not known.
        seconds: wall time of start, decode and scoring.
        notes: what a reader should know.
        error: why the run is incomplete, if it is; names the target.
    """

    name: str
    dialect: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    outputs: tuple[Text, ...] = ()
    scores: tuple[Text, ...] | None = None
    again: Mapping[str, tuple[Text, ...]] = field(default_factory=dict)
    gives_logprobs: bool = True
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    top: int | None = None
    alone: int | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens of all prompts."""
        return sum(map(len, self.outputs))

    @property
    def mean_logprob(self) -> float:
        """Of the output tokens as they were decoded; NaN if there is none."""
        found = [place.logprob for output in self.outputs for place in output]
        return math.fsum(found) / len(found) if found else math.nan

    def with_note(self, note: str) -> Self:
        """The same run with one more note."""
        return replace(self, notes=(*self.notes, note))

    def save(self, path: Path) -> None:
        """Writes the run as JSON.

        Raises:
            ConfigError: if the file cannot be written.
        """
        document = {
            "format": FORMAT,
            "name": self.name,
            "dialect": self.dialect,
            "facts": dict(self.facts),
            "prompts": [prompt._asdict() for prompt in self.prompts],
            "outputs": _texts_to_json(self.outputs),
            "scores": None if self.scores is None else _texts_to_json(self.scores),
            "again": {name: _texts_to_json(texts) for name, texts in self.again.items()},
            "gives_logprobs": self.gives_logprobs,
            "max_tokens": self.max_tokens,
            "ignore_eos": self.ignore_eos,
            "top": self.top,
            "alone": self.alone,
            "seconds": self.seconds,
            "notes": self.notes,
            "error": self.error,
        }
        write_atomically(path, json.dumps(document))

    @classmethod
    def load(cls, path: Path) -> Self:
        """The run in a file that `save` wrote.

        Raises:
            ConfigError: if it is none.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"file:{path}: not readable as JSON ({error})") from None
        found = document.pop("format", None) if isinstance(document, dict) else None
        if found != FORMAT:
            raise ConfigError(f"file:{path}: its format is {found!r}, not {FORMAT!r}")
        try:
            return cls(
                name=_known(document["name"], str),
                dialect=_known(document["dialect"], str),
                facts=dict(document["facts"]),
                prompts=tuple(map(_prompt, document["prompts"])),
                outputs=_texts(document["outputs"]),
                scores=None if document["scores"] is None else _texts(document["scores"]),
                again={name: _texts(texts) for name, texts in document["again"].items()},
                gives_logprobs=_known(document.get("gives_logprobs", True), bool),
                max_tokens=_maybe(document.get("max_tokens"), int),
                ignore_eos=_maybe(document.get("ignore_eos"), bool),
                top=_maybe(document.get("top"), int),
                alone=_maybe(document.get("alone"), int),
                seconds=_number(document["seconds"]),
                notes=tuple(_known(note, str) for note in document["notes"]),
                error=_maybe(document["error"], str),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"file:{path}: not a whole run ({type(error).__name__}: {error})"
            ) from None


def _texts_to_json(texts: Sequence[Text]) -> list[list[list[Any]]]:
    """Each place as [token, top, rank]; a candidate as [id, text, logprob], NaN as null."""

    def candidate(found: Candidate) -> list[Any]:
        logprob = found.logprob
        return [found.token_id, found.text, logprob if math.isfinite(logprob) else None]

    return [
        [[candidate(place.token), list(map(candidate, place.top)), place.rank] for place in text]
        for text in texts
    ]


def _known(value: Any, kind: type[T]) -> T:
    """A value of exactly this type; raises TypeError for any other."""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _maybe(value: Any, kind: type[T]) -> T | None:
    return None if value is None else _known(value, kind)


def _number(value: Any) -> float:
    return float(value if type(value) is int else _known(value, float))


def _texts(document: Any) -> tuple[Text, ...]:
    def candidate(found: Any) -> Candidate:
        token_id, text, logprob = found
        value = math.nan if logprob is None else _number(logprob)
        return Candidate(_maybe(token_id, int), _maybe(text, str), value)

    return tuple(
        tuple(
            Place(candidate(token), tuple(map(candidate, top)), _maybe(rank, int))
            for token, top, rank in one
        )
        for one in document
    )


def _prompt(document: Any) -> Prompt:
    ids = document["token_ids"]
    return Prompt(
        None if ids is None else tuple(_known(each, int) for each in ids),
        _maybe(document["text"], str),
        _known(document["kind"], str),
    )
