"""`isomoe parity`: whether servers, engines and layouts are the same model, and where they part."""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from isomoe import __version__
from isomoe.cli.options import add_model_option, add_runtime_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.errors import ConfigError
from isomoe.layout import Parallelism
from isomoe.parity.prompts import DEFAULT_COUNT

if TYPE_CHECKING:
    from isomoe.engine.model_info import ModelInfo
    from isomoe.parity.session import Session
    from isomoe.parity.targets.parse import TargetSettings
    from isomoe.parity.thresholds import Thresholds

NAME = "parity"
HELP = (
    "Tell whether two servers, engines or layouts are the same model: decode the same prompts "
    "greedily, score the first one's tokens on every other, and hold the differences against the "
    "first one's own noise. Exit 0 if all agree, 1 if one differs, 2 if one was not compared."
)
_TARGETS = """\
targets, the baseline first:
  tp2,dp2,ep2               this engine on a layout (dp is attention DP)
  tp2,dp2,ep2+double-reduce the same with a known defect planted (--mutants lists them)
  http://127.0.0.1:30000    a server: SGLang's, vLLM's or OpenAI's API, found out by asking
  hf:PATH                   a checkpoint in transformers, in this process
  file:RUN.json             a run that was saved earlier, here or elsewhere
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _TARGETS
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="two or more; see below")
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="LAYOUT", help="more targets, behind TARGET"
    )
    parser.add_argument(
        "--inject",
        metavar="NAME",
        help="plant a known defect in each layout but the baseline: a mutant's name, or a historic "
        "id such as sglang-23731",
    )
    parser.add_argument(
        "--floor",
        nargs="+",
        default=[],
        metavar="TARGET",
        help="targets that are known to be good: how far they are from the baseline is noise, too",
    )
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="name the first layer and block where a target parts from the baseline (layouts and "
        "hf: only)",
    )
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="instead of comparing: plant every known defect, and print who sees it (an hour)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="with --mutants: these defects alone"
    )
    add_model_option(parser)
    _add_prompt_options(parser)
    _add_verdict_options(parser)
    _add_server_options(parser)
    add_runtime_options(parser)
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        metavar="DIR",
        help="where the runs, report.json and report.html go (default: a new folder below "
        "~/.cache/isomoe/parity)",
    )
    out.add_argument("--json", action="store_true", help="print one JSON document")


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group(
        "prompts (default: the held-out questions of the checkpoint, if it has any, else texts "
        "that ship with isomoe; random tokens without a tokenizer)"
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help='one a line, as text or as JSON with "prompt" or "question"',
    )
    source.add_argument(
        "--random-prompts",
        type=int,
        metavar="M",
        help="M prompts of random tokens; the seed is --random-seed. A trained model may turn on "
        "one bit there: use --dtype float32",
    )
    source.add_argument(
        "--num-prompts",
        type=int,
        metavar="M",
        help=f"how many (default: {DEFAULT_COUNT}, or all of --prompts): see docs/parity.md",
    )
    source.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="default: %(default)s"
    )
    source.add_argument(
        "--ignore-eos", action="store_true", help="decode on after the model's end tokens"
    )
    source.add_argument(
        "--top",
        type=int,
        default=8,
        metavar="K",
        help="likeliest candidates to record in each place (default: %(default)s)",
    )


def _add_verdict_options(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("verdict (default: against the measured noise floor)")
    limits.add_argument(
        "--thresholds", metavar="FILE", help='JSON with "false_alarm", "margin", "mean", "max"'
    )
    limits.add_argument(
        "--max-mean-delta", type=float, metavar="X", help="pin the mean |delta logprob|, in nats"
    )
    limits.add_argument(
        "--max-delta", type=float, metavar="X", help="pin any one |delta logprob|, in nats"
    )


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    from isomoe.parity.targets.detect import NAMES

    servers = parser.add_argument_group("servers")
    servers.add_argument("--dialect", choices=NAMES, help="default: found out by asking")
    servers.add_argument(
        "--served-model-name", metavar="NAME", help="default: the first that a server lists"
    )
    servers.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the key; it is sent, and kept nowhere",
    )
    servers.add_argument(
        "--timeout-seconds", type=float, default=120.0, metavar="S", help="default: %(default)s"
    )
    servers.add_argument(
        "--max-concurrency",
        type=int,
        default=32,
        metavar="N",
        help="requests open at once (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.mutants:
        from isomoe.cli.parity_mutants import run_mutants

        return run_mutants(args)
    if args.only:
        raise ConfigError("--only: is for --mutants")

    from isomoe.files import write_atomically
    from isomoe.parity.report import document, print_report, write_page

    session = _session(args)
    report = session.measure()
    text = json.dumps(document(report), allow_nan=False)
    write_atomically(session.folder / "report.json", text)
    decode = None if session.tokenizer is None else lambda token: session.decode((token,))
    write_page(report, session.folder / "report.html", decode)
    if args.json:
        print(text)
    else:
        print_report(report)
        print(f"saved: {session.folder}/report.html, report.json, and each run for file:RUN.json")
    return report.exit_code


def _session(args: argparse.Namespace) -> "Session":
    """What the flags ask for; nothing runs yet."""
    from isomoe.parity.session import PromptChoice, Session

    return Session(
        names=_names(args),
        known_good=tuple(args.floor),
        settings=_settings(args),
        has_model=args.model_path is not None,
        prompts=PromptChoice(
            file=args.prompts,
            random=args.random_prompts,
            count=args.num_prompts,
            seed=args.random_seed,
        ),
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        top=args.top,
        thresholds=_thresholds(args),
        bisects=args.bisect,
        folder=Path(args.out) if args.out else _new_folder(),
        conditions=_conditions(args),
    )


def _settings(args: argparse.Namespace) -> "TargetSettings":
    from isomoe.parity.targets.http_client import HttpSettings
    from isomoe.parity.targets.parse import TargetSettings

    engine = engine_config_from(args, Parallelism())

    @cache
    def info() -> "ModelInfo":
        from isomoe.engine.model_info import ModelInfo

        return ModelInfo.of(engine)

    http = HttpSettings(
        dialect=args.dialect,
        model=args.served_model_name,
        api_key=_api_key(args.api_key_env),
        timeout_seconds=args.timeout_seconds,
        max_concurrency=args.max_concurrency,
    )
    return TargetSettings(engine=engine, info=info, stage=progress_bar, http=http)


def _thresholds(args: argparse.Namespace) -> "Thresholds":
    from isomoe.parity.thresholds import Thresholds

    found = Thresholds() if args.thresholds is None else Thresholds.load(Path(args.thresholds))
    pinned = {"mean": args.max_mean_delta, "max": args.max_delta}
    return replace(found, **{name: value for name, value in pinned.items() if value is not None})


def _conditions(args: argparse.Namespace) -> dict[str, object]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "isomoe": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "max_tokens": args.max_tokens,
        "ignore_eos": args.ignore_eos,
        "max_concurrency": args.max_concurrency,
        "max_running_requests": args.max_running_requests,
        "page_size": args.page_size,
        "random_seed": args.random_seed,
    }


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    """Of all targets, with the defect of `--inject` behind each layout but the baseline."""
    names = (*args.targets, *args.layouts)
    if args.inject is None:
        return names

    from isomoe.parity.targets.parse import is_layout, shown

    for name in names[1:]:
        if not is_layout(name):
            raise ConfigError(f"--inject {args.inject}: {shown(name)} is no layout of this engine")
        if "+" in name:
            raise ConfigError(f"--inject {args.inject}: {name} has a defect already; one at a time")
    return (*names[:1], *(f"{name}+{args.inject}" for name in names[1:]))


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"--api-key-env {variable}: the environment has no such variable")
    return key


def _new_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "isomoe" / "parity" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
