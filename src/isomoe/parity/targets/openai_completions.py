"""OpenAI's plain `/v1/completions`, with `logprobs`, and with `echo` where the server has it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from isomoe.errors import ConfigError
from isomoe.parity.run import Candidate, Ids, Place, Prompt, Text, token_ids
from isomoe.parity.targets.dialect import (
    SAMPLE_IDS,
    SAMPLE_TEXT,
    Asked,
    Dialect,
    Request,
    Scorer,
    ids_or_text,
    text_of,
)
from isomoe.parity.targets.openai_form import COMPLETIONS, body_of, places_of, usage_of
from isomoe.parity.targets.reading import (
    OtherForm,
    ReadOtherwise,
    check_count,
    check_output,
    check_spelling,
    only_choice,
    short,
)

_MOST = 5
"""OpenAI's limit of candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions(Dialect):
    """Texts out, and ids or texts in.

    Attributes:
        takes_ids: whether the server takes token ids as a prompt.
        takes_more: whether it takes fields that OpenAI does not have: `ignore_eos`.
    """

    name: ClassVar[str] = "openai-completions"
    takes_ids: bool = False
    takes_more: bool = False

    @property
    def goes_on(self) -> bool:
        return self.takes_more

    @property
    def sample(self) -> Prompt:
        return SAMPLE_IDS if self.takes_ids else SAMPLE_TEXT

    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        more = {"ignore_eos": asked.ignore_eos} if self.takes_more else {}
        body = body_of(
            model,
            asked.max_tokens,
            prompt=ids_or_text(prompt) if self.takes_ids else text_of(prompt),
            logprobs=max(1, min(asked.top, _MOST)),
            **more,
        )
        return Request(COMPLETIONS, body)

    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        choice = only_choice(reply)
        output = places_of(choice.get("logprobs"), asked.top)
        if self.takes_ids and prompt.token_ids is not None:
            counted = usage_of(reply).get("prompt_tokens")
            check_count(counted, len(prompt.token_ids), "prompt tokens")
        check_output(output, choice.get("finish_reason"), asked.max_tokens, full=False)
        return output

    def scorers(self) -> tuple[Scorer, ...]:
        return tuple(EchoScorer(takes_ids=self.takes_ids, max_tokens=each) for each in (0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoScorer(Scorer):
    """Prompt and output as one prompt, which is echoed with its log-probabilities.

    Attributes:
        takes_ids: whether the server takes token ids as a prompt. Where it takes texts, it may
            read the output as other tokens than were decoded, which is an error.
        max_tokens: how many are generated, and dropped: 0, or 1 where the server refuses 0.
    """

    takes_ids: bool
    max_tokens: int

    def request(self, model: str | None, prompt: Prompt, output: Text, top: int) -> Request:
        ids = self._ids(prompt, output)
        body = body_of(
            model,
            self.max_tokens,
            prompt=text_of(prompt) + _text_of(output) if ids is None else ids,
            logprobs=max(1, min(top, _MOST)),
            echo=True,
        )
        return Request(COMPLETIONS, body)

    def read(self, reply: Any, prompt: Prompt, output: Text, top: int) -> Text:
        logprobs = only_choice(reply).get("logprobs")
        listed = logprobs.get("tokens") if isinstance(logprobs, dict) else None
        if not isinstance(listed, list):
            raise OtherForm("no log-probabilities came of what was to be echoed")
        end = len(listed) - self.max_tokens
        ids = self._ids(prompt, output)
        if end < len(output) or (ids is not None and end != len(ids)):
            sent = len(output) if ids is None else len(ids)
            raise OtherForm(f"{end} tokens were echoed, {sent} were sent")
        found = places_of(logprobs, top, end - len(output), end)
        if ids is None:
            _check_texts(output, found)
            return found
        check_spelling(output, found)
        return tuple(map(_as_sent, found, ids[-len(output) :]))

    def _ids(self, prompt: Prompt, output: Text) -> Ids | None:
        """Both as ids, where the server takes them and all are known."""
        known = token_ids(output)
        if not self.takes_ids or prompt.token_ids is None or known is None:
            return None
        return (*prompt.token_ids, *known)


def _as_sent(found: Place, token_id: int) -> Place:
    token = Candidate(token_id, found.token.text, found.token.logprob)
    return found._replace(
        token=token, top=tuple(token if one == found.token else one for one in found.top)
    )


def _text_of(output: Text) -> str:
    texts = [each.token.text for each in output]
    if None in texts:
        raise ConfigError(
            "this server scores texts, and the baseline tells token ids alone; take a baseline "
            "that tells texts"
        )
    return "".join(each for each in texts if each is not None)


def _check_texts(output: Text, found: Text) -> None:
    for index, (ours, theirs) in enumerate(zip(output, found, strict=True)):
        if ours.token.text != theirs.token.text:
            raise ReadOtherwise(
                f"output token {index} was {short(ours.token.text)} and is read as "
                f"{short(theirs.token.text)}: another tokenizer, or a text that can be read in two "
                "ways; --dialect openai-chat compares without scoring"
            )
