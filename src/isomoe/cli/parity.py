"""`isomoe parity`: tokens and log-probabilities of several layouts, side by side."""

import argparse
import json
import os
import platform
from dataclasses import replace
from typing import TYPE_CHECKING

from isomoe import __version__
from isomoe.cli.options import add_model_option, add_runtime_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.config import EngineConfig
from isomoe.errors import ConfigError
from isomoe.layout import Parallelism

if TYPE_CHECKING:
    from isomoe.engine.model_info import ModelInfo
    from isomoe.parity import Report, Tolerance
    from isomoe.parity.prompts import Prompts

NAME = "parity"
HELP = (
    "Decode the same prompts greedily on several layouts and compare tokens and log-probabilities "
    "with those of the first layout. Exit 0 if all agree, 1 if one differs."
)
RANDOM_PROMPTS = 20
"""Random prompts for a checkpoint that ships no questions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        metavar="LAYOUT",
        help="such as tp2 tp2,dp2,ep2 (dp is attention DP), the baseline first; "
        "tp2,dp2+double-reduce plants a defect in one of them",
    )
    parser.add_argument(
        "--inject",
        metavar="NAME",
        help="plant a known defect (`isomoe prove --list-mutants`) in each layout but the first",
    )
    add_model_option(parser)
    source = parser.add_argument_group("prompts (default: 20 questions that ship with the model)")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help='one a line, as text or as JSON with "prompt" or "question"',
    )
    source.add_argument(
        "--random-prompts",
        type=int,
        metavar="M",
        help=f"M prompts of random tokens (default for a model without questions: "
        f"{RANDOM_PROMPTS}); the seed is --random-seed. A trained model may turn on one bit there: "
        "use --dtype float32",
    )
    source.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="default: %(default)s"
    )
    source.add_argument(
        "--ignore-eos", action="store_true", help="decode on after the model's end tokens"
    )
    limits = parser.add_argument_group("limits, in nats (default: by dtype)")
    limits.add_argument(
        "--max-mean-delta", type=float, metavar="X", help="of the mean |delta logprob|"
    )
    limits.add_argument("--max-delta", type=float, metavar="X", help="of any one |delta logprob|")
    add_runtime_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}: must be at least 1")
    config = engine_config_from(args, Parallelism())
    layouts = _layouts(args)

    from isomoe.engine.model_info import ModelInfo

    report = _measure(args, config, layouts, ModelInfo.of(config))
    if args.json:
        print(json.dumps(report.to_json(), allow_nan=False))
    else:
        report.print()
    return 0 if report.agrees else 1


def _layouts(args: argparse.Namespace) -> list[str]:
    """What the row of each layout is called, defects included."""
    baseline, *others = args.layouts
    if "+" in baseline:
        raise ConfigError(f"--layouts {baseline}: the first one is the baseline, without a defect")
    if not others:
        raise ConfigError(
            f"--layouts {baseline}: one layout has nothing to be compared with; "
            f"--layouts {baseline} tp2 would"
        )
    if args.inject is not None:
        twice = [layout for layout in others if "+" in layout]
        if twice:
            raise ConfigError(
                f"--inject {args.inject}: {twice[0]} has a defect already; one at a time"
            )
        others = [f"{layout}+{args.inject}" for layout in others]
    return [baseline, *others]


def _measure(
    args: argparse.Namespace, config: EngineConfig, layouts: list[str], info: "ModelInfo"
) -> "Report":
    from isomoe.parity import EngineTarget, Report, compare, record

    prompts = _prompts(args, info)
    tolerance = _tolerance(args, info.dtype)
    baseline = None
    rows = []
    targets = [EngineTarget(layout, config, info, progress_bar) for layout in layouts]
    for target in targets:
        recording = record(
            target,
            prompts.token_ids,
            reference=baseline,
            max_tokens=args.max_tokens,
            ignore_eos=args.ignore_eos,
            stage=progress_bar,
        )
        if baseline is None:
            baseline = recording
        else:
            rows.append(compare(baseline, recording, tolerance))
    assert baseline is not None
    return Report(
        model=config.model_path or info.folder.name,
        source=prompts.source,
        tolerance=tolerance,
        conditions=_conditions(args, info),
        baseline=baseline,
        rows=tuple(rows),
    )


def _prompts(args: argparse.Namespace, info: "ModelInfo") -> "Prompts":
    from isomoe.parity.prompts import from_file, random_ids, shipped
    from isomoe.tokenizer import Tokenizer

    if args.prompts is not None and args.random_prompts is not None:
        raise ConfigError("--prompts and --random-prompts: give one of them")
    if args.prompts is not None:
        return from_file(args.prompts, Tokenizer(info.folder))
    questions = info.folder / "heldout.jsonl"
    if args.random_prompts is None and questions.is_file():
        return shipped(questions, Tokenizer(info.folder))
    count = RANDOM_PROMPTS if args.random_prompts is None else args.random_prompts
    return random_ids(count, info.vocab_size, args.random_seed)


def _tolerance(args: argparse.Namespace, dtype: str) -> "Tolerance":
    from isomoe.parity import TOLERANCES

    tolerance = TOLERANCES[dtype]
    if args.max_mean_delta is not None:
        tolerance = replace(tolerance, mean=args.max_mean_delta)
    if args.max_delta is not None:
        tolerance = replace(tolerance, most=args.max_delta)
    return tolerance


def _conditions(args: argparse.Namespace, info: "ModelInfo") -> dict[str, object]:
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "isomoe": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "device": info.device,
        "dtype": info.dtype,
        "load_format": args.load_format,
        "max_tokens": args.max_tokens,
        "ignore_eos": args.ignore_eos,
        "max_running_requests": args.max_running_requests,
        "chunked_prefill_size": engine_config_from(args, Parallelism()).prefill_limits(info.device)[
            0
        ],
        "page_size": args.page_size,
        "random_seed": args.random_seed,
    }
