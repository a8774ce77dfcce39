"""Which plans are run, so that each step of every plan has been run: a cheap cover of them all."""

from collections.abc import Iterator
from typing import NamedTuple

from isomoe.layout import Mesh, RegimePlan
from isomoe.prove.subject import Subject

_ONE = 1 << 40
"""What a step is worth that only one plan has. In integers: sums do not depend on their order."""
_BUILDING = 0.5
"""What building the ranks of a subject takes, as a part of running a plan on them."""


class Candidate(NamedTuple):
    """A plan, and the steps of which it is made."""

    subject: Subject
    mesh: Mesh
    plan: RegimePlan
    steps: frozenset[object]


def cover(candidates: list[Candidate]) -> Iterator[Candidate]:
    """Plans that together have every step; short ones go first, with many new steps that few others
    have."""
    having: dict[object, list[int]] = {}
    of_subject: dict[int, list[int]] = {}
    for at, one in enumerate(candidates):
        of_subject.setdefault(id(one.subject), []).append(at)
        for step in one.steps:
            having.setdefault(step, []).append(at)
    costs = [(1 + _BUILDING) * len(one.plan.reads) for one in candidates]
    worth = [sum(_ONE // len(having[step]) for step in one.steps) for one in candidates]
    scores = [value / cost for value, cost in zip(worth, costs, strict=True)]
    while having:
        best = scores.index(max(scores))
        one = candidates[best]
        yield one
        changed = of_subject.pop(id(one.subject), [])
        for at in changed:
            costs[at] = len(candidates[at].plan.reads)
        for step in one.steps & having.keys():
            plans = having.pop(step)
            for at in plans:
                worth[at] -= _ONE // len(plans)
            changed += plans
        for at in changed:
            scores[at] = worth[at] / costs[at]
