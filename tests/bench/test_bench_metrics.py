from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.bench import Latency, Outcome, Run, Summary
from isomoe.bench.metrics import percentile

SECONDS = st.floats(0.0, 1e6)


@given(st.lists(SECONDS, min_size=1, max_size=50), st.floats(0.0, 100.0))
def test_a_percentile_is_numpys(samples: list[float], percent: float) -> None:
    found = percentile(sorted(samples), percent)
    assert found == pytest.approx(np.percentile(samples, percent), rel=1e-9, abs=1e-9)


@given(st.lists(SECONDS, min_size=1))
def test_percentiles_are_ordered_and_within_the_samples(samples: list[float]) -> None:
    latency = Latency.of(samples)
    assert latency is not None
    ladder = [min(samples), latency.p50, latency.p90, latency.p99, max(samples)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(ladder))


def test_known_percentiles() -> None:
    assert Latency.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Latency(mean=3.0, p50=3.0, p90=4.6, p99=4.96)
    assert Latency.of([7.0]) == Latency(mean=7.0, p50=7.0, p90=7.0, p99=7.0)
    assert Latency.of([]) is None


def outcome(**changes: object) -> Outcome:
    fields = {
        "sent": 10.0,
        "arrivals": (10.5, 10.6, 10.9),
        "ended": 11.0,
        "prompt_tokens": 7,
        "output_tokens": 5,
        "cached_tokens": 3,
        "is_counted": True,
    }
    return Outcome(**(fields | changes))  # type: ignore[arg-type]


def test_a_requests_latencies() -> None:
    one = outcome()
    assert one.ttft == pytest.approx(0.5)
    assert one.tpot == pytest.approx(0.4 / 4), "by tokens, of which a chunk may hold several"
    assert one.itl == pytest.approx([0.1, 0.3])
    assert one.e2e == pytest.approx(1.0)
    assert outcome(arrivals=(10.5,), output_tokens=1).tpot is None


def test_a_summary_adds_runs_up_and_leaves_failures_out_of_the_latencies() -> None:
    failed = outcome(arrivals=(), error="refused", ended=99.0)
    runs = [
        Run(outcomes=(outcome(), failed), seconds=2.0, peak=2, cpu_seconds=0.25),
        Run(outcomes=(outcome(arrivals=(11.5, 11.6)),), seconds=3.0, peak=1, cpu_seconds=0.5),
    ]
    total = Summary.of(*runs)
    assert (total.completed, total.failed, total.first_error) == (2, 1, "refused")
    assert (total.input_tokens, total.output_tokens, total.cached_tokens) == (14, 10, 6)
    assert (total.seconds, total.peak, total.cpu_seconds) == (5.0, 2, 0.75)
    assert total.request_throughput == pytest.approx(2 / 5)
    assert total.output_throughput == pytest.approx(10 / 5)
    assert total.total_throughput == pytest.approx(24 / 5)
    assert total.ttft is not None
    assert total.ttft.mean == pytest.approx(1.0)
    assert total.itl is not None
    assert total.itl.mean == pytest.approx((0.1 + 0.3 + 0.1) / 3)
    assert total.e2e is not None
    assert total.e2e.p99 == pytest.approx(1.0)
    assert total.is_counted
    assert not Summary.of(runs[0], Run(
        outcomes=(outcome(is_counted=False),), seconds=1.0, peak=1, cpu_seconds=0.0
    )).is_counted  # fmt: skip


def test_a_summary_of_failures_has_no_latencies() -> None:
    run = Run(outcomes=(outcome(arrivals=(), error="x"),), seconds=1.0, peak=1, cpu_seconds=0.0)
    total = Summary.of(run)
    assert total.ttft is total.tpot is total.itl is total.e2e is None
    assert total.output_throughput == 0.0
