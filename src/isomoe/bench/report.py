"""The tables and the JSON document of a measurement. Names are those of `vllm bench serve`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from isomoe.bench.metrics import Latency, Run, Summary
from isomoe.bench.offline import OfflineRun

_WIDTH = 50
_LATENCIES = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
_STATISTICS = (("mean", "Mean"), ("p50", "Median"), ("p90", "P90"), ("p99", "P99"))
_BUSY = 0.8
"""Share of a core from which on the load generator may be what is measured."""
_BUSY_SECONDS = 1.0
"""A shorter run is not long enough to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """What a server did under a load.

    Attributes:
        conditions: versions, flags and whatever else the numbers depend on.
        runs: the waves, or the rounds of a comparison.
        offline: the offline engine's batch of each round; empty without a comparison.
        notes: what a reader must know, a sentence each.
    """

    conditions: Mapping[str, object]
    runs: Sequence[Run]
    offline: Sequence[OfflineRun] = ()
    notes: Sequence[str] = ()

    @property
    def total(self) -> Summary:
        """Of all runs."""
        return Summary.of(*self.runs)

    @property
    def problems(self) -> list[str]:
        """Why the measurement does not hold; empty if it does."""
        found = []
        total = self.total
        if total.failed:
            found.append(f"{total.failed} requests failed, the first: {total.first_error}")
        for number, (offline, run) in enumerate(zip(self.offline, self.runs, strict=False), 1):
            online_tokens = Summary.of(run).output_tokens
            if online_tokens != offline.output_tokens:
                found.append(
                    f"round {number}: {online_tokens} tokens online, "
                    f"{offline.output_tokens} offline"
                )
        return found

    @property
    def remarks(self) -> list[str]:
        """`notes`, and what the numbers themselves call for."""
        total = self.total
        found = list(self.notes)
        if not total.is_counted:
            found.append("the server sends no usage: output tokens are counted as chunks")
        if total.cpu_seconds > _BUSY * max(total.seconds, _BUSY_SECONDS):
            found.append(
                f"the load generator was busy for {total.cpu_seconds:.1f} of {total.seconds:.1f} s "
                "and may have held the server up"
            )
        return found

    def to_json(self) -> dict[str, object]:
        """Everything, in milliseconds where a name ends in _ms."""
        document: dict[str, object] = {
            **_document(self.total),
            "conditions": dict(self.conditions),
            "notes": self.remarks,
            "problems": self.problems,
        }
        if self.offline:
            document["offline"] = self._comparison()
        elif len(self.runs) > 1:
            document["waves"] = [
                {**_document(Summary.of(run)), "ttft_ratio": _ttft_ratio(self.runs[0], run)}
                for run in self.runs
            ]
        return document

    def text(self) -> str:
        """The tables."""
        lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
        lines += (f"{name + ':':<{_WIDTH - 10}} {value}" for name, value in self._rows())
        total = self.total
        for (_, short, title), latency in zip(_LATENCIES, _latencies(total), strict=True):
            lines.append(title.center(_WIDTH, "-"))
            for field, name in _STATISTICS:
                value = "-" if latency is None else f"{1e3 * getattr(latency, field):.2f}"
                lines.append(f"{f'{name} {short} (ms):':<{_WIDTH - 10}} {value}")
        lines.append("=" * _WIDTH)
        if self.offline:
            lines += self._comparison_lines()
        elif len(self.runs) > 1:
            lines += self._wave_lines()
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, object]]:
        total = self.total
        yield "Successful requests", total.completed
        yield "Failed requests", total.failed
        yield "Maximum request concurrency", self.conditions["max_concurrency"] or "none"
        yield "Request rate configured (req/s)", self.conditions["request_rate"] or "inf"
        yield "Benchmark duration (s)", f"{total.seconds:.2f}"
        yield "Total input tokens", total.input_tokens
        yield "Cached input tokens", total.cached_tokens
        yield "Total generated tokens", total.output_tokens
        yield "Request throughput (req/s)", f"{total.request_throughput:.2f}"
        yield "Output token throughput (tok/s)", f"{total.output_throughput:.2f}"
        yield "Total token throughput (tok/s)", f"{total.total_throughput:.2f}"
        yield "Peak concurrent requests", total.peak
        yield "Load generator CPU (s)", f"{total.cpu_seconds:.2f}"

    def _wave_lines(self) -> Iterator[str]:
        yield f"{'wave':>4} {'mean TTFT':>12} {'first/this':>10} {'cached/input tokens':>21}"
        for number, run in enumerate(self.runs, start=1):
            wave = Summary.of(run)
            ratio = _ttft_ratio(self.runs[0], run)
            ttft = "-" if wave.ttft is None else f"{1e3 * wave.ttft.mean:.2f} ms"
            tokens = f"{wave.cached_tokens}/{wave.input_tokens}"
            yield f"{number:>4} {ttft:>12} {_shown(ratio):>10} {tokens:>21}"

    def _comparison(self) -> dict[str, object]:
        *rounds, middle = self._rates()
        return {
            **_comparison_document(*middle),
            "rounds": [_comparison_document(*rates) for rates in rounds],
        }

    def _comparison_lines(self) -> Iterator[str]:
        yield f"{'round':>6} {'offline tok/s':>15} {'online tok/s':>15} {'online/offline':>15}"
        names = [*map(str, range(1, len(self.offline) + 1)), "median"]
        for name, (offline, online) in zip(names, self._rates(), strict=True):
            ratio = _shown(_ratio(offline, online))
            yield f"{name:>6} {offline:>15.2f} {online:>15.2f} {ratio:>15}"

    def _rates(self) -> list[tuple[float, float]]:
        """Output tokens a second, offline and online, of each round, and their medians."""
        offline = [run.output_tokens / run.seconds for run in self.offline]
        online = [Summary.of(run).output_throughput for run in self.runs]
        return [*zip(offline, online, strict=True), (median(offline), median(online))]


def _document(summary: Summary) -> dict[str, object]:
    document: dict[str, object] = {
        "completed": summary.completed,
        "failed": summary.failed,
        "first_error": summary.first_error,
        "duration": round(summary.seconds, 6),
        "total_input_tokens": summary.input_tokens,
        "cached_input_tokens": summary.cached_tokens,
        "total_output_tokens": summary.output_tokens,
        "request_throughput": round(summary.request_throughput, 3),
        "output_throughput": round(summary.output_throughput, 3),
        "total_token_throughput": round(summary.total_throughput, 3),
        "max_concurrent_requests": summary.peak,
        "client_cpu_seconds": round(summary.cpu_seconds, 3),
    }
    for (key, _, _), latency in zip(_LATENCIES, _latencies(summary), strict=True):
        for field, name in _STATISTICS:
            value = None if latency is None else round(1e3 * getattr(latency, field), 3)
            document[f"{name.lower()}_{key}_ms"] = value
    return document


def _latencies(summary: Summary) -> tuple[Latency | None, ...]:
    """In the order of `_LATENCIES`."""
    return summary.ttft, summary.tpot, summary.itl, summary.e2e


def _ttft_ratio(first: Run, other: Run) -> float | None:
    """How much sooner the first token comes, in the mean; None if nothing came."""
    before, after = Summary.of(first).ttft, Summary.of(other).ttft
    return None if before is None or after is None else round(before.mean / after.mean, 3)


def _comparison_document(offline: float, online: float) -> dict[str, object]:
    return {
        "offline_output_throughput": round(offline, 3),
        "online_output_throughput": round(online, 3),
        "ratio": _ratio(offline, online),
    }


def _ratio(offline: float, online: float) -> float | None:
    """Online by offline; None if the latter made no token."""
    return round(online / offline, 3) if offline else None


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
