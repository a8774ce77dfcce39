"""Runs of a made-up model, with as much noise as a test wants: what the statistics are tried on."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random

from isomoe.parity.run import Candidate, Place, Prompt, Run, Text

VOCABULARY = 60
CHOICES = 5

Noise = Callable[[Random, int, int, int], float]
"""(random, prompt, token, vocabulary id) -> nats that are added to a logit."""


@cache
def gaussian(nats: float) -> Noise:
    """Rounding: no memory."""
    return lambda random, prompt, token, entry: random.gauss(0.0, nats)


def silent(random: Random, prompt: int, token: int, entry: int) -> float:
    """The same bits."""
    return 0.0


@cache
def shifted(nats: float, rounding: float) -> Noise:
    """Rounding, and the same for a token wherever it stands."""
    return lambda random, prompt, token, entry: (
        random.gauss(0.0, rounding) + nats * (1 if entry % 2 else -1)
    )


@cache
def texts(noise: Noise, seed: int, prompts: int, tokens: int) -> tuple[Text, ...]:
    """What one pass of the one model says of its greedy tokens."""
    model, random = Random(7), Random(seed)
    found = []
    for prompt in range(prompts):
        text = []
        for token in range(tokens):
            entries = model.sample(range(VOCABULARY), CHOICES)
            logits = [model.uniform(0, 3) for _ in entries]
            chosen = logits.index(max(logits))
            moved = [
                logit + noise(random, prompt, token, entry)
                for logit, entry in zip(logits, entries, strict=True)
            ]
            total = math.log(math.fsum(map(math.exp, moved)))
            told = [
                Candidate(entry, None, logit - total)
                for entry, logit in zip(entries, moved, strict=True)
            ]
            top = tuple(sorted(told, key=lambda candidate: -candidate.logprob))
            text.append(Place(told[chosen], top, top.index(told[chosen]) + 1))
        found.append(tuple(text))
    return tuple(found)


def noisy_run(
    name: str,
    noise: Noise,
    seed: int,
    *,
    decode: Noise | None = None,
    again: Noise | None = None,
    prompts: int = 24,
    tokens: int = 30,
    dtype: str = "bfloat16",
) -> Run:
    """A run whose passes are each as noisy; `again` makes a baseline of it."""
    size = (prompts, tokens)
    compositions = {} if again is None else {"alone": again, "in pairs, backwards": again}
    return Run(
        name=name,
        dialect="made up",
        facts={"dtype": dtype},
        prompts=tuple(Prompt((index,)) for index in range(prompts)),
        outputs=texts(decode or noise, 10 * seed + 1, *size),
        scores=texts(noise, 10 * seed + 2, *size),
        again={
            how: texts(passed, 10 * seed + 3 + index, *size)
            for index, (how, passed) in enumerate(compositions.items())
        },
    )


ROUNDING = 0.01


def baseline_run(**changes: object) -> Run:
    """A baseline with rounding noise of 0.01 nats in every logit."""
    settings: dict[str, object] = {"again": gaussian(ROUNDING), **changes}
    return noisy_run("baseline", gaussian(ROUNDING), 1, **settings)  # type: ignore[arg-type]


def parted(run: Run, at: int, logprob_of_other: float) -> Run:
    """The run, choosing another token in one place of every output, as far off as given."""
    outputs = []
    for text in run.outputs:
        place = text[at]
        other = Candidate(999, None, logprob_of_other)
        outputs.append((*text[:at], Place(other, (other, place.token)), *text[at + 1 :]))
    return replace(run, outputs=tuple(outputs))
