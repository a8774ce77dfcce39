"""Finds out which dialect a server speaks: the first whose tiny request it answers as it should."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from isomoe.errors import ConfigError
from isomoe.parity.run import Text
from isomoe.parity.targets.dialect import Asked, Dialect, Scorer
from isomoe.parity.targets.http_client import Barred, JsonClient, Refused
from isomoe.parity.targets.openai_chat import Chat
from isomoe.parity.targets.openai_completions import Completions
from isomoe.parity.targets.reading import BadReply, OtherForm, ReadOtherwise, understood
from isomoe.parity.targets.sglang import SGLang
from isomoe.parity.targets.text_only import TextChat, TextCompletions
from isomoe.parity.targets.vllm import VLLM

DIALECTS: tuple[Dialect, ...] = (
    SGLang(spells=True),
    SGLang(spells=False),
    VLLM(as_ids=False),
    VLLM(as_ids=True),
    Completions(takes_ids=True, takes_more=True),
    Completions(takes_ids=False, takes_more=True),
    Completions(takes_ids=False, takes_more=False),
    Chat(takes_more=True),
    Chat(takes_more=False),
    TextCompletions(),
    TextChat(),
)
"""The most telling one first; those of one name are variants, of which the first is the best."""

NAMES = tuple(dict.fromkeys(each.name for each in DIALECTS))
"""What `--dialect` takes."""

_ASKED = Asked(max_tokens=2, ignore_eos=True, top=2)


class Spoken(NamedTuple):
    """How a server is spoken to.

    Attributes:
        scorer: None if it cannot score given tokens.
        why_not: what it said when it was asked to.
    """

    dialect: Dialect
    scorer: Scorer | None
    why_not: str


async def detect(client: JsonClient, model: str | None, forced: str | None) -> Spoken:
    """The best dialect that the server speaks.

    Args:
        forced: the name of the only one to be tried.

    Raises:
        ConfigError: if `forced` is no dialect.
        TargetError: if the server speaks none, or answers what cannot be right.
    """
    if forced is not None and forced not in NAMES:
        raise ConfigError(f"--dialect {forced}: must be one of {', '.join(NAMES)}")
    refusals: dict[str, str] = {}
    barred: str | None = None
    for dialect in DIALECTS:
        if forced not in (None, dialect.name):
            continue
        try:
            request = dialect.request(model, dialect.sample, _ASKED)
            reply = await client.ask(*request)
            output = _read(dialect, reply)
        except Barred as error:
            barred = barred or str(error)
        except (Refused, OtherForm) as error:
            refusals.setdefault(dialect.name, str(error))
        except BadReply as error:
            raise client.error(f"{dialect.name}: {error}") from None
        else:
            scorer, why_not = await _scorer(client, model, dialect, output)
            return Spoken(dialect, scorer, why_not)
    if barred is not None:
        raise client.error(barred)
    raise client.error(f"speaks no known dialect ({_listed(refusals.items())})")


async def _scorer(
    client: JsonClient, model: str | None, dialect: Dialect, output: Text
) -> tuple[Scorer | None, str]:
    why_not = ""
    for scorer in dialect.scorers():
        try:
            reply = await client.ask(*scorer.request(model, dialect.sample, output, _ASKED.top))
            _scored(scorer, dialect, reply, output)
        except (Refused, OtherForm, ConfigError) as error:
            why_not = str(error)
        except ReadOtherwise:
            return scorer, ""  # it scores; our sample was an unlucky one
        except BadReply as error:
            raise client.error(f"{dialect.name}: {error}") from None
        else:
            return scorer, ""
    return None, why_not


def _read(dialect: Dialect, reply: Any) -> Text:
    return understood(lambda: dialect.read(reply, dialect.sample, _ASKED))


def _scored(scorer: Scorer, dialect: Dialect, reply: Any, output: Text) -> Text:
    return understood(lambda: scorer.read(reply, dialect.sample, output, _ASKED.top))


def _listed(refusals: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refusals)
