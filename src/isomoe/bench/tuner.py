"""Finds the fastest launch configurations of the GPU kernels for a card.

A kernel says what it looks for: it is run once, and every question that it asks of the tuned
configurations is noted. Each of these is then tuned in turn, with what was found for those before
it in place. Candidates are compiled and run once in processes of their own, many at a time: that
fills Triton's cache, and a candidate that breaks its context takes only such a process with it.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from isomoe.bench.kernel_bench import Checker, prepare, run_seconds
from isomoe.bench.kernel_cases import KernelCase
from isomoe.bench.kernel_setting import Prepared, Setting
from isomoe.kernels.gpu import configs
from isomoe.kernels.gpu.configs import Config

_QUICK_REPLAYS = 3
_FINAL_REPLAYS = 15
_FINALISTS = 3
_GAIN = 0.01
"""What already holds is kept unless something is faster by this share."""
_COMPILING = 0.6
"""Share of the time after which no candidate is begun to be compiled."""
_STICKY = ("illegal", "misaligned", "unspecified launch failure", "device-side assert")
"""Words of errors after which a process can do nothing more on its device."""
_MODULES = "isomoe.kernels.gpu."

_Candidates = Callable[[tuple[int, ...], int, torch.dtype], Iterator[Config]]
Compiles = Callable[[float, str, Sequence[Config]], Mapping[int, str | None]]
"""Takes seconds, a kernel and candidates; gives None or why it failed for each that was run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a kernel asked for when it was run.

    Attributes:
        kernel: name in the data file.
        shape: as the file spells it.
        rows: the same.
        config: what it got: tuned before, or its default.
    """

    kernel: str
    shape: tuple[int, ...]
    rows: int
    config: Config

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """Without the answer."""
        return self.kernel, self.shape, self.rows


@dataclass(slots=True, kw_only=True)
class Found:
    """What tuning one kernel for one shape and number of rows gave.

    Attributes:
        config: the fastest right one.
        seconds: of the whole case with it.
        seconds_before: with what it got before.
        tried: candidates that ran and were right.
        failed: what became of the others, by cause.
        left: candidates for which no time was left.
    """

    asked: Asked
    config: Config
    seconds: float
    seconds_before: float
    tried: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    left: int = 0

    def line(self, case: str) -> str:
        """For those who wait."""
        shape = configs.shape_name(self.asked.shape)
        failed = ", ".join(f"{count} {cause}" for cause, count in self.failed.items())
        rest = f", {self.left} not tried" if self.left else ""
        return (
            f"{case}: {self.asked.kernel} {shape}, {self.asked.rows} rows: "
            f"{1e6 * self.seconds_before:,.1f} to {1e6 * self.seconds:,.1f} us "
            f"({self.tried} ran{', ' if failed else ''}{failed}{rest}) {self.config}"
        )


def candidates_of(asked: Asked, dtype: torch.dtype) -> list[Config]:
    """What is worth trying, without repeats; nothing for a kernel that cannot be tuned."""
    make = _candidates().get(asked.kernel)
    found: list[Config] = []
    for config in make(asked.shape, asked.rows, dtype) if make else ():
        if config not in found:
            found.append(config)
    return found


def tunable() -> tuple[str, ...]:
    """Kernels that can be tuned."""
    return tuple(_candidates())


def _candidates() -> Mapping[str, _Candidates]:
    """Each kernel's own list, by the name under which it asks for its configuration."""
    from isomoe.kernels.gpu import attention_decode, attention_prefill, heads
    from isomoe.kernels.gpu import experts_few as few
    from isomoe.kernels.gpu import experts_grouped as grouped
    from isomoe.kernels.gpu import grouped_tiles as tiles
    from isomoe.kernels.gpu.ffn import SILU
    from isomoe.kernels.gpu.ffn import candidates as of_ffn
    from isomoe.kernels.gpu.linear import LINEAR
    from isomoe.kernels.gpu.linear import candidates as of_linear
    from isomoe.kernels.gpu.norm import ADD_NORM, NORM
    from isomoe.kernels.gpu.norm import candidates as of_norm
    from isomoe.kernels.gpu.sampling import CHOSEN, DRAW, GREEDY
    from isomoe.kernels.gpu.sampling import candidates as of_sampling

    def widths(shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[4], shape[5]) if len(shape) > 4 else (2, 2)

    # Shapes: (H,) of norms, (N, K) of linear, (E, K, H, I) of experts, followed by bytes of a
    # weight and of a row's value where they are not bf16, (V,) of sampling.
    return {
        NORM: lambda shape, rows, _: of_norm(rows, *shape),
        ADD_NORM: lambda shape, rows, _: of_norm(rows, *shape),
        SILU: lambda shape, rows, _: of_ffn(rows, *shape),
        LINEAR: lambda shape, rows, dtype: of_linear(rows, shape[0], shape[1], dtype.itemsize),
        "prepare_heads": lambda _, rows, __: heads.candidates(rows),
        "decode_attention": lambda _, rows, __: attention_decode.candidates(rows),
        "prefill_attention": lambda _, rows, __: attention_prefill.candidates(rows),
        few.GATE_UP: lambda shape, _, __: few.gate_up_candidates(shape[2]),
        few.DOWN: lambda shape, _, __: few.down_candidates(shape[3], shape[1]),
        grouped.GATE_UP: lambda shape, rows, _: tiles.gate_up_candidates(
            rows * shape[1], shape[0], widths(shape)
        ),
        grouped.DOWN: lambda shape, rows, _: tiles.down_candidates(
            rows * shape[1], shape[0], widths(shape)
        ),
        GREEDY: lambda shape, rows, _: of_sampling(rows, *shape),
        CHOSEN: lambda shape, rows, _: of_sampling(rows, *shape),
        DRAW: lambda shape, rows, _: of_sampling(rows, *shape),
    }


@contextmanager
def asking() -> Iterator[list[Asked]]:
    """Notes every configuration that a kernel asks for within."""
    asked: list[Asked] = []

    def find(kernel: str, shape: tuple[int, ...], rows: int, default: Config) -> Config:
        config = configs.find(kernel, shape, rows, default)
        one = Asked(kernel=kernel, shape=tuple(shape), rows=rows, config=dict(config))
        if one.key not in {other.key for other in asked}:
            asked.append(one)
        return config

    # The kernels' modules have the function by name.
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(_MODULES) and getattr(module, "find", None) is configs.find
        if module is not configs
    ]
    for module in users:
        setattr(module, "find", find)  # noqa: B010 - mypy knows no such attribute of a module
    try:
        yield asked
    finally:
        for module in users:
            setattr(module, "find", configs.find)  # noqa: B010


def what_it_asks(prepared: Prepared) -> list[Asked]:
    """Runs a case once, and what it asked for."""
    prepared.run(*prepared.inputs[0])  # loads the modules whose questions are to be noted
    with asking() as asked:
        prepared.run(*prepared.inputs[0])
    return asked


@torch.inference_mode()
def tune_case(
    case: KernelCase,
    at: Setting,
    *,
    seconds: float,
    limit: int | None = None,
    compiles: Compiles | None = None,
) -> Iterator[Found]:
    """Tunes all that one case asks for; yields each as it is found.

    Args:
        seconds: for each of them, compiling included; candidates beyond are left out.
        limit: try only so many candidates of each.
        compiles: gets them compiled elsewhere first.
    """
    prepared = prepare(case, at)
    checker = Checker(prepared, at.dtype)
    is_right = checker.holds(checker.error())

    def timed(replays: int) -> float:
        return run_seconds(prepared.run, prepared.inputs, at.device, replays=replays)

    def tried_once(kernel: str, config: Config) -> float | str:
        """Seconds of a call, or why there is none."""
        try:
            with configs.trying(kernel, config):
                return timed(_QUICK_REPLAYS) if checker.holds(checker.error()) else "wrong"
        except Exception as error:
            return cause_of(error)

    with ExitStack() as kept:
        tuned: set[str] = set()
        for asked in what_it_asks(prepared):
            tried = list(islice(candidates_of(asked, at.dtype), limit))
            if not tried or asked.kernel in tuned:
                continue
            began = perf_counter()
            compiled: Mapping[int, str | None] = dict.fromkeys(range(len(tried)))
            if compiles is not None:
                compiled = compiles(_COMPILING * seconds, asked.kernel, tried)
            before = timed(_FINAL_REPLAYS)
            found = Found(
                asked=asked,
                config=asked.config,
                # What is wrong is beaten by anything.
                seconds=before if is_right else float("inf"),
                seconds_before=before,
            )
            times: list[tuple[float, int]] = []
            for index, config in enumerate(tried):
                if index not in compiled or perf_counter() - began > seconds:
                    found.left += 1
                    continue
                taken = compiled[index] or tried_once(asked.kernel, config)
                if isinstance(taken, str):
                    found.failed[taken] = found.failed.get(taken, 0) + 1
                else:
                    times.append((taken, index))
            found.tried = len(times)
            for _, index in sorted(times)[:_FINALISTS]:
                with configs.trying(asked.kernel, tried[index]):
                    final = timed(_FINAL_REPLAYS)
                if final < found.seconds * (1 - _GAIN):
                    found.config, found.seconds = tried[index], final
            found.seconds = min(found.seconds, before) if is_right else found.seconds
            tuned.add(asked.kernel)
            kept.enter_context(configs.trying(asked.kernel, found.config))
            if found.seconds < float("inf"):
                yield found


def cause_of(error: Exception) -> str:
    """Why a candidate failed, in two words or so.

    Raises:
        error: itself, if the device is of no more use in this process.
    """
    name = type(error).__name__
    if name == "OutOfResources":
        return "out of resources"
    text = str(error).lower()
    if "cuda" in text and any(word in text for word in _STICKY):
        raise error
    return f"failed to run ({name})"


def merge(file: Path, found: Sequence[Found]) -> None:
    """Writes what was found into the data file, beside what is there."""
    tuned = configs.read(file)
    for one in found:
        by_rows = tuned.setdefault(one.asked.kernel, {}).setdefault(
            configs.shape_name(one.asked.shape), {}
        )
        by_rows[str(one.asked.rows)] = one.config
    ordered = {
        kernel: {
            shape: dict(sorted(by_rows.items(), key=lambda item: int(item[0])))
            for shape, by_rows in sorted(shapes.items())
        }
        for kernel, shapes in sorted(tuned.items())
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new")
    scratch.write_text(_text(ordered), encoding="utf-8")
    scratch.replace(file)


def _text(tuned: Mapping[str, Mapping[str, Mapping[str, Config]]]) -> str:
    """JSON with a line for each configuration."""
    kernels = []
    for kernel, shapes in tuned.items():
        each = []
        for shape, by_rows in shapes.items():
            lines = ",\n".join(
                f"   {json.dumps(rows)}: {json.dumps(config)}" for rows, config in by_rows.items()
            )
            each.append(f"  {json.dumps(shape)}: {{\n{lines}\n  }}")
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(each) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def run_candidate(prepared: Prepared, kernel: str, config: Config) -> str | None:
    """Compiles and runs one candidate once; why it failed, or None."""
    try:
        with configs.trying(kernel, config):
            prepared.run(*prepared.inputs[0])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        return cause_of(error)
    return None


def card_file(out: str | None) -> Path:
    """Where the card's configurations are kept."""
    return configs.FOLDER / f"{configs.card()}.json" if out is None else Path(out)


def plain(found: Found) -> dict[str, Any]:
    """As a document says it."""
    return {
        "kernel": found.asked.kernel,
        "shape": configs.shape_name(found.asked.shape),
        "rows": found.asked.rows,
        "us_before": 1e6 * found.seconds_before,
        "us": 1e6 * found.seconds,
        "config_before": found.asked.config,
        "config": found.config,
        "tried": found.tried,
        "failed": found.failed,
        "not_tried": found.left,
    }
