"""Student's distribution."""

import pytest
from noisy_runs import (
    baseline_run,
)
from scipy import stats

from isomoe.parity.noise import Noise
from isomoe.parity.student import exceeds, upper_tail

BASELINE = baseline_run()
NOISE = Noise.of(BASELINE)


@pytest.mark.parametrize("freedom", [1, 2, 5, 19, 95, 2000])
@pytest.mark.parametrize("t", [-3.0, 0.0, 0.3, 1.0, 4.6, 12.0, 40.0])
def test_students_tail_is_scipys(t: float, freedom: int) -> None:
    assert upper_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-8, abs=1e-300)


def test_fewer_than_two_values_exceed_nothing() -> None:
    assert exceeds([], 0.0) == exceeds([1e9], 0.0) == 1.0


def test_two_values_that_happen_to_be_alike_are_not_certain() -> None:
    assert exceeds([0.1, 0.1], 0.0) > 0.05
