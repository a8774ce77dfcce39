"""Times one kernel, holds it against its plain-torch twin, and its time against the device's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from isomoe.bench.device import DeviceLimits, clocked
from isomoe.bench.kernel_cases import KernelCase
from isomoe.bench.kernel_setting import Prepared, Setting

BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Largest relative Frobenius error against the twin, by dtype."""
_MOST_COPIES = 48
_MOST_INPUT_BYTES = 6 << 30
_LEAST_CALLS = 24
"""Of a graph: the time between replays must not count."""
_LONG_SECONDS = 2e-3
"""A call that takes so long need not be repeated in a graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One kernel at one number of rows.

    Attributes:
        seconds: of a call, the median.
        twin_seconds: of the twin's; None where it was not timed.
        error: relative Frobenius error against the twin, or the share of ids that differ.
        is_right: whether the error is within bounds.
        floor_seconds: the least time that the device needs.
    """

    name: str
    rows: int
    seconds: float
    twin_seconds: float | None
    error: float
    is_right: bool
    num_bytes: float
    flops: float
    floor_seconds: float

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.floor_seconds / self.seconds

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {
            "name": self.name,
            "rows": self.rows,
            "us": 1e6 * self.seconds,
            "twin_us": None if self.twin_seconds is None else 1e6 * self.twin_seconds,
            "error": self.error,
            "is_right": self.is_right,
            "bytes": self.num_bytes,
            "flops": self.flops,
            "floor_us": 1e6 * self.floor_seconds,
            "share": self.share,
        }


@torch.inference_mode()
def time_case(
    case: KernelCase, at: Setting, limits: DeviceLimits, with_twin: bool = True
) -> Timing:
    """Runs a case, checks it, times it."""
    prepared = prepare(case, at)
    checker = Checker(prepared, at.dtype)
    error = checker.error()
    return Timing(
        name=case.name,
        rows=at.rows,
        seconds=run_seconds(prepared.run, prepared.inputs, at.device),
        twin_seconds=run_seconds(prepared.twin, prepared.inputs, at.device, graph=False)
        if with_twin
        else None,
        error=error,
        is_right=checker.holds(error),
        num_bytes=prepared.num_bytes,
        flops=prepared.flops,
        floor_seconds=limits.seconds(prepared.num_bytes, prepared.flops),
    )


def prepare(case: KernelCase, at: Setting) -> Prepared:
    """A case with as many copies of its inputs as keep the last one's out of the cache."""
    torch.manual_seed(0)
    one = case.prepare(at)
    if at.device.type != "cuda":
        return one
    cache: int = torch.cuda.get_device_properties(at.device).L2_cache_size
    held = sum(tensor.nbytes for tensor in tensors(one.inputs[0]))
    copies = min(int(3 * cache / one.num_bytes) + 1, max(1, _MOST_INPUT_BYTES // held))
    copies = min(copies, _MOST_COPIES)
    if copies == 1:
        return one
    del one
    torch.manual_seed(0)
    return case.prepare(replace(at, copies=copies))


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def copied(value: Any) -> Any:
    """The same, with tensors of its own; kernels may write over their inputs."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(copied(part) for part in value) if isinstance(value, tuple) else value


class Checker:
    """Holds a case's first outputs against its twin's. Made before the case is run."""

    def __init__(self, prepared: Prepared, dtype: torch.dtype) -> None:
        self._prepared = prepared
        self._bound = 0.0 if prepared.exact else BOUND[dtype]
        # Some kernels write over their inputs.
        self._inputs = copied(tuple(prepared.inputs[0]))
        self._wanted = list(tensors(prepared.twin(*copied(self._inputs))))

    def error(self) -> float:
        """The worst error of one run: relative Frobenius, or the share of ids that differ."""
        found = list(tensors(self._prepared.run(*copied(self._inputs))))
        return max(
            _error(one, other, self._prepared.exact)
            for one, other in zip(found, self._wanted, strict=True)
        )

    def holds(self, error: float) -> bool:
        """Whether the error is within bounds."""
        return error <= self._bound


def _error(found: Tensor, wanted: Tensor, exact: bool) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    if exact or not found.is_floating_point():
        return float((found.long() != wanted.long()).float().mean()) if found.numel() else 0.0
    difference = (found.double() - wanted.double()).norm()
    error = float(difference / wanted.double().norm().clamp_min(1e-30))
    return float("inf") if error != error else error


def run_seconds(
    run: Callable[..., object],
    inputs: Sequence[tuple[Any, ...]],
    device: torch.device,
    *,
    graph: bool = True,
    replays: int = 7,
) -> float:
    """The median seconds of a call, taking the inputs in turn.

    On a GPU the calls are captured in a graph, as the engine runs them, so that the host's time
    for a launch does not count.
    """
    if device.type != "cuda":
        run(*inputs[0])
        return median(clocked(lambda: run(*inputs[0])) for _ in range(3))
    run(*inputs[0])  # compiles
    with _events() as elapsed:
        once = elapsed(lambda: run(*inputs[-1]))
        calls = len(inputs)
        if once < _LONG_SECONDS:
            calls *= -(-_LEAST_CALLS // len(inputs))

        def all_calls() -> None:
            for index in range(calls):
                run(*inputs[index % len(inputs)])

        replay = _captured(all_calls) if graph else all_calls
        elapsed(replay)
        return median(elapsed(replay) for _ in range(replays)) / calls


def _captured(calls: Callable[[], None]) -> Callable[[], None]:
    """The calls as a graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


@contextmanager
def _events() -> Iterator[Callable[[Callable[[], object]], float]]:
    """A function that times a call on the device."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def elapsed(call: Callable[[], object]) -> float:
        begin.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    yield elapsed
