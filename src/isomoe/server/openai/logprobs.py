"""Log-probabilities as OpenAI's two APIs and vLLM write them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isomoe.engine import TokenLogprob
from isomoe.server.async_engine import AsyncEngine

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not know; vLLM's value."""

Texts = Mapping[int, str]
"""The text of each token."""


async def spell(
    engine: AsyncEngine,
    scored: Iterable[TokenLogprob | None],
    token_ids: Iterable[int] = (),
    *,
    as_ids: bool | None = False,
) -> Texts:
    """The texts of scored tokens and their candidates, and of further tokens.

    Args:
        as_ids: the text is `token_id:` and the number, as it is without a tokenizer.
    """
    wanted = {*token_ids}
    for token in scored:
        if token is not None:
            wanted.add(token.token_id)
            wanted.update([candidate for candidate, _ in token.top])
    if as_ids or not engine.has_tokenizer:
        return {token_id: f"token_id:{token_id}" for token_id in wanted}
    ordered = [*wanted]
    return dict(zip(ordered, await engine.decode_each(ordered), strict=True))


def completion_logprobs(
    token_ids: Sequence[int],
    scored: Sequence[TokenLogprob | None],
    top: int,
    texts: Texts,
    offset: int = 0,
) -> dict[str, Any]:
    """Tokens in the form of /v1/completions.

    Args:
        scored: one for each token; None for a prompt's first.
        top: candidates beside each token.
        offset: where the first token's text begins in the choice's.
    """
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(texts[token_id])
    return {
        "text_offset": offsets,
        "token_logprobs": [token and max(token.logprob, LEAST) for token in scored],
        "tokens": [texts[token_id] for token_id in token_ids],
        "top_logprobs": [token and _candidates(token, top, texts) for token in scored],
    }


def _candidates(token: TokenLogprob, top: int, texts: Texts) -> dict[str, float]:
    """The likeliest tokens by text, and the token itself.

    Of tokens with the same text, such as parts of a character, the likeliest counts.
    """
    found: dict[str, float] = {}
    for token_id, logprob in (*token.top[:top], (token.token_id, token.logprob)):
        found.setdefault(texts[token_id], max(logprob, LEAST))
    return found


def chat_logprobs(scored: Sequence[TokenLogprob], texts: Texts) -> dict[str, Any]:
    """Tokens in the form of /v1/chat/completions."""
    return {
        "content": [
            {
                **_chat_token(texts[token.token_id], token.logprob),
                "top_logprobs": [
                    _chat_token(texts[token_id], each) for token_id, each in token.top
                ],
            }
            for token in scored
        ],
        "refusal": None,
    }


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode())}


def prompt_logprobs(
    scored: Sequence[TokenLogprob | None], top: int, texts: Texts
) -> list[dict[str, Any] | None]:
    """A prompt's tokens in vLLM's form: each token's and its candidates' by token id."""
    return [token and _ranked(token, top, texts) for token in scored]


def _ranked(token: TokenLogprob, top: int, texts: Texts) -> dict[str, Any]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
    listed = dict([(token.token_id, token.logprob), *token.top[:top]])
    return {
        str(token_id): {
            "logprob": max(logprob, LEAST),
            "rank": ranks.get(token_id),
            "decoded_token": texts[token_id],
        }
        for token_id, logprob in listed.items()
    }
