"""The tables and the JSON document of `isomoe bench offline`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from isomoe.bench.device import DeviceLimits
from isomoe.bench.floors import ModelCounts
from isomoe.bench.offline_engine import ExpertCount
from isomoe.bench.offline_workload import Floor, OfflineWorkload, Sample
from isomoe.bench.profile import CATEGORIES, GAPS, Breakdown
from isomoe.units import scaled

_FILE_WIDTH = 160
"""Columns of the tables where the output is no terminal."""


@dataclass(slots=True, eq=False)
class WorkloadResult:
    """What one workload gave.

    Attributes:
        samples: one for each repeat.
        floor: None where it is not known, as with several ranks.
    """

    workload: OfflineWorkload
    samples: list[Sample] = field(default_factory=list)
    floor: Floor | None = None
    experts: ExpertCount | None = None
    breakdown: Breakdown | None = None

    @property
    def values(self) -> list[float]:
        """The figure of each repeat."""
        return [self.workload.value(sample) for sample in self.samples]

    @property
    def value(self) -> float:
        """Their median."""
        return median(self.values)

    @property
    def share(self) -> float | None:
        """Of the limit: 1 would be the floor itself."""
        if self.floor is None:
            return None
        if self.workload.figure.lower_is_better:
            return self.floor.value / self.value
        return self.value / self.floor.value

    def to_json(self, counts: ModelCounts, peers: Mapping[str, Any] | None) -> dict[str, object]:
        """Everything, with what other engines reach."""
        work = self.workload
        document: dict[str, object] = {
            **work.to_json(),
            "value": self.value,
            "values": self.values,
            "samples": [
                {"seconds": sample.seconds, "first_seconds": sample.first_seconds}
                for sample in self.samples
            ],
        }
        document.update(self._others())
        if self.floor is not None:
            seconds = median(work.work_seconds(sample) for sample in self.samples)
            document["floor"] = {
                "of": floor_of(work),
                **self.floor.work.to_json(),
                "seconds": self.floor.seconds,
                "value": self.floor.value,
            }
            document["share"] = self.share
            document["reached"] = {
                "bytes_per_s": self.floor.work.bytes / seconds,
                "flops_per_s": self.floor.work.flops / seconds,
            }
        if self.experts is not None:
            expected = counts.expected_experts(self.experts.rows)
            document["experts"] = {**self.experts.to_json(), "expected": round(expected, 3)}
        if self.breakdown is not None:
            document["profile"] = self.breakdown.to_json()
        if peers is not None:
            document["peers"] = peers_of(peers, work.name)
        return document

    def _others(self) -> dict[str, float]:
        """Figures that come along."""
        inputs, outputs = sum(self.workload.input_lens), sum(self.workload.output_lens)
        seconds = median(sample.seconds for sample in self.samples)
        found = {"output_tokens_per_s": outputs / seconds}
        found["total_tokens_per_s"] = (inputs + outputs) / seconds
        firsts = [s.first_seconds for s in self.samples if s.first_seconds is not None]
        if firsts:
            found["prefill_seconds"] = median(firsts)
        return found


def peers_of(peers: Mapping[str, Any], workload: str) -> dict[str, float]:
    """What each engine reaches on a workload, by its name."""
    return {engine["name"]: engine[workload] for engine in peers["engines"] if workload in engine}


def best_peer(peers: Mapping[str, Any] | None, work: OfflineWorkload) -> tuple[str, float] | None:
    """The best of them, if any ran it."""
    found = peers_of(peers, work.name) if peers is not None else {}
    if not found:
        return None
    best = min if work.figure.lower_is_better else max
    return best(found.items(), key=lambda item: item[1])


def console() -> Console:
    """Where tables go."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = _FILE_WIDTH
    return made


def limits_line(limits: DeviceLimits) -> str:
    """The device and what it can do, as measured."""
    return (
        f"{limits.name}: copies {limits.copy_bytes_per_s / 1e12:.3f} TB/s (bytes read and "
        f"written), multiplies {limits.matmul_size}^3 {limits.dtype} matrices at "
        f"{limits.matmul_flops_per_s / 1e12:.1f} TFLOP/s"
    )


def result_line(result: WorkloadResult) -> str:
    """One workload in one line, for those who wait."""
    share = f", {result.share:.1%} of the limit" if result.share is not None else ""
    values = ", ".join(shown(value) for value in result.values)
    figure = result.workload.figure
    return f"{result.workload.name}: {shown(result.value)} {figure} ({values}){share}"


def print_tables(
    to: Console, results: Sequence[WorkloadResult], peers: Mapping[str, Any] | None
) -> None:
    """The figures beside their floors, then what the time goes to."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", "workload", "figure"):
        table.add_column(title, no_wrap=True)
    for title in ("median", "lowest", "highest", "floor", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    if peers is not None:
        table.add_column("peers' best")
    for result in results:
        work, floor, values = result.workload, result.floor, result.values
        cells = [work.name, work.title, str(work.figure)]
        cells += [shown(result.value), shown(min(values)), shown(max(values))]
        if floor is None or result.share is None:
            cells += ["-", "-"]
        else:
            cells += [shown(floor.value), f"{result.share:.1%}"]
        if peers is not None:
            best = best_peer(peers, work)
            cells.append("" if best is None else f"{shown(best[1])} ({best[0]})")
        table.add_row(*cells)
    to.print(table)
    for result in results:
        if result.floor is not None:
            of = floor_of(result.workload)
            to.print(f"{result.workload.name}, {of}, counted: {_counted(result.floor)}")
    for result in results:
        if result.experts is not None:
            to.print(_experts_line(result))
    profiled = [result for result in results if result.breakdown is not None]
    if profiled:
        to.print(_profile_table(profiled))


def _profile_table(results: Sequence[WorkloadResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("time of a step, us", no_wrap=True)
    for result in results:
        assert result.breakdown is not None
        name = f"{result.workload.name} {result.breakdown.phase}"
        table.add_column(name, justify="right", no_wrap=True)
    for category in (*CATEGORIES, GAPS):
        cells = []
        for result in results:
            assert result.breakdown is not None
            us = result.breakdown.category_us[category]
            cells.append(f"{us:,.0f} ({us / result.breakdown.span_us:.0%})")
        table.add_row(category, *cells)
    breakdowns = [result.breakdown for result in results if result.breakdown is not None]
    table.add_row("all", *(f"{one.span_us:,.0f}" for one in breakdowns))
    table.add_row("launches", *(f"{one.launches:,.0f}" for one in breakdowns))
    table.add_row("steps seen", *(f"{one.steps}" for one in breakdowns))
    return table


def _experts_line(result: WorkloadResult) -> str:
    experts = result.experts
    assert experts is not None
    return (
        f"{result.workload.name}: {experts.distinct:.1f} distinct experts a layer in a decode step "
        f"of {experts.rows} rows; the busiest has {experts.busiest:.1f} times an even share"
    )


def floor_of(work: OfflineWorkload) -> str:
    """What the floor is counted for."""
    return "one decode step" if work.figure.is_decode else "all steps"


def _counted(floor: Floor) -> str:
    work = floor.work
    return (
        f"{scaled(work.weight_bytes, 'B')} of weights, {scaled(work.kv_bytes, 'B')} of KV cache, "
        f"{scaled(work.flops, 'FLOP')}"
    )


def shown(value: float) -> str:
    """Three digits at least, and no more than are sure."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 100 else f"{value:.2f}"
