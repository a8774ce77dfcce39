"""SGLang's own `/generate`.

Source: SGLang's documentation of the endpoint and of its sampling parameters. Log-probabilities
come as [logprob, token id, text]; the first of a prompt's has none.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from isomoe.parity.run import Candidate, Ids, Prompt, Text
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
from isomoe.parity.targets.reading import (
    BadReply,
    OtherForm,
    candidates,
    check_count,
    check_output,
    check_spelling,
    logprob_of,
    member,
    place,
    same_length,
    short,
    token_id_of,
)

_PATH = "/generate"


def _sampling(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Greedy, whatever the server's or the model's defaults are."""
    return {
        "max_new_tokens": max_tokens,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        **more,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLang(Dialect):
    """Token ids in and out.

    Attributes:
        spells: whether the server tells texts of tokens; one without a tokenizer cannot.
    """

    name: ClassVar[str] = "sglang"
    spells: bool = True

    @property
    def sample(self) -> Prompt:
        return SAMPLE_IDS

    def request(self, model: str | None, prompt: Prompt, asked: Asked) -> Request:
        found = ids_or_text(prompt)
        body = {
            "text" if isinstance(found, str) else "input_ids": found,
            "sampling_params": _sampling(asked.max_tokens, ignore_eos=asked.ignore_eos),
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": asked.top,
            "return_text_in_logprobs": self.spells,
        }
        return Request(_PATH, body)

    def read(self, reply: Any, prompt: Prompt, asked: Asked) -> Text:
        meta = member(reply, "meta_info", dict)
        output = _places(meta, "output", asked.top)
        ids = [each.token.token_id for each in output]
        if isinstance(given := reply.get("output_ids"), list):
            same_length(output_ids=given, output_token_logprobs=ids)
            if given != ids:
                raise BadReply("'output_ids' are other tokens than 'output_token_logprobs'")
        check_count(meta.get("completion_tokens"), len(output), "output tokens")
        if prompt.token_ids is not None:
            check_count(meta.get("prompt_tokens"), len(prompt.token_ids), "prompt tokens")
        reason = member(meta, "finish_reason", dict).get("type")
        check_output(output, reason, asked.max_tokens, full=asked.ignore_eos)
        return output

    def scorers(self) -> tuple[Scorer, ...]:
        return (SGLangScorer(spells=self.spells),)

    def encoder(self) -> Encoder:
        return SGLangEncoder()

    def served(self, reply: Any) -> Any:
        return reply["meta_info"].get("weight_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangScorer(Scorer):
    """Prompt and output as one prompt, of which nothing is generated."""

    spells: bool = True

    def request(self, model: str | None, prompt: Prompt, output: Text, top: int) -> Request:
        ids = ids_of(prompt, output)
        body = {
            "input_ids": ids,
            "sampling_params": _sampling(0),
            "return_logprob": True,
            # The token at the start comes without a log-probability.
            "logprob_start_len": len(ids) - len(output) - 1,
            "top_logprobs_num": top,
            "return_text_in_logprobs": self.spells,
        }
        return Request(_PATH, body)

    def read(self, reply: Any, prompt: Prompt, output: Text, top: int) -> Text:
        meta = member(reply, "meta_info", dict)
        check_count(meta.get("prompt_tokens"), len(ids_of(prompt, output)), "tokens")
        found = _places(meta, "input", top, last=len(output))
        for ours, theirs in zip(output, found, strict=True):
            if ours.token.token_id != theirs.token.token_id:
                raise BadReply(
                    f"token {theirs.token.token_id} was scored where {ours.token.token_id} was sent"
                )
        check_spelling(output, found)
        return found


class SGLangEncoder(Encoder):
    """The prompt's log-probabilities name its tokens."""

    def request(self, model: str | None, text: str) -> Request:
        body = {
            "text": text,
            "sampling_params": _sampling(0),
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return Request(_PATH, body)

    def read(self, reply: Any) -> Ids:
        meta = member(reply, "meta_info", dict)
        ids = tuple(_entry(each)[1] for each in member(meta, "input_token_logprobs", list))
        check_count(meta.get("prompt_tokens"), len(ids), "prompt tokens")
        return ids


def _places(meta: dict[str, Any], side: str, top: int, last: int | None = None) -> Text:
    """The places of the input or the output, or the `last` so many of them."""
    tokens = member(meta, f"{side}_token_logprobs", list)
    lists: list[Any] = [None] * len(tokens)
    if top:
        lists = member(meta, f"{side}_top_logprobs", list)
        same_length(**{f"{side}_token_logprobs": tokens, f"{side}_top_logprobs": lists})
    if last is not None:
        if len(tokens) < last:
            raise BadReply(f"{len(tokens)} log-probabilities came of {last} tokens")
        tokens, lists = tokens[-last:], lists[-last:]
    places = []
    for token, listed in zip(tokens, lists, strict=True):
        logprob, token_id, text = _entry(token)
        chosen = Candidate(token_id, text, logprob_of(logprob))
        known = candidates((i, t, p) for p, i, t in map(_entry, _as_list(listed)))
        places.append(place(chosen, known, top))
    return tuple(places)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise OtherForm(f"the candidates of a place are {short(value)}, and should be a list")
    return value


def _entry(value: Any) -> tuple[Any, int, str | None]:
    """(logprob, token id, text) of what stands for one token."""
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise OtherForm(f"{short(value)} stands where [logprob, token id, text] should")
    text = value[2] if len(value) > 2 else None
    return value[0], token_id_of(value[1]), text if isinstance(text, str) else None
