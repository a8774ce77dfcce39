"""Servers of OpenAI's API that tell no log-probabilities: texts can be compared, deltas cannot."""

from dataclasses import dataclass
from typing import Any, ClassVar

from isomoe.parity.run import Prompt, Text
from isomoe.parity.targets.dialect import SAMPLE_TEXT, Asked, Dialect, Request, text_of
from isomoe.parity.targets.openai_chat import CHAT_NOTE
from isomoe.parity.targets.openai_form import CHAT, COMPLETIONS, body_of
from isomoe.parity.targets.reading import check_finished, member, only_choice
from isomoe.parity.words import words_of

_NOTE = (
    "no log-probabilities and no tokens, only texts: deltas are not comparable, and a place is a "
    "word"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCompletions(Dialect):
    """`/v1/completions`, texts in and out; end tokens end the output."""

    name: ClassVar[str] = "text-completions"
    gives_logprobs: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = (_NOTE,)

    @property
    def goes_on(self) -> bool:
        return False

    @property
    def sample(self) -> Prompt:
        return SAMPLE_TEXT

    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        return Request(COMPLETIONS, body_of(model, asked.max_tokens, prompt=text_of(prompt)))

    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        choice = only_choice(reply)
        return _words(member(choice, "text", str), choice.get("finish_reason"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChat(Dialect):
    """`/v1/chat/completions`, texts in and out; end tokens end the output."""

    name: ClassVar[str] = "text-chat"
    gives_logprobs: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = (_NOTE, CHAT_NOTE)

    @property
    def goes_on(self) -> bool:
        return False

    @property
    def sample(self) -> Prompt:
        return SAMPLE_TEXT

    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        messages = [{"role": "user", "content": text_of(prompt)}]
        return Request(CHAT, body_of(model, asked.max_tokens, messages=messages))

    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        choice = only_choice(reply)
        text = member(member(choice, "message", dict), "content", str)
        return _words(text, choice.get("finish_reason"))


def _words(text: str, finished: Any) -> Text:
    check_finished(finished)
    return words_of(text)
