"""OpenAI's `/v1/completions` with vLLM's extras.

Source: vLLM's documentation of its OpenAI-compatible server: `prompt` as token ids,
`return_token_ids`, `return_tokens_as_token_ids`, and `prompt_logprobs`, a list with an object for
each token of the prompt, keyed by token id, that holds the token itself and the likeliest ones.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from isomoe.parity.run import Candidate, Ids, Place, Prompt, Text
from isomoe.parity.targets.dialect import (
    SAMPLE_IDS,
    Asked,
    Dialect,
    Encoder,
    Request,
    Scorer,
    ids_of,
    ids_or_text,
)
from isomoe.parity.targets.openai_form import COMPLETIONS, body_of, places_of, usage_of, with_ids
from isomoe.parity.targets.reading import (
    BadReply,
    OtherForm,
    candidates,
    check_count,
    check_output,
    check_spelling,
    logprob_of,
    member,
    only_choice,
    place,
    short,
    token_id_of,
)

_MOST = 20
"""vLLM's default of --max-logprobs; more would be refused."""
_NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLM(Dialect):
    """Token ids in and out.

    Attributes:
        as_ids: whether tokens come as `token_id:17`, as old versions and servers without a
            tokenizer have it. Else they come as texts, and their ids beside them.
    """

    name: ClassVar[str] = "vllm"
    as_ids: bool = False

    @property
    def sample(self) -> Prompt:
        return SAMPLE_IDS

    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        body = body_of(
            model,
            asked.max_tokens,
            prompt=ids_or_text(prompt),
            logprobs=min(asked.top, _MOST),
            ignore_eos=asked.ignore_eos,
            return_token_ids=not self.as_ids,
            return_tokens_as_token_ids=self.as_ids,
            **_NEUTRAL,
        )
        return Request(COMPLETIONS, body)

    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        choice = only_choice(reply)
        logprobs = choice.get("logprobs")
        member(logprobs, "tokens", list)
        output = places_of(logprobs, asked.top)
        if not self.as_ids:
            output = with_ids(output, member(choice, "token_ids", list))
        elif any(each.token.token_id is None for each in output):
            raise OtherForm("tokens come without their ids")
        usage = usage_of(reply)
        check_count(usage.get("completion_tokens"), len(output), "output tokens")
        if prompt.token_ids is not None:
            check_count(usage.get("prompt_tokens"), len(prompt.token_ids), "prompt tokens")
        check_output(output, choice.get("finish_reason"), asked.max_tokens, full=asked.ignore_eos)
        return output

    def scorers(self) -> tuple[Scorer, ...]:
        return (VLLMScorer(),)

    def encoder(self) -> Encoder:
        return VLLMEncoder()


class VLLMScorer(Scorer):
    """Prompt and output as one prompt; the one token that must be generated is dropped."""

    def request(self, model: str | None, prompt: Prompt, output: Text, top: int) -> Request:
        body = body_of(
            model,
            1,
            prompt=ids_of(prompt, output),
            prompt_logprobs=min(top, _MOST),
            **_NEUTRAL,
        )
        return Request(COMPLETIONS, body)

    def read(self, reply: Any, prompt: Prompt, output: Text, top: int) -> Text:
        ids = ids_of(prompt, output)
        check_count(usage_of(reply).get("prompt_tokens"), len(ids), "tokens")
        listed = member(only_choice(reply), "prompt_logprobs", list)
        if len(listed) != len(ids):
            raise BadReply(f"'prompt_logprobs' has {len(listed)} entries for {len(ids)} tokens")
        last = len(output)
        found = tuple(
            _scored(each, token_id, top)
            for each, token_id in zip(listed[-last:], ids[-last:], strict=True)
        )
        check_spelling(output, found)
        return found


class VLLMEncoder(Encoder):
    """vLLM's `/tokenize`."""

    def request(self, model: str | None, text: str) -> Request:
        named = {} if model is None else {"model": model}
        return Request("/tokenize", {**named, "prompt": text})

    def read(self, reply: Any) -> Ids:
        ids = member(reply, "tokens", list)
        if not ids:
            raise OtherForm("'tokens' is empty")
        return tuple(map(token_id_of, ids))


def _scored(listed: Any, token_id: int, top: int) -> Place:
    if not isinstance(listed, dict):
        raise BadReply(f"{short(listed)} stands where a token's log-probabilities should")
    if str(token_id) not in listed:
        raise BadReply(f"token {token_id} was sent, and others were scored: {short(list(listed))}")
    own = member(listed, str(token_id), dict)
    known = candidates(
        (token_id_of(int(one)), _text(value), value.get("logprob"))
        for one, value in listed.items()
        if one.isdecimal() and isinstance(value, dict)
    )
    rank = own.get("rank")
    token = Candidate(token_id, _text(own), logprob_of(own.get("logprob")))
    return place(token, known, top, rank if type(rank) is int else None)


def _text(value: dict[str, Any]) -> str | None:
    found = value.get("decoded_token")
    return found if isinstance(found, str) and not found.startswith("token_id:") else None
