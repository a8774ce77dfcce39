"""Runs made by hand, large or hostile as a test needs them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from isomoe.parity.compare import compare
from isomoe.parity.noise import Noise
from isomoe.parity.report import Report
from isomoe.parity.run import Candidate, Place, Prompt, Run, Text
from isomoe.parity.verdict import Judgement, Row, Verdict

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"
"""A token's text that would leave the element it stands in."""


def text_of(random: Random, tokens: int, candidates: int, noise: float = 0.0) -> Text:
    """The same tokens for the same seed, with log-probabilities that the noise moves."""
    places = []
    for _ in range(tokens):
        chosen = [random.randrange(30_000) for _ in range(candidates)]
        given = [-0.1 - 1.5 * rank - random.random() for rank in range(candidates)]
        moved = [given[rank] + noise * math.sin(7.0 * chosen[rank]) for rank in range(candidates)]
        top = tuple(
            Candidate(token, None, logprob) for token, logprob in zip(chosen, moved, strict=True)
        )
        places.append(Place(top[0], top, 1))
    return tuple(places)


def run_of(name: str, prompts: int, tokens: int, candidates: int, noise: float = 0.0) -> Run:
    """A run over the same prompts and tokens, whatever its name and noise."""
    texts = tuple(
        text_of(Random(index), tokens - index % 3, candidates, noise) for index in range(prompts)
    )
    asked = tuple(
        Prompt((1, 2, index), f"Prompt {index}", "code" if index % 2 else "maths")
        for index in range(prompts)
    )
    return Run(
        name=name,
        dialect="engine",
        facts={"model": "sample", "dtype": "bfloat16", "layout": name},
        prompts=asked,
        outputs=texts,
        scores=texts,
        seconds=1.25,
    )


def with_again(run: Run, noise: float = 0.001) -> Run:
    """The run, with scores of its own tokens under another batch composition."""
    random = Random(3)

    def moved(place: Place) -> Place:
        token = place.token._replace(logprob=place.logprob + random.gauss(0, noise))
        return place._replace(token=token)

    assert run.scores is not None
    return replace(run, again={"alone": tuple(tuple(map(moved, text)) for text in run.scores)})


def with_token(run: Run, prompt: int, place: int, token: Candidate) -> Run:
    """The run, but for one token of one prompt; its candidates stay."""

    def changed(texts: tuple[Text, ...]) -> tuple[Text, ...]:
        text = list(texts[prompt])
        text[place] = replace_token(text[place], token)
        return (*texts[:prompt], tuple(text), *texts[prompt + 1 :])

    assert run.scores is not None
    return replace(run, outputs=changed(run.outputs), scores=changed(run.scores))


def replace_token(place: Place, token: Candidate) -> Place:
    return Place(token, (token, *place.top[1:]), place.rank)


@dataclass(frozen=True)
class FoundBlock:
    """A bisection that found a block, in the form that `parity.bisect` gives."""

    other: str = "far"

    def to_json(self) -> Mapping[str, Any]:
        def point(layer: int, name: str, block: str, median: float) -> dict[str, Any]:
            return {
                "kind": "read",
                "name": f"layers.{layer}.{name}",
                "layer": layer,
                "block": block,
                "block_kind": "experts",
                "placement": "SR",
                "median": median,
                "worst": 2 * median,
                "floor": 0.004,
                "ratio": 1.0,
            }

        curve = [
            point(0, "attn_norm", "embedding", 0.0),
            point(0, "mlp_norm", "layers.0.attn", 0.002),
            point(1, "attn_norm", "layers.0.mlp.experts + layers.0.mlp.shared", 0.8),
            point(1, "mlp_norm", "layers.1.attn", math.nan),
        ]
        sentence = "layer 0, experts (layers.0.mlp.experts): norm ratio 2.00 (double reduce)"
        return {
            "baseline": "base",
            "other": self.other,
            "sentence": sentence,
            "curve": curve,
            "culprit": {"layer": 0, "block": "layers.0.mlp.experts", "sentence": sentence},
        }


def judged(baseline: Run, other: Run, verdict: Verdict, *reasons: str, **found: float) -> Row:
    """One row, with the verdict given."""
    judgement = Judgement(verdict=verdict, reasons=reasons, **found)
    return Row(comparison=compare(baseline, other), judgement=judgement)


def sample() -> Report:
    """Four targets, one of each verdict."""
    base = with_again(run_of("base", 6, 30, 4))
    near = run_of("near", 6, 30, 4, noise=0.001)
    far = with_token(run_of("far", 6, 30, 4, noise=1.0), 2, 5, Candidate(77, None, -0.5))
    assert base.scores is not None
    assert far.scores is not None
    scored = (*far.scores[:2], base.scores[2], *far.scores[3:])
    far = replace(far, scores=scored, notes=("started with --tp 8",))
    gone = Run(name="gone", dialect="vllm", error="gone: no answer within 60 s")
    rows = (
        judged(base, replace(base, name="same"), Verdict.IDENTICAL, "every bit is the same"),
        judged(base, near, Verdict.AGREES, "within the floor", effect=1.1, bias=0.0, chance=0.4),
        judged(base, far, Verdict.DIFFERS, "1,000 times the floor", effect=1e3, chance=1e-20),
        judged(base, gone, Verdict.NOT_COMPARED, "gone: no answer within 60 s"),
    )
    return Report(
        baseline=base,
        source="sample",
        rows=rows,
        noise=Noise.of(base),
        bisections=(FoundBlock(),),
        conditions={"isomoe": "0.1.0"},
    )
