"""What `/metrics` tells Prometheus. `docs/grafana-dashboard.json` shows it."""

from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isomoe.server.messages import EngineState, StepStats

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """What one request of the engine came to.

    Attributes:
        prompt_tokens: of its prompt.
        output_tokens: that it brought.
        cached_tokens: of its prompt, found in the prefix cache.
        time_to_first_token: seconds from its arrival; None if there was none.
        end_to_end: seconds from its arrival to its end.
        outcome: a `FinishReason`, or `error`.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    time_to_first_token: float | None
    end_to_end: float
    outcome: str


class Metrics:
    """The counts and times of one server. Every method is called on the event loop, and cheap."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _Engine()
        self._registry.register(self._engine)
        self._requests = self._counter("requests", "Requests that ended, by how.", "outcome")
        self._responses = self._counter("http_responses", "HTTP answers, by status.", "status")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._cached = self._counter("cached_prompt_tokens", "Those that the prefix cache held.")
        self._output = self._counter("generation_tokens", "Output tokens of requests that ended.")
        self._step = self._histogram("step_time", "One step of the engine.", _SHORT)
        self._first = self._histogram("time_to_first_token", "Arrival to first output.", _LONG)
        self._inter = self._histogram("inter_token_latency", "Between two output tokens.", _SHORT)
        self._whole = self._histogram("e2e_request_latency", "Arrival to end.", _LONG)

    @property
    def last_step(self) -> float:
        """When the engine last told of a step, in monotonic seconds."""
        return self._engine.last_step

    def on_step(self, stats: StepStats) -> None:
        """Counts one step of the engine."""
        self._engine.add(stats)
        self._step.observe(stats.step_seconds)

    def on_state(self, state: EngineState) -> None:
        """Takes the engine's state between two steps; an abort can change it without a step."""
        self._engine.take(state)

    def on_inter_token(self, seconds: float, tokens: int) -> None:
        """Counts `tokens` of one request, the last of them `seconds` after those before."""
        for _ in range(tokens):
            self._inter.observe(seconds / tokens)

    def on_request(self, request: FinishedRequest) -> None:
        """Counts a request that ended."""
        self._requests.labels(request.outcome).inc()
        self._prompt.inc(request.prompt_tokens)
        self._cached.inc(request.cached_tokens)
        self._output.inc(request.output_tokens)
        self._whole.observe(request.end_to_end)
        if request.time_to_first_token is not None:
            self._first.observe(request.time_to_first_token)

    def on_response(self, status: int) -> None:
        """Counts an HTTP answer."""
        self._responses.labels(str(status)).inc()

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"isomoe_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"isomoe_{name}_seconds", what, buckets=buckets, registry=self._registry)


class _Engine(Collector):
    """The engine as it was last heard of, and what all its steps came to.

    A step only leaves its numbers here; metrics are made of them when somebody asks.
    """

    def __init__(self) -> None:
        self.last_step = 0.0
        self._waiting = 0
        self._retracted = 0
        self._by_rank: dict[str, Sequence[int]] = {}
        self._rows: Tally[int] = Tally()
        self._collective_rows: Tally[str] = Tally()

    def add(self, stats: StepStats) -> None:
        """Takes in one step."""
        self.last_step = monotonic()
        self._waiting, self._retracted = stats.waiting, stats.retracted
        self._by_rank = {
            "running_requests": stats.running,
            "kv_used_pages": stats.used_pages,
            "kv_cached_pages": stats.cached_pages,
            "kv_total_pages": stats.total_pages,
        }
        self._rows.update(dict(enumerate(stats.rows)))
        self._collective_rows.update(stats.collective_rows)

    def take(self, state: EngineState) -> None:
        """Takes the state between two steps."""
        self._waiting, self._retracted = state.waiting, state.retracted
        self._by_rank = {
            "running_requests": [group.running for group in state.groups],
            "kv_used_pages": [group.used_pages for group in state.groups],
            "kv_cached_pages": [group.cached_pages for group in state.groups],
            "kv_total_pages": [group.total_pages for group in state.groups],
        }

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        yield GaugeMetricFamily("isomoe_waiting_requests", "In the queue.", self._waiting)
        yield CounterMetricFamily(
            "isomoe_retracted_requests", "Put back for want of KV pages.", self._retracted
        )
        for name, what in (
            ("running_requests", "Requests that hold KV pages."),
            ("kv_used_pages", "KV pages that requests use."),
            ("kv_cached_pages", "KV pages of prefixes that no request uses."),
            ("kv_total_pages", "KV pages in all."),
        ):
            gauge = GaugeMetricFamily(f"isomoe_{name}", what, labels=["dp_rank"])
            for rank, value in enumerate(self._by_rank.get(name, ())):
                gauge.add_metric([str(rank)], value)
            yield gauge
        rows = CounterMetricFamily("isomoe_step_rows", "Rows of all steps.", labels=["dp_rank"])
        for rank, count in self._rows.items():
            rows.add_metric([str(rank)], count)
        yield rows
        moved = CounterMetricFamily(
            "isomoe_collective_rows", "Rows through collectives.", labels=["op", "axis"]
        )
        for key, count in self._collective_rows.items():
            moved.add_metric(key.split(" ", 1), count)
        yield moved
