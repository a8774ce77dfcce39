"""Limits that a user sets: in nats, or in times the floor."""

import json
from pathlib import Path

import pytest
from noisy_runs import (
    ROUNDING,
    baseline_run,
    gaussian,
    noisy_run,
    parted,
)

from isomoe.errors import ConfigError
from isomoe.parity.compare import compare
from isomoe.parity.noise import Noise
from isomoe.parity.run import Run
from isomoe.parity.thresholds import Thresholds
from isomoe.parity.verdict import Judgement, Verdict, judge

BASELINE = baseline_run()
NOISE = Noise.of(BASELINE)


def judged(other: Run, thresholds: Thresholds | None = None) -> Judgement:
    return judge(compare(BASELINE, other), NOISE, thresholds)


def test_pinned_limits_decide_in_place_of_the_floor() -> None:
    far = noisy_run("other", gaussian(8 * ROUNDING), 2)
    assert judged(far, Thresholds(mean=0.2, max=2.0)).verdict is Verdict.AGREES
    near = noisy_run("other", gaussian(ROUNDING), 2)
    gap = judged(parted(near, 1, -0.001), Thresholds(max=0.2))
    assert gap.verdict is Verdict.DIFFERS
    assert gap.reasons[0].startswith("free-running max"), "where they part counts"
    assert "outputs part, or end, early" in gap.notes[0]
    found = judged(near, Thresholds(max=1e-4))
    assert found.verdict is Verdict.DIFFERS
    assert "teacher-forced max |delta logprob| is" in found.reasons[0]
    assert "above the pinned 0.0001" in found.reasons[0]


def test_a_pinned_margin_is_the_margin() -> None:
    rough = noisy_run("other", gaussian(4 * ROUNDING), 2)
    assert judged(rough, Thresholds(margin=8)).verdict is Verdict.AGREES


def test_thresholds_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    file.write_text(json.dumps({"mean": 0.04, "max": 1, "false_alarm": 1e-6}))
    assert Thresholds.load(file) == Thresholds(mean=0.04, max=1, false_alarm=1e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "must be an object with any of false_alarm, margin, mean, max"),
        ('{"men": 1}', "unknown 'men'; known are false_alarm, margin, mean, max"),
        ('{"mean": "0.1"}', "mean '0.1': must be a number"),
        ('{"max": true}', "max True: must be a number"),
        ('{"mean": -1}', "mean -1: must be at least 0 nats"),
        ('{"mean": NaN}', "mean nan: must be at least 0 nats"),
        ('{"margin": 0.5}', "margin 0.5: must be at least 1"),
        ('{"false_alarm": 0}', "false_alarm 0: must be between 0 and 1"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "limits.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Thresholds.load(file)
    assert str(caught.value).startswith(f"--thresholds {file}: ")
    assert says in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--thresholds .*none\.json: not readable"):
        Thresholds.load(tmp_path / "none.json")
