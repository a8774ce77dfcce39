"""`isomoe tune`: the fastest launch configurations of the GPU kernels, measured on this card."""

import argparse
import json
import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from isomoe.cli.bench_kernel import add_sizes, device, model_name, prepare_triton, settings_from
from isomoe.errors import ConfigError

if TYPE_CHECKING:
    from isomoe.bench.tuner import Found

NAME = "tune"
HELP = (
    "Try launch configurations of the GPU kernels in the sizes of a model, and keep the fastest "
    "that gives the right answer. They go to a file for this card, which the engine reads when it "
    "starts; entries for other models and other numbers of rows stay there. Without a tuned file "
    "every kernel has a default."
)

_SECONDS = 60.0
_GPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "--kernels",
        nargs="+",
        metavar="NAME",
        help="as `isomoe bench kernel --list` prints them (default: all that can be tuned)",
    )
    add_sizes(parser, _GPU_ROWS)
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--seconds",
        type=float,
        default=_SECONDS,
        metavar="N",
        help="for each kernel, shape and number of rows; what is not tried by then is left out "
        "(default: %(default)g)",
    )
    group.add_argument(
        "--max-candidates",
        type=int,
        metavar="N",
        help="try only the first N configurations of each (default: all)",
    )
    group.add_argument(
        "--compilers",
        type=int,
        metavar="N",
        help="processes that compile at the same time; 0 compiles in this one "
        "(default: one less than the cores, at most 12)",
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        help="the file that is written (default: the package's own for this card)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if not args.seconds > 0:
        raise ConfigError(f"--seconds {args.seconds:g}: must be above 0")
    for flag, value, least in (
        ("--max-candidates", args.max_candidates, 1),
        ("--compilers", args.compilers, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}")
    prepare_triton()
    from isomoe.bench.compile_pool import compile_pool
    from isomoe.bench.kernel_cases import find_cases
    from isomoe.bench.tuner import card_file, merge, plain, tune_case
    from isomoe.kernels.gpu.configs import card

    cases = find_cases(args.kernels)
    settings = settings_from(args, _GPU_ROWS)
    if device().type != "cuda" and args.out is None:
        raise ConfigError(
            "--out: is needed without a GPU; what the interpreter finds says nothing about speed"
        )
    file = card_file(args.out)
    every: list[tuple[str, Found]] = []
    with ExitStack() as stack:
        pool = None
        if device().type == "cuda" and args.compilers != 0:
            pool = stack.enter_context(compile_pool(args.compilers))
        for case in cases:
            for at in settings:
                if not case.takes(at.rows):
                    continue
                compiles: Any = None if pool is None else partial(pool.compile, case.name, at)
                found = tune_case(
                    case, at, seconds=args.seconds, limit=args.max_candidates, compiles=compiles
                )
                for one in found:
                    every.append((case.name, one))
                    merge(file, [one])
                    print(one.line(case.name), file=sys.stderr, flush=True)
    document = {
        "card": card(),
        "model": model_name(args.model_path),
        "file": str(file),
        "found": [{"case": name, **plain(one)} for name, one in every],
    }
    if args.json:
        print(json.dumps(document))
    else:
        print(f"{len(every)} configurations in {file}" if every else "nothing here can be tuned")
    return 0
