"""What a target is asked, in which order and company, and what becomes of one that fails."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pytest

from isomoe.parity.measure import Workload, record
from isomoe.parity.run import ALONE, PAIRS, TOGETHER, Candidate, Composition, Place, Prompt, Text
from isomoe.parity.targets.base import Progress, Target, TargetError

PROMPTS = tuple(Prompt((number,)) for number in range(10))
WORK = Workload(prompts=PROMPTS, max_tokens=2)


@contextmanager
def quiet(_: str) -> Iterator[None]:
    yield None


class Asked(Target):
    """Answers with what it is asked, and remembers in which company."""

    dialect = "made up"

    def __init__(self, name: str = "it", can_score: bool = True, breaks: bool = False) -> None:
        self.name = name
        self.can_score = can_score
        self.asked: list[tuple[str, Composition, list[int]]] = []
        self.given: list[Text] = []
        self._breaks = breaks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def facts(self) -> Mapping[str, Any]:
        return {}

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        ignore_eos: bool,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        if self._breaks:
            raise TargetError(f"{self.name}: broke off")
        return self._answers("decode", prompts, composition)

    def score(
        self,
        prompts: Sequence[Prompt],
        outputs: Sequence[Text],
        *,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        self.given += outputs
        return self._answers("score", prompts, composition)

    def _answers(
        self, what: str, prompts: Sequence[Prompt], composition: Composition
    ) -> list[Text]:
        numbers = [(prompt.token_ids or ())[0] for prompt in prompts]
        self.asked.append((what, composition, numbers))
        return [(Place(Candidate(number, self.name, -1.0)),) for number in numbers]


FIRST, LAST = list(range(8)), [8, 9]


def test_the_last_fifth_is_sent_one_at_a_time_and_each_part_is_scored_as_it_was_decoded() -> None:
    target = Asked()
    baseline = record(target, WORK, reference=None, stage=quiet)
    assert target.asked == [
        ("decode", TOGETHER, FIRST),
        ("score", TOGETHER, FIRST),
        ("decode", ALONE, LAST),
        ("score", ALONE, LAST),
        ("score", ALONE, FIRST + LAST),
        ("score", PAIRS, FIRST + LAST),
    ]
    assert [text[0].token.token_id for text in baseline.outputs] == FIRST + LAST
    assert [text[0].token.token_id for text in baseline.scores or ()] == FIRST + LAST
    assert baseline.alone == 2
    assert list(baseline.again) == ["alone", "in pairs, backwards"]


def test_another_target_is_batched_alike_and_scores_the_baselines_tokens() -> None:
    baseline = record(Asked(), WORK, reference=None, stage=quiet)
    other = Asked("other")
    found = record(other, WORK, reference=baseline, stage=quiet)
    assert [asked[1:] for asked in other.asked] == [
        (TOGETHER, FIRST),
        (TOGETHER, FIRST),
        (ALONE, LAST),
        (ALONE, LAST),
    ]
    assert other.given == list(baseline.outputs)
    assert (found.alone, found.again) == (2, {})


def test_a_target_that_cannot_score_is_decoded_again_for_a_floor() -> None:
    target = Asked(can_score=False)
    baseline = record(target, WORK, reference=None, stage=quiet)
    assert baseline.scores is None
    assert target.asked[2:] == [("decode", ALONE, FIRST + LAST), ("decode", PAIRS, FIRST + LAST)]


@pytest.mark.parametrize(("count", "alone"), [(4, 0), (5, 1), (120, 24), (1000, 24)])
def test_a_fifth_but_no_more_than_24_are_alone(count: int, alone: int) -> None:
    work = Workload(prompts=(Prompt((1,)),) * count, max_tokens=1)
    assert count - work.num_together == alone


def test_all_are_together_where_none_is_to_be_alone() -> None:
    target = Asked()
    work = Workload(prompts=PROMPTS, max_tokens=1, alone=0)
    assert record(target, work, reference=None, stage=quiet).alone == 0
    assert target.asked[:2] == [
        ("decode", TOGETHER, FIRST + LAST),
        ("score", TOGETHER, FIRST + LAST),
    ]


def test_a_target_that_fails_is_a_run_with_an_error_and_a_baseline_ends_it_all() -> None:
    baseline = record(Asked(), WORK, reference=None, stage=quiet)
    found = record(Asked("other", breaks=True), WORK, reference=baseline, stage=quiet)
    assert (found.error, found.outputs) == ("other: broke off", ())
    with pytest.raises(TargetError, match="it: broke off"):
        record(Asked(breaks=True), WORK, reference=None, stage=quiet)
