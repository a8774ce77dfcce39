"""What the time of a step goes to, from a trace of torch's profiler.

On a GPU the kernels are sorted by name, and the gaps are the time in which none ran. On a CPU the
leaves of the model are marked while the profiler runs, and what happens between them is sorted by
the name of the operation; the gaps are Python's.
"""

import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from isomoe.bench.offline_engine import lone_worker, reach_decode, requests_of
from isomoe.bench.offline_workload import OfflineWorkload
from isomoe.blocks import AttentionCore, ExpertWeights, Leaf, Linear, RMSNorm, Router
from isomoe.engine import LLM, EngineCore

CATEGORIES = (
    "attention",
    "experts",
    "dense linear",
    "norms",
    "routing",
    "sampling",
    "other",
)
GAPS = "gaps"

# Where the kernels of isomoe's own modules belong.
_BY_MODULE = (
    ("attention", ("attention", "heads")),
    ("experts", ("expert", "grouped", "combine", "ffn")),
    ("routing", ("routing", "align")),
    ("norms", ("norm",)),
    ("dense linear", ("linear",)),
    ("sampling", ("sampling",)),
)
_OWN = "isomoe.kernels.gpu."
# Of others', the first pattern that is found in the name decides. Matrix products come late: the
# names of libraries' attention kernels hold their words, too.
_BY_NAME = tuple(
    (category, re.compile(pattern, re.IGNORECASE))
    for category, pattern in (
        ("attention", r"attention|attn|fmha|flash|sdpa|cudnn"),
        ("routing", r"bincount|topk"),
        ("sampling", r"argmax|sampl|logprob|softmax|searchsorted"),
        ("experts", r"expert|moe|grouped|group_gemm|GroupProblem|silu"),
        ("norms", r"norm"),
        ("dense linear", r"linear|gemm|gemv|matmul|nvjet|cutlass|cublas|splitk|::mm|addmm"),
    )
)
_MARK = "isomoe: "
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_WARMUP_STEPS = 2
_NAMED = 20
"""Kernels that the document lists by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that took its time.

    Attributes:
        name: of a kernel, an operation or a mark.
        begin: in microseconds.
        end: in microseconds.
        category: one of `CATEGORIES`.
    """

    name: str
    begin: float
    end: float
    category: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """The time of the mean step.

    Attributes:
        phase: decode or prefill.
        steps: that were looked at.
        span_us: from the first event to the end of the last, a step.
        category_us: what each category took, a step; `GAPS` is what nothing took.
        launches: events a step.
        kernels: name, launches and microseconds a step of those that took most.
    """

    phase: str
    steps: int
    span_us: float
    category_us: Mapping[str, float]
    launches: float
    kernels: Sequence[tuple[str, float, float]]

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {
            "phase": self.phase,
            "steps": self.steps,
            "span_us": round(self.span_us, 2),
            "us": {name: round(us, 2) for name, us in self.category_us.items()},
            "launches": round(self.launches, 1),
            "kernels": [
                {"name": name, "launches": round(launches, 2), "us": round(us, 2)}
                for name, launches, us in self.kernels
            ],
        }


def profile_workload(
    llm: LLM, workload: OfflineWorkload, steps: int, trace: Path | None = None
) -> Breakdown | None:
    """Profiles some decode steps of a workload, or all its steps where it only prefills.

    Args:
        steps: of decode.
        trace: where to write what Perfetto and Chrome can show; gzipped if it ends in .gz.

    Returns:
        None for several ranks, and where no step is decode alone.
    """
    worker = lone_worker(llm)
    if worker is None:
        return None
    on_gpu = worker.device.type == "cuda"
    if on_gpu:
        _start_up()
    with tempfile.TemporaryDirectory() as scratch, requests_of(llm, workload) as core:
        file = Path(scratch) / "trace.json" if trace is None else trace
        marks = _marked if not on_gpu else _unmarked
        if max(workload.output_lens) == 1:
            phase = "prefill"
            with marks(worker.model.leaves()), _profiler(on_gpu) as profiler:
                steps = _run(core, None, on_gpu)
        else:
            phase = "decode"
            if not reach_decode(core):
                return None
            with marks(worker.model.leaves()), _profiler(on_gpu, _WARMUP_STEPS, steps) as profiler:
                for _ in range(_WARMUP_STEPS):
                    core.step()
                    if on_gpu:  # what is under way must not run into what is recorded
                        torch.cuda.synchronize()
                    profiler.step()
                steps = _run(core, steps, on_gpu, profiler.step)
        profiler.export_chrome_trace(str(file))
        events = read_trace(file, on_gpu)
    return break_down(events, phase, steps)


def _run(
    core: EngineCore, steps: int | None, on_gpu: bool, after: Callable[[], None] | None = None
) -> int:
    """Steps until there is no work, or so often; how often it was."""
    done = 0
    while core.has_work and done != steps:
        core.step()
        done += 1
        if after is not None and done != steps:
            after()
    if on_gpu:
        torch.cuda.synchronize()
    return done


def _profiler(on_gpu: bool, warmup: int = 0, active: int = 0) -> profile:
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=0, warmup=warmup, active=active, repeat=1) if warmup else None
    return profile(activities=activities, schedule=plan, acc_events=True)


def _start_up() -> None:
    """The first use of the profiler takes seconds; they should not lie within a step."""
    with _profiler(True):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


@contextmanager
def _unmarked(leaves: Iterable[Leaf]) -> Iterator[None]:
    yield


@contextmanager
def _marked(leaves: Iterable[Leaf]) -> Iterator[None]:
    """Each call of a leaf is in the trace, under its category."""
    wrapped = []
    for leaf in leaves:
        forward, name = leaf.forward, _MARK + _category_of(leaf)

        def marked(
            *args: Any, forward: Callable[..., Tensor] = forward, name: str = name
        ) -> Tensor:
            with record_function(name):
                return forward(*args)

        leaf.forward = marked  # type: ignore[method-assign]
        wrapped.append(leaf)
    try:
        yield
    finally:
        for leaf in wrapped:
            del leaf.forward


def _category_of(leaf: Leaf) -> str:
    for kind, category in (
        (AttentionCore, "attention"),
        (ExpertWeights, "experts"),
        (Router, "routing"),
        (RMSNorm, "norms"),
        (Linear, "dense linear"),
    ):
        if isinstance(leaf, kind):
            return category
    return "other"


def category_of(name: str) -> str:
    """Where a kernel of this name belongs."""
    if name.startswith(_MARK):
        return name.removeprefix(_MARK)
    own = own_kernels().get(name)
    if own is not None:
        return own
    for category, pattern in _BY_NAME:
        if pattern.search(name):
            return category
    return "other"


@cache
def own_kernels() -> Mapping[str, str]:
    """The category of each of isomoe's Triton kernels that are loaded, by its name in a trace."""
    found = {}
    for name, module in list(sys.modules.items()):
        last = name.removeprefix(_OWN)
        if last == name:
            continue
        for category, words in _BY_MODULE:
            if any(word in last for word in words):
                kernels = (value for value in vars(module).values() if hasattr(value, "fn"))
                found.update({kernel.fn.__name__: category for kernel in kernels})
                break
    return found


def read_trace(file: Path, on_gpu: bool) -> list[Event]:
    """The events of a Chrome trace that count: kernels, or the outermost operations on a CPU."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    wanted = _KERNELS if on_gpu else ("cpu_op", "user_annotation")
    found = [
        event
        for event in json.loads(content)["traceEvents"]
        if event.get("cat") in wanted and not event["name"].startswith("ProfilerStep")
    ]
    if not on_gpu:
        found = _outermost(found)
    return [
        Event(
            name=event["name"],
            begin=event["ts"],
            end=event["ts"] + event["dur"],
            category=category_of(event["name"]),
        )
        for event in found
    ]


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the busiest thread that lie in no other."""
    threads: dict[object, list[dict[str, Any]]] = {}
    for event in events:
        threads.setdefault(event["tid"], []).append(event)
    found: list[dict[str, Any]] = []
    end = 0.0
    main = max(threads.values(), key=len, default=[])
    for event in sorted(main, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= end:
            found.append(event)
            end = event["ts"] + event["dur"]
    return found


def break_down(events: Sequence[Event], phase: str, steps: int) -> Breakdown | None:
    """The events of some steps, summed up; None if there are none.

    Where events overlap, the time counts for the one that began first: a kernel whose launch
    overlaps with the one before it waits for that one. So the parts and the gaps add up.
    """
    if not events or not steps:
        return None
    ordered = sorted(events, key=lambda event: event.begin)
    taken = dict.fromkeys(CATEGORIES, 0.0)
    names: dict[str, list[float]] = {}
    busy, reached = 0.0, ordered[0].begin
    for event in ordered:
        own = max(0.0, event.end - max(event.begin, reached))
        taken[event.category] += own
        names.setdefault(event.name, []).append(own)
        busy += own
        reached = max(reached, event.end)
    span = reached - ordered[0].begin
    most = sorted(names.items(), key=lambda item: -sum(item[1]))[:_NAMED]
    return Breakdown(
        phase=phase,
        steps=steps,
        span_us=span / steps,
        category_us={name: us / steps for name, us in (*taken.items(), (GAPS, span - busy))},
        launches=len(ordered) / steps,
        kernels=[(name, len(each) / steps, sum(each) / steps) for name, each in most],
    )
