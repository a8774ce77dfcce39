"""Tokens to text as they come.

The reference decodes the whole output at once after each token, and looks for stop texts in all of
it: slow, and with no state that could be wrong.
"""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.engine import Delta, FinishReason, Request, SamplingParams, TokenLogprob, Update
from isomoe.engine.reply import Reply, Transcript
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_checkpoint())


def request(**params: object) -> Request:
    return Request(
        request_id=0,
        prompt_token_ids=(5, 6),
        params=SamplingParams(**params),  # type: ignore[arg-type]
        max_tokens=99,
    )


def replied(
    request: Request, token_ids: list[int], reason: FinishReason | None = None
) -> list[Delta]:
    """The deltas of these tokens, up to the one that ends the reply."""
    reply = Reply(request, tokenizer())
    deltas = []
    for place, token in enumerate(token_ids):
        last = place == len(token_ids) - 1
        deltas.append(reply.take(Update(0, (token,), reason if last else None)))
        assert reply.finish_reason is deltas[-1].finish_reason
        if reply.finish_reason is not None:
            break
    return deltas


def expected(
    token_ids: list[int], stops: tuple[str, ...], min_tokens: int
) -> tuple[str, str | None]:
    """The text, and the stop text that ends it."""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer().decode(token_ids[:count])
        whole = count == len(token_ids)
        # Characters that may yet become whole are no text so far.
        text = text if whole else text.rstrip("\N{REPLACEMENT CHARACTER}")
        if count < min_tokens:
            continue
        found = [(text.find(stop), stop) for stop in stops if text.find(stop) >= 0]
        if found:
            at, stop = min(found)
            return text[:at], stop
    return tokenizer().decode(token_ids), None


TEXTS = st.text(st.sampled_from("ab 1\né€漢🙂"), max_size=30)


@given(
    text=TEXTS,
    stops=st.lists(st.text(st.sampled_from("ab 1é"), min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_are_the_text_up_to_the_first_stop_text(text: str, stops: list[str]) -> None:
    ids = list(tokenizer().encode(text))
    if not ids:
        return
    deltas = replied(request(stop=tuple(stops)), ids, FinishReason.LENGTH)
    wanted, stop = expected(ids, tuple(stops), 0)
    assert "".join(delta.text for delta in deltas) == wanted
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].finish_reason is (FinishReason.STOP if stop else FinishReason.LENGTH)


def test_no_piece_holds_a_part_of_a_stop_text() -> None:
    ids = list(tokenizer().encode("12 and 3 and"))
    deltas = replied(request(stop=(" and 3",)), ids, FinishReason.LENGTH)
    assert "".join(delta.text for delta in deltas) == "12"
    deltas = replied(request(stop=(" and 4",)), ids, FinishReason.LENGTH)
    assert "".join(delta.text for delta in deltas) == "12 and 3 and"


def test_a_character_of_several_tokens_comes_whole_or_at_the_end() -> None:
    ids = list(tokenizer().encode("🙂"))
    assert len(ids) > 1
    assert [delta.text for delta in replied(request(), ids)][-1] == "🙂"
    cut = replied(request(), ids[:-1], FinishReason.LENGTH)
    assert "".join(delta.text for delta in cut) == tokenizer().decode(ids[:-1])


def test_a_stop_text_waits_for_min_tokens() -> None:
    ids = list(tokenizer().encode("1 1 1 1 1 1"))
    deltas = replied(request(stop=("1",), min_tokens=3, max_tokens=50), ids, FinishReason.LENGTH)
    assert len(deltas) >= 3
    assert deltas[-1].stop_reason == "1"


def test_the_stop_token_is_named_and_is_no_text() -> None:
    ids = list(tokenizer().encode("1 2 3"))
    deltas = replied(request(stop_token_ids=(ids[-1],)), ids, FinishReason.STOP)
    assert "".join(delta.text for delta in deltas) == tokenizer().decode(ids[:-1])
    assert deltas[-1].stop_reason == ids[-1]
    assert deltas[-1].token_ids == (ids[-1],)


def test_the_models_end_token_is_no_stop_reason() -> None:
    deltas = replied(request(), [*tokenizer().encode("1 2"), 0], FinishReason.STOP)
    assert deltas[-1].stop_reason is None
    assert "".join(delta.text for delta in deltas) == "1 2"


def test_without_detokenize_there_is_no_text() -> None:
    deltas = replied(request(detokenize=False), [40, 41], FinishReason.LENGTH)
    assert [delta.text for delta in deltas] == ["", ""]
    assert [delta.token_ids for delta in deltas] == [(40,), (41,)]


@pytest.mark.parametrize(("start", "first"), [(0, (None,)), (1, ())])
def test_a_transcript_is_the_sum_of_its_deltas(start: int, first: tuple[None, ...]) -> None:
    one = request(prompt_logprobs=0, prompt_logprobs_start=start, logprobs=0)
    scored, chosen = TokenLogprob(6, -1.0), TokenLogprob(40, -2.0)
    transcript = Transcript(one, "prompt")
    transcript.add(Delta(prompt_logprobs=(scored,), cached_tokens=1))
    transcript.add(Delta(text="a", token_ids=(40,), logprobs=(chosen,)))
    transcript.add(Delta(text="b", finish_reason=FinishReason.STOP, stop_reason="x"))
    output = transcript.output()
    assert (output.text, output.token_ids, output.logprobs) == ("ab", (40,), (chosen,))
    assert (output.prompt, output.prompt_logprobs) == ("prompt", (*first, scored))
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "x")
    assert output.cached_tokens == 1
