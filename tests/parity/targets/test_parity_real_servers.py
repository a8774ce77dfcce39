"""Servers and transformers on one checkpoint, beside our engine, in fp32."""

import importlib.metadata
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from asking import decode, score, server, target
from gguf_file import write_gguf
from peers import llama_cpp, transformers_serve

from isomoe.errors import ConfigError
from isomoe.parity.run import ALONE, PAIRS, TOGETHER, Prompt, Text
from isomoe.parity.targets.base import TargetError
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint
from servers import running

MOST = 1e-4
"""Nats between two programs that compute the same in fp32."""
TOKENS = 24


class Spoken(NamedTuple):
    prompts: tuple[Prompt, ...]
    outputs: list[Text]
    scores: list[Text]


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    tokenizer = Tokenizer(bundled_checkpoint())
    lines = (bundled_checkpoint() / "heldout.jsonl").read_text().splitlines()[:5]
    texts = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    return tuple(Prompt(tuple(tokenizer.encode(text)), text) for text in texts)


@pytest.fixture(scope="module")
def ours(prompts: tuple[Prompt, ...]) -> Spoken:
    """What our engine says."""
    with target("tp1") as engine:
        outputs = decode(engine, prompts, max_tokens=TOKENS, top=5)
        return Spoken(prompts, outputs, score(engine, outputs, prompts, top=5))


@pytest.fixture(scope="module")
def our_server() -> Iterator[str]:
    with running("--dtype", "float32", "--device", "cpu") as found:
        yield found.url


def ids(texts: list[Text]) -> list[list[int | None]]:
    return [[place.token.token_id for place in text] for text in texts]


def check_close(ours: list[Text], theirs: list[Text]) -> None:
    """The same tokens, and log-probabilities that rounding in fp32 explains."""
    assert ids(theirs) == ids(ours)
    for mine, their in zip(ours, theirs, strict=True):
        for one, other in zip(mine, their, strict=True):
            assert abs(one.logprob - other.logprob) < MOST
            assert other.rank == one.rank or one.rank is None
            for first, second in zip(one.top, other.top, strict=False):
                assert abs(first.logprob - second.logprob) < MOST


@pytest.mark.parametrize("dialect", ["sglang", "vllm"])
def test_our_server_says_the_same_as_our_engine(
    ours: Spoken, our_server: str, dialect: str
) -> None:
    with target(our_server, dialect=dialect) as found:
        assert found.can_score
        outputs = decode(found, ours.prompts, max_tokens=TOKENS, top=5)
        scores = score(found, ours.outputs, ours.prompts, top=5, composition=PAIRS)
    check_close(ours.outputs, outputs)
    check_close(ours.scores, scores)


def test_our_server_is_taken_for_sglang_and_encodes_as_the_tokenizer(
    ours: Spoken, our_server: str
) -> None:
    texts = tuple(prompt._replace(token_ids=None) for prompt in ours.prompts)
    with target(our_server) as found:
        assert found.dialect == "sglang"
        assert tuple(found.encode(texts)) == ours.prompts
    with target(our_server, dialect="vllm") as found:
        assert tuple(found.encode(texts)) == ours.prompts


def test_our_server_echoes_scores(ours: Spoken, our_server: str) -> None:
    with target(our_server, dialect="openai-completions") as found:
        assert found.can_score
        check_close(ours.scores, score(found, ours.outputs, ours.prompts))


def test_our_server_chats_with_logprobs(ours: Spoken, our_server: str) -> None:
    with target(our_server, dialect="openai-chat") as found:
        assert (found.can_score, found.gives_logprobs) == (False, True)
        outputs = decode(found, ours.prompts)
        with pytest.raises(TargetError, match=r"cannot score given tokens"):
            score(found, outputs, ours.prompts)
    assert all(math.isfinite(place.logprob) for output in outputs for place in output)


def test_transformers_say_the_same_as_our_engine(ours: Spoken) -> None:
    with target(f"hf:{bundled_checkpoint()}") as found:
        facts = found.facts()
        for composition in (ALONE, PAIRS, TOGETHER):
            outputs = decode(found, ours.prompts, max_tokens=TOKENS, top=5, composition=composition)
            scores = score(found, ours.outputs, ours.prompts, top=5, composition=composition)
            check_close(ours.outputs, outputs)
            check_close(ours.scores, scores)
        texts = tuple(prompt._replace(token_ids=None) for prompt in ours.prompts)
        assert tuple(found.encode(texts)) == ours.prompts
    assert facts["transformers"] == importlib.metadata.version("transformers")
    assert (facts["dtype"], facts["torch"]) == ("float32", torch.__version__)


def test_transformers_end_at_end_tokens(ours: Spoken) -> None:
    with target("tp1") as engine:
        wanted = engine.generate(
            ours.prompts, max_tokens=120, ignore_eos=False, top=1, composition=TOGETHER
        )
    with target(f"hf:{bundled_checkpoint()}") as found:
        outputs = found.generate(
            ours.prompts, max_tokens=120, ignore_eos=False, top=1, composition=TOGETHER
        )
    assert len({len(output) for output in wanted}) > 1
    assert ids(outputs) == ids(wanted)


def test_what_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=rf"^hf:{tmp_path}: transformers cannot load it \("):
        target(f"hf:{tmp_path}").__enter__()


def test_llama_cpp_says_the_same_as_our_engine(ours: Spoken, tmp_path: Path) -> None:
    write_gguf(bundled_checkpoint(), tmp_path / "model.gguf")
    with llama_cpp(tmp_path / "model.gguf") as url, server(url, timeout_seconds=60) as found:
        assert (found.dialect, found.can_score) == ("openai-completions", False)
        assert found.gives_logprobs
        assert "scores no given tokens" in " ".join(found.notes)
        outputs = decode(found, ours.prompts, max_tokens=TOKENS, composition=ALONE)
    check_close(ours.outputs, outputs)


@pytest.mark.slow
def test_transformers_serve_tells_texts_alone(ours: Spoken) -> None:
    tokenizer = Tokenizer(bundled_checkpoint())
    with (
        transformers_serve(bundled_checkpoint()) as url,
        server(url, timeout_seconds=120) as found,
    ):
        assert found.dialect == "text-completions"
        assert (found.can_score, found.gives_logprobs) == (False, False)
        assert "not comparable" in " ".join(found.notes)
        outputs = decode(found, ours.prompts, max_tokens=TOKENS)
        with pytest.raises(ConfigError, match=r"takes texts, and the prompts are token ids"):
            decode(found, (Prompt((1, 2, 3)),))
    texts = ["".join(place.token.text or "" for place in output) for output in outputs]
    assert all(math.isnan(place.logprob) for output in outputs for place in output)
    for text, output in zip(texts, ours.outputs, strict=True):
        wanted = tokenizer.decode([place.token.token_id or 0 for place in output])
        assert wanted.startswith(text)
        assert text
