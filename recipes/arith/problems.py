"""Arithmetic word problems with worked solutions, drawn from a seed.

Standard library only. A problem's solution is a function of its question: each story has several
wordings of the question and one of the solution, so that a model trained on the problems has
little to hesitate about. Training and held-out problems differ in their numbers: see `split_of`.

    >>> from recipes.arith.problems import problems
    >>> problem = problems(seed=0, split="test", n=1)[0]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

from recipes.arith.stories import STORIES, Draw

SPLITS = ("train", "test")
TEST_SHARE = 32
"""One in so many combinations of story and numbers is held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question, its solution in GSM8K's format (last line `#### 42`) and the result."""

    question: str
    answer: str
    final: int
    story: str


def split_of(story: str, question: str) -> str:
    """The split that a question belongs to: a hash of its story and of the numbers in it.

    Names, objects and the wording do not count, so no training problem has the numbers of a
    held-out one, told as the same story about somebody else. The order of the numbers does not
    count either.
    """
    numbers = sorted(map(int, re.findall(r"\d+", question)))
    digest = blake2b(f"{story}:{numbers}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def stream(seed: int, split: str) -> Iterator[Problem]:
    """Problems of one split without end, possibly repeated. Deterministic in its arguments."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    draw = Draw(f"{split}:{seed}")
    while True:
        function = draw.pick(*STORIES)
        told = function(draw)
        if told.final < 2:  # a wording such as "1 cookies are left"
            continue
        if split_of(function.__name__, told.question) == split:
            answer = "\n".join((*told.steps, f"#### {told.final}"))
            yield Problem(
                question=told.question, answer=answer, final=told.final, story=function.__name__
            )


def problems(seed: int, split: str, n: int) -> list[Problem]:
    """`n` different problems of a split ("train" or "test"). Deterministic in its arguments."""

    def fresh() -> Iterator[Problem]:
        seen: set[str] = set()
        for problem in stream(seed, split):
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem

    return list(islice(fresh(), n))
