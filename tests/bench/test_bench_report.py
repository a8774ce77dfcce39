import json

from isomoe.bench import OfflineRun, Outcome, Run, ServeReport

CONDITIONS = {"max_concurrency": 4, "request_rate": None}


def outcome(first: float = 0.5, **changes: object) -> Outcome:
    fields = {
        "sent": 0.0,
        "arrivals": (first, first + 0.1, first + 0.2),
        "ended": first + 0.2,
        "prompt_tokens": 10,
        "output_tokens": 3,
        "cached_tokens": 0,
        "is_counted": True,
    }
    return Outcome(**(fields | changes))  # type: ignore[arg-type]


def run(*outcomes: Outcome, seconds: float = 2.0, cpu_seconds: float = 0.1) -> Run:
    return Run(outcomes=outcomes, seconds=seconds, peak=2, cpu_seconds=cpu_seconds)


def test_the_table_has_the_fields_own_lines() -> None:
    report = ServeReport(conditions=CONDITIONS, runs=[run(outcome(0.5), outcome(0.7))])
    lines = [" ".join(line.split()) for line in report.text().splitlines()]
    for line in (
        "Successful requests: 2", "Failed requests: 0", "Maximum request concurrency: 4",
        "Benchmark duration (s): 2.00", "Total input tokens: 20", "Total generated tokens: 6",
        "Request throughput (req/s): 1.00", "Output token throughput (tok/s): 3.00",
        "Total token throughput (tok/s): 13.00", "Peak concurrent requests: 2",
        "Mean TTFT (ms): 600.00", "Median TTFT (ms): 600.00", "P90 TTFT (ms): 680.00",
        "P99 TTFT (ms): 698.00", "Mean TPOT (ms): 100.00", "P99 ITL (ms): 100.00",
        "Median E2EL (ms): 800.00",
    ):  # fmt: skip
        assert line in lines


def test_the_document_has_the_names_of_vllms() -> None:
    report = ServeReport(conditions=CONDITIONS, runs=[run(outcome(0.5), outcome(0.7))])
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["completed"] == 2
    assert document["duration"] == 2.0
    assert document["output_throughput"] == 3.0
    assert document["mean_ttft_ms"] == 600.0
    assert document["p99_ttft_ms"] == 698.0
    assert document["median_e2el_ms"] == 800.0
    assert document["conditions"] == CONDITIONS
    assert document["problems"] == document["notes"] == []
    assert "waves" not in document
    assert "offline" not in document


def test_a_failure_is_a_problem_with_its_first_error() -> None:
    failed = outcome(arrivals=(), error="refused")
    report = ServeReport(conditions=CONDITIONS, runs=[run(outcome(), failed, failed)])
    assert report.problems == ["2 requests failed, the first: refused"]
    assert report.to_json()["failed"] == 2


def test_failures_alone_still_make_a_report() -> None:
    report = ServeReport(conditions=CONDITIONS, runs=[run(outcome(arrivals=(), error="x"))] * 2)
    assert "Mean TTFT (ms):" in report.text()
    document = report.to_json()
    assert document["mean_ttft_ms"] is None
    json.dumps(document, allow_nan=False)


def test_waves_are_compared_with_the_first() -> None:
    waves = [run(outcome(0.6)), run(outcome(0.2, cached_tokens=8))]
    report = ServeReport(conditions=CONDITIONS, runs=waves)
    first, second = report.to_json()["waves"]  # type: ignore[misc]
    assert (first["ttft_ratio"], second["ttft_ratio"]) == (1.0, 3.0)
    assert (first["cached_input_tokens"], second["cached_input_tokens"]) == (0, 8)
    assert report.text().splitlines()[-1].split() == ["2", "200.00", "ms", "3.000", "8/10"]


def test_rounds_are_compared_with_the_offline_engine_and_the_median_counts() -> None:
    runs = [run(outcome(), outcome(), seconds=seconds) for seconds in (2.0, 4.0, 60.0)]
    offline = [OfflineRun(output_tokens=6, seconds=seconds) for seconds in (1.0, 60.0, 3.0)]
    report = ServeReport(conditions=CONDITIONS, runs=runs, offline=offline)
    rates = [(6.0, 3.0, 0.5), (0.1, 1.5, 15.0), (2.0, 0.1, 0.05)]
    names = ("offline_output_throughput", "online_output_throughput", "ratio")
    found = report.to_json()["offline"]
    assert found == {
        **dict(zip(names, (2.0, 1.5, 0.75), strict=True)),
        "rounds": [dict(zip(names, rate, strict=True)) for rate in rates],
    }
    assert report.text().splitlines()[-1].split() == ["median", "2.00", "1.50", "0.750"]
    assert report.problems == []


def test_a_comparison_of_unequal_work_does_not_hold() -> None:
    offline = [OfflineRun(output_tokens=4, seconds=1.0)]
    report = ServeReport(conditions=CONDITIONS, runs=[run(outcome())], offline=offline)
    assert report.problems == ["round 1: 3 tokens online, 4 offline"]


def test_a_reader_is_told_of_uncounted_tokens_and_of_a_busy_load_generator() -> None:
    runs = [run(outcome(is_counted=False), cpu_seconds=1.9)]
    report = ServeReport(conditions=CONDITIONS, runs=runs, notes=["one"])
    given, counted, busy = report.remarks
    assert given == "one"
    assert "counted as chunks" in counted
    assert "busy for 1.9 of 2.0 s" in busy
