"""Answers found in texts, and accuracies of them."""

import pytest

from isomoe.eval import Problem, Share, find_task
from isomoe.eval.scoring import flexible_answer, strict_answer

GSM8K, ARITH = find_task("gsm8k"), find_task("arith")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 3 + 4 = 7.\n#### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("#### $5", None, "5"),
        ("It costs $1,250.00.", None, "1250.00"),
        ("#### -12", "-12", "-12"),
        ("#### 8.", "8", "8"),
        ("#### 5\nQuestion: 9", "5", "9"),
        ("#### 3\n#### 4", "3", "4"),
        ("The answer is 4", None, "4"),
        ("####7", None, "7"),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_gsm8k_extracts_as_the_harness_does(
    text: str, strict: str | None, flexible: str | None
) -> None:
    assert strict_answer(text, GSM8K.strict) == strict
    assert flexible_answer(text) == flexible


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        (" 3 + 4 = 7.\n#### 7", "7"),
        ("#### 7\n", "7"),
        ("#### 7\nand more", None),
        ("is 7 #### 7", None),
        ("\n#### 7.5", None),
        ("\n#### ", None),
    ],
)
def test_arith_wants_the_number_on_the_last_line(text: str, strict: str | None) -> None:
    assert strict_answer(text, ARITH.strict) == strict


def test_the_reference_loses_its_comma_too() -> None:
    problem = Problem(question="q", answer="1000 + 234.\n#### 1,234")
    assert GSM8K.is_right(problem, "#### 1234") == (True, True)
    assert GSM8K.is_right(problem, "it is $1,234.") == (False, True)
    assert GSM8K.is_right(problem, "#### 12345") == (False, False)


def test_prompts_show_solved_problems_first() -> None:
    one, two = Problem(question="a", answer="#### 1"), Problem(question="b", answer="#### 2")
    assert GSM8K.prompt(two) == "Question: b\nAnswer:"
    assert GSM8K.prompt(two, [one]) == "Question: a\nAnswer: #### 1\n\nQuestion: b\nAnswer:"


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (95, 100, 0.8882, 0.9785),
    ],
)
def test_the_interval_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    assert Share(right=right, total=total).interval == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (2, 1), (-1, 1)])
def test_no_accuracy_of_nothing(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        Share(right=right, total=total)
