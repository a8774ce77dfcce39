"""Plans are chosen to run so that every step has run, and few of them."""

from types import SimpleNamespace
from typing import cast

from isomoe.layout import Mesh, Parallelism, RegimePlan
from isomoe.prove.cover import Candidate, cover
from isomoe.prove.subject import Subject

MESH = Mesh.of(Parallelism())


def plans(*made_of: str, subjects: str = "") -> list[Candidate]:
    """Plans with a letter for each step; those of one letter in `subjects` are of one subject."""
    of = {letter: cast(Subject, SimpleNamespace()) for letter in subjects or map(str, made_of)}
    return [
        Candidate(of[whose], MESH, cast(RegimePlan, SimpleNamespace(reads=steps)), frozenset(steps))
        for whose, steps in zip(subjects or made_of, made_of, strict=True)
    ]


def run(candidates: list[Candidate]) -> list[str]:
    return [str(one.plan.reads) for one in cover(candidates)]


def test_plans_that_alone_have_a_step_make_others_needless() -> None:
    assert run(plans("bcde", "abc", "dex")) == ["abc", "dex"]


def test_short_plans_go_first() -> None:
    assert run(plans("aaab", "ab")) == ["ab"]


def test_of_two_plans_that_of_a_subject_whose_ranks_are_built_runs() -> None:
    first, second = cover(plans("abc", "dx", "dx", subjects="121"))
    assert first.subject is second.subject


def test_every_step_is_run() -> None:
    made_of = ("abc", "bcd", "cde", "aef", "xa", "xb")
    assert set("".join(run(plans(*made_of)))) == set("".join(made_of))
    assert run([]) == []
