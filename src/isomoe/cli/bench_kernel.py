"""`isomoe bench kernel`: one GPU kernel at a time, beside its twin and the device's limit."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from isomoe.config import DType, choice
from isomoe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from isomoe.bench.kernel_bench import Timing
    from isomoe.bench.kernel_setting import Setting

NAME = "kernel"
HELP = (
    "Measure the GPU kernels one by one, in the sizes of a model: time, error against the same in "
    "plain torch, bytes and operations, and the share of what the device could do."
)

GPU_MODEL = "qwen3-30b-a3b"
"""Whose sizes are measured where nothing else is said."""
GPU_ROWS = (1, 16, 64, 256, 2048, 8192)
_CPU_ROWS = (1, 3)
_CONTEXT = 640
_CPU_CONTEXT = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the measurement's flags."""
    parser.add_argument(
        "kernels",
        nargs="*",
        metavar="NAME",
        help="such as fused_experts, or linear-qkv for one role of linear; --list shows all",
    )
    parser.add_argument("--all", action="store_true", help="all of isomoe's, in a layer's order")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    add_sizes(parser)
    parser.add_argument(
        "--no-twin", action="store_true", help="do not time the plain twins; they are still checked"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print one JSON document instead of the table; with FILE (or a folder), write it "
        "there and print the table, too. Give it after the names",
    )
    output.add_argument("--commit", metavar="ID", help="that the document names (default: git's)")


def add_sizes(parser: argparse.ArgumentParser, gpu_rows: Sequence[int] = GPU_ROWS) -> None:
    """Adds what decides the kernels' shapes; `isomoe tune` has the same."""
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--model-path",
        "--model",
        metavar="PATH",
        help="a folder, a config.json or a hub id; no weights are read (default: the sizes of "
        f"{GPU_MODEL}, or without a GPU the checkpoint that ships with isomoe)",
    )
    group.add_argument(
        "--rows",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tokens of a step (default, on a GPU: {' '.join(map(str, gpu_rows))})",
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"keys that each row of decode attention sees (default: {_CONTEXT})",
    )
    group.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16 or float32 (default: bfloat16; float32 without a GPU, where the interpreter "
        "rounds bfloat16 differently)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the measurement: 0 if every kernel agrees with its twin, 1 if one does not."""
    prepare_triton()
    from isomoe.bench.device import measure_limits
    from isomoe.bench.kernel_bench import time_case
    from isomoe.bench.kernel_cases import CASES, find_cases
    from isomoe.bench.offline_report import limits_line
    from isomoe.bench.results import conditions, write

    if args.list:
        print("\n".join(case.name for case in CASES))
        return 0
    if bool(args.kernels) == args.all:
        raise ConfigError("give the kernels' names, or --all; --list shows the names")
    cases = find_cases(args.kernels or None)
    settings = settings_from(args)
    limits = measure_limits(settings[0].device, settings[0].dtype)
    print(limits_line(limits), file=sys.stderr, flush=True)
    timings: list[Timing] = []
    for case in cases:
        for at in settings:
            if case.takes(at.rows):
                timings.append(time_case(case, at, limits, not args.no_twin))
                print(_line(timings[-1]), file=sys.stderr, flush=True)
    document = {
        **conditions("kernels", "isomoe " + shlex.join(sys.argv[1:]), args.commit),
        "device": limits.to_json(),
        "model": {"name": model_name(args.model_path), **asdict(settings[0].sizes)},
        "settings": {"dtype": limits.dtype, "context": settings[0].context},
        "kernels": [timing.to_json() for timing in timings],
    }
    if args.json == "-":
        print(json.dumps(document, allow_nan=False))
    else:
        _print(timings, limits_line(limits))
    if args.json not in (None, "-"):
        print(f"written to {write(document, Path(args.json))}")
    wrong = [timing for timing in timings if not timing.is_right]
    for timing in wrong:
        print(
            f"isomoe: {timing.name} with {timing.rows} rows is off its twin by {timing.error:.2g}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def prepare_triton() -> None:
    """Sees that Triton's kernels can run here.

    Raises:
        ConfigError: if Triton is not there, or no GPU.
    """
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "there is no GPU here; TRITON_INTERPRET=1 in the environment would run the kernels in "
            "Triton's interpreter, which times nothing"
        )
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ConfigError("the kernels need Triton: pip install 'isomoe[gpu]'") from None


def device() -> "torch.device":
    """Where kernels run."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settings_from(args: argparse.Namespace, gpu_rows: Sequence[int] = GPU_ROWS) -> "list[Setting]":
    """One setting for each number of rows.

    Raises:
        ConfigError: if a flag is out of range, or the model cannot be.
    """
    import torch

    from isomoe.bench.kernel_setting import Setting, Sizes
    from isomoe.models import read_config
    from isomoe.weights import resolve

    on_gpu = device().type == "cuda"
    dtype = DType.BFLOAT16 if on_gpu else DType.FLOAT32
    if args.dtype is not None:
        dtype = choice(DType, args.dtype, "--dtype")
    if dtype is DType.AUTO:
        raise ConfigError("--dtype auto: must be bfloat16 or float32")
    rows = args.rows or (gpu_rows if on_gpu else _CPU_ROWS)
    context = args.context
    if context is None:
        context = _CONTEXT if on_gpu else _CPU_CONTEXT
    for flag, value in (*(("--rows", one) for one in rows), ("--context", context)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    if args.model_path is None and on_gpu:
        config = read_config(_known_config())
    else:
        config = read_config(resolve(args.model_path, weights=False))
    sizes = Sizes.of(config)
    return [
        Setting(
            sizes=sizes,
            rows=one,
            context=context,
            device=device(),
            dtype=getattr(torch, dtype),
        )
        for one in rows
    ]


def model_name(model_path: str | None) -> str:
    """As a document says it."""
    if model_path is not None:
        return Path(model_path).name.removesuffix(".json")
    return GPU_MODEL if device().type == "cuda" else "arith-moe"


def _known_config() -> Path:
    import isomoe.models

    return Path(isomoe.models.__file__).parent / "configs" / f"{GPU_MODEL}.json"


def _line(timing: "Timing") -> str:
    return f"{timing.name}, {timing.rows} rows: {1e6 * timing.seconds:,.1f} us, {timing.share:.0%}"


def _print(timings: "list[Timing]", title: str) -> None:
    from rich import box
    from rich.table import Table

    from isomoe.bench.offline_report import console

    to = console()
    to.print(title)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kernel", no_wrap=True)
    for name in ("rows", "us", "floor us", "share", "TB/s", "TFLOP/s", "twin us", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in timings:
        twin = "-" if one.twin_seconds is None else f"{1e6 * one.twin_seconds:,.1f}"
        table.add_row(
            one.name,
            f"{one.rows:,}",
            f"{1e6 * one.seconds:,.1f}",
            f"{1e6 * one.floor_seconds:,.1f}",
            f"{one.share:.1%}",
            f"{one.num_bytes / one.seconds / 1e12:.2f}",
            f"{one.flops / one.seconds / 1e12:.1f}",
            twin,
            f"{one.error:.1e}{'' if one.is_right else ' WRONG'}",
        )
    to.print(table)
