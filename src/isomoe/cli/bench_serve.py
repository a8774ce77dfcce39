"""`isomoe bench serve`: latency and throughput of a server under a load."""

import argparse
import asyncio
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from isomoe import __version__
from isomoe.bench import (
    BenchRequest,
    Endpoint,
    LoadPlan,
    OfflineEngine,
    OfflineRun,
    ServeReport,
    Target,
    Workload,
    compare_offline,
    find_target,
    launched_server,
    measure_waves,
    read_dataset,
)
from isomoe.cli.options import (
    add_engine_options,
    add_layout_options,
    add_runtime_options,
    engine_config_from,
    layout_from,
)
from isomoe.cli.progress import progress_bar
from isomoe.config import choice
from isomoe.errors import ConfigError
from isomoe.http import HttpClient, Url

NAME = "serve"
HELP = "Measure a server with OpenAI's API: time to first token, latencies, throughput."

_URL = "http://127.0.0.1:30000"
_CONCURRENCY = 32
_REPEATS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the measurement's flags."""
    _add_server_options(parser)
    _add_load_options(parser)
    _add_prompt_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document")
    output.add_argument(
        "--output-file", metavar="FILE", help="add the JSON document to FILE, as one more line"
    )
    add_layout_options(parser)
    add_runtime_options(parser)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", "--base-url", metavar="URL", help=f"of a server that runs (default: {_URL})"
    )
    server.add_argument(
        "--launch",
        action="store_true",
        help="start `isomoe serve` with the engine's flags, on a free port, and stop it afterwards",
    )
    server.add_argument(
        "--model-path",
        "--model",
        metavar="NAME",
        help="the model that requests ask for (default: the first that the server lists); "
        "with --launch, the folder or hub id to serve (default: the checkpoint that ships with "
        "isomoe)",
    )
    server.add_argument(
        "--endpoint",
        default=str(Endpoint.COMPLETIONS),
        metavar="NAME",
        help=f"{', '.join(Endpoint)}: which of OpenAI's endpoints (default: %(default)s)",
    )
    server.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="the environment variable that holds the server's key (default: %(default)s)",
    )
    server.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="after which a request has failed (default: %(default)g)",
    )
    server.add_argument(
        "--compare-offline",
        action="store_true",
        help="with --launch: measure the offline engine in turn with the server, on the same "
        "prompts and flags, and print the ratio",
    )
    server.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"with --compare-offline: rounds of either, with fresh prompts (default: {_REPEATS})",
    )


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument(
        "--num-prompts",
        type=int,
        metavar="N",
        help="requests of a wave (default: 128, or all of --dataset)",
    )
    load.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="the most requests that are open at once (default: "
        f"{_CONCURRENCY}; with --request-rate, without bound)",
    )
    load.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="requests a second that arrive as a Poisson process (default: inf, all at once)",
    )
    load.add_argument(
        "--waves",
        type=int,
        default=1,
        metavar="N",
        help="send --num-prompts requests N times, one wave after the other (default: 1)",
    )
    load.add_argument(
        "--warmup",
        "--num-warmups",
        "--warmup-requests",
        type=int,
        metavar="N",
        help="requests that are sent before and not counted "
        "(default: 1; with --compare-offline, --max-concurrency)",
    )
    load.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have answers of exactly the length asked for, past the model's end tokens; "
        "--no-ignore-eos for servers that do not know the field (default: on)",
    )


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    default = Workload()
    prompts = parser.add_argument_group("prompts (default: random token ids)")
    prompts.add_argument(
        "--input-len",
        "--random-input-len",
        type=int,
        default=default.input_len,
        metavar="N",
        help="tokens of a prompt, besides a shared prefix (default: %(default)s)",
    )
    prompts.add_argument(
        "--output-len",
        "--random-output-len",
        type=int,
        default=default.output_len,
        metavar="N",
        help="tokens of an answer (default: %(default)s)",
    )
    prompts.add_argument(
        "--range-ratio",
        "--random-range-ratio",
        type=float,
        default=default.range_ratio,
        metavar="R",
        help="draw each length uniformly from floor(len * (1 - R)) to ceil(len * (1 + R)), both "
        "included, and at least 1 (default: 0)",
    )
    prompts.add_argument(
        "--shared-prefix-len",
        "--random-prefix-len",
        type=int,
        default=default.shared_prefix_len,
        metavar="N",
        help="tokens that all prompts begin with, the same in every wave (default: 0)",
    )
    prompts.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="of all draws (default: 0)"
    )
    prompts.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="draw token ids below N (default: what the server says, else 256)",
    )
    prompts.add_argument(
        "--dataset",
        "--dataset-path",
        metavar="FILE",
        help='a file with one {"prompt": ...} a line (text, or a list of token ids) instead of '
        "random prompts",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the measurement: 0 if every request succeeded, 1 if one did not."""
    plan = _plan(args)
    endpoint = choice(Endpoint, args.endpoint, "--endpoint")
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner(loop_factory=_loop_factory()))
        if args.launch:
            with progress_bar("starting the server"):
                url = stack.enter_context(launched_server(_server_words(args, plan)))
        else:
            url = Url.parse(_URL if args.url is None else args.url)
        http = HttpClient(url, None if args.launch else _api_key(args.api_key_env))
        stack.callback(http.close)
        target = runner.run(
            find_target(
                http,
                endpoint=endpoint,
                model=None if args.launch else args.model_path,
                vocab_size=args.vocab_size,
                sample=plan.dataset[0].prompt if plan.dataset else None,
                ignore_eos=args.ignore_eos,
                timeout_seconds=args.timeout,
            )
        )
        offline_runs: list[OfflineRun] = []
        if args.compare_offline:
            config = replace(
                engine_config_from(args), max_running_requests=_running_requests(args, plan)
            )
            with progress_bar("starting the offline engine"):
                offline = stack.enter_context(OfflineEngine(config))
            rounds = _REPEATS if args.repeats is None else args.repeats
            offline_runs, runs = compare_offline(
                runner, target, plan, offline, rounds, progress_bar
            )
        else:
            runs = measure_waves(runner, target, plan, progress_bar)
    report = ServeReport(
        conditions=_conditions(args, plan, target),
        runs=runs,
        offline=offline_runs,
        notes=target.notes,
    )
    return _write(args, report)


def _plan(args: argparse.Namespace) -> LoadPlan:
    """What the flags ask for.

    Raises:
        ConfigError: if they contradict one another, or are out of range.
    """
    _check(args)
    dataset: list[BenchRequest] = []
    if args.dataset is not None:
        dataset = read_dataset(args.dataset, args.output_len)
    num_prompts = args.num_prompts
    if num_prompts is None:
        num_prompts = len(dataset) or Workload().num_prompts
    if dataset and num_prompts > len(dataset):
        raise ConfigError(f"--num-prompts {num_prompts}: {args.dataset} has {len(dataset)}")
    concurrency = args.max_concurrency
    if concurrency is None and math.isinf(args.request_rate):
        concurrency = _CONCURRENCY
    warmup = args.warmup
    if warmup is None:
        warmup = concurrency if args.compare_offline else 1
    return LoadPlan(
        workload=Workload(
            num_prompts=num_prompts,
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=args.range_ratio,
            shared_prefix_len=args.shared_prefix_len,
            waves=args.waves,
            seed=args.seed,
        ),
        dataset=dataset[:num_prompts],
        max_concurrency=concurrency,
        request_rate=args.request_rate,
        warmup=warmup,
    )


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that mean nothing together, or are out of range."""
    engine_words = _engine_words(args, besides="model_path")
    if args.launch and args.url is not None:
        raise ConfigError(f"--launch --url {args.url}: give one of them")
    if engine_words and not args.launch:
        raise ConfigError(f"{engine_words[0]}: is for the server that --launch starts")
    if args.dataset is not None and (args.waves > 1 or args.shared_prefix_len or args.range_ratio):
        raise ConfigError(
            "--dataset: --waves, --shared-prefix-len and --range-ratio are for random prompts"
        )
    if args.timeout <= 0.0:
        raise ConfigError(f"--timeout {args.timeout:g}: must be above 0")
    for flag, value in (("--vocab-size", args.vocab_size), ("--repeats", args.repeats)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    if not args.compare_offline:
        if args.repeats is not None:
            raise ConfigError("--repeats: is for --compare-offline; --waves sends several waves")
        return
    if not args.launch:
        raise ConfigError("--compare-offline: needs --launch, so that both run with the same flags")
    if (
        args.dataset is not None
        or args.waves > 1
        or args.endpoint != Endpoint.COMPLETIONS
        or math.isfinite(args.request_rate)
    ):
        raise ConfigError(
            "--compare-offline: runs the same random prompts as one batch on either side; "
            "--dataset, --waves, --endpoint chat and --request-rate do not go with it"
        )


def _engine_words(args: argparse.Namespace, besides: str | None = None) -> list[str]:
    """The engine's flags that differ from their defaults, as they are typed."""
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    words = []
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name == besides or value == default:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def _server_words(args: argparse.Namespace, plan: LoadPlan) -> list[str]:
    words = _engine_words(args)
    if args.compare_offline:
        words += ["--max-running-requests", str(_running_requests(args, plan))]
    return words


def _running_requests(args: argparse.Namespace, plan: LoadPlan) -> int:
    """Of each attention-DP group, so that all open requests run."""
    assert plan.max_concurrency is not None
    return -(-plan.max_concurrency // layout_from(args).attn_dp_size)


def _api_key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"--api-key-env {variable}: its value cannot stand in a header")
    return key or None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: a chunk costs 11 us there, and 28 us on asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _conditions(args: argparse.Namespace, plan: LoadPlan, target: Target) -> dict[str, object]:
    workload = plan.workload
    affinity = getattr(os, "sched_getaffinity", None)
    if args.dataset is not None:
        prompts = Path(args.dataset).name
    elif target.vocab_size is None:
        prompts = "random words"
    else:
        prompts = f"random token ids below {target.vocab_size}"
    conditions: dict[str, object] = {
        "isomoe": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "url": str(target.client.http.url),
        "model": target.client.model,
        "endpoint": str(target.client.endpoint),
        "prompts": prompts,
        "num_prompts": workload.num_prompts,
        "input_len": None if plan.dataset else workload.input_len,
        "output_len": workload.output_len,
        "range_ratio": workload.range_ratio,
        "shared_prefix_len": workload.shared_prefix_len,
        "waves": workload.waves,
        "seed": workload.seed,
        "max_concurrency": plan.max_concurrency,
        "request_rate": plan.request_rate if math.isfinite(plan.request_rate) else None,
        "warmup": plan.warmup,
        "ignore_eos": args.ignore_eos,
    }
    if args.launch:
        conditions["launched"] = " ".join(["isomoe serve", *_server_words(args, plan)])
    return conditions


def _write(args: argparse.Namespace, report: ServeReport) -> int:
    """Prints the report; the exit code."""
    document = json.dumps(report.to_json(), allow_nan=False)
    print(document if args.json else report.text())
    for remark in report.remarks:
        print(f"note: {remark}", file=sys.stderr)
    for problem in report.problems:
        print(f"isomoe: {problem}", file=sys.stderr)
    if args.output_file is not None:
        try:
            with Path(args.output_file).open("a", encoding="utf-8") as file:
                file.write(document + "\n")
        except OSError as error:
            raise ConfigError(f"--output-file {args.output_file}: not writable ({error})") from None
    return 1 if report.problems else 0
