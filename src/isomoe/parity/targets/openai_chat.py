"""OpenAI's `/v1/chat/completions` with `logprobs`: a free-running comparison, no scoring."""

from dataclasses import dataclass
from typing import Any, ClassVar

from isomoe.parity.run import Prompt, Text
from isomoe.parity.targets.dialect import SAMPLE_TEXT, Asked, Dialect, Request, text_of
from isomoe.parity.targets.openai_form import CHAT, body_of, places_of
from isomoe.parity.targets.reading import check_output, only_choice

_MOST = 20
"""OpenAI's limit of candidates."""
CHAT_NOTE = (
    "prompts are sent as a user's messages, so that the server's chat template surrounds them: "
    "fair only beside another chat server"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Dialect):
    """Texts in and out.

    Attributes:
        takes_more: whether it takes fields that OpenAI does not have: `ignore_eos`.
    """

    name: ClassVar[str] = "openai-chat"
    notes: ClassVar[tuple[str, ...]] = (CHAT_NOTE,)
    takes_more: bool = False

    @property
    def goes_on(self) -> bool:
        return self.takes_more

    @property
    def sample(self) -> Prompt:
        return SAMPLE_TEXT

    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        more = {"ignore_eos": asked.ignore_eos} if self.takes_more else {}
        body = body_of(
            model,
            asked.max_tokens,
            messages=[{"role": "user", "content": text_of(prompt)}],
            logprobs=True,
            top_logprobs=min(asked.top, _MOST),
            **more,
        )
        return Request(CHAT, body)

    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        choice = only_choice(reply)
        output = places_of(choice.get("logprobs"), asked.top)
        check_output(output, choice.get("finish_reason"), asked.max_tokens, full=False)
        return output
