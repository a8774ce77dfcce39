"""`isomoe bench offline`: how fast the engine is, beside the least time that the device needs."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomoe.cli.options import add_engine_options, engine_config_from
from isomoe.cli.progress import progress_bar
from isomoe.errors import ConfigError

if TYPE_CHECKING:
    from isomoe.bench.device import DeviceLimits
    from isomoe.bench.floors import ModelCounts
    from isomoe.bench.offline_report import WorkloadResult
    from isomoe.bench.offline_workload import OfflineWorkload
    from isomoe.config import EngineConfig
    from isomoe.engine import LLM

NAME = "offline"
HELP = (
    "Measure the engine in this process, without a server, and print each figure beside its floor: "
    "the least time in which the device could move the bytes and multiply the matrices that the "
    "work needs. W1 is one request (latency), W2 decode of 64, W3 prefill, W4 256 requests of "
    "mixed lengths."
)

_STANDARD = ("W1", "W2", "W4", "W3")
_CUSTOM = {"num_requests": 8, "input_len": 64, "output_len": 32}
_EXPERT_STEPS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the measurement's flags."""
    work = parser.add_argument_group("workloads")
    work.add_argument(
        "--workloads",
        nargs="+",
        metavar="W",
        help=f"some of {' '.join(_STANDARD)}, in the order given (default: all of them on a GPU; "
        "elsewhere one custom workload)",
    )
    work.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help=f"a custom workload of N requests at once (default: {_CUSTOM['num_requests']})",
    )
    work.add_argument(
        "--input-len",
        type=int,
        metavar="N",
        help=f"tokens of each prompt of it, random ones (default: {_CUSTOM['input_len']})",
    )
    work.add_argument(
        "--output-len",
        type=int,
        metavar="N",
        help=f"tokens of each answer of it; 1 measures prefill (default: {_CUSTOM['output_len']})",
    )
    work.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="how often each workload is run, after a warm-up; the median counts (default: 3)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print one JSON document instead of the tables; with FILE, write it there and print "
        "the tables, too. A folder gets a file named by date and card",
    )
    output.add_argument(
        "--trace",
        metavar="FILE",
        help="write the profiled steps for https://ui.perfetto.dev; .json or .json.gz. Of several "
        "workloads each gets a file with its name in it",
    )
    output.add_argument(
        "--profile-steps",
        type=int,
        default=10,
        metavar="N",
        help="decode steps to profile, so as to say where their time goes; 0 for none "
        "(default: 10)",
    )
    output.add_argument(
        "--commit",
        metavar="ID",
        help="the commit that the document names (default: what git says)",
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the measurement."""
    import torch

    from isomoe.bench.device import measure_limits
    from isomoe.bench.floors import ModelCounts
    from isomoe.bench.offline_engine import check_cache, check_context
    from isomoe.bench.offline_report import console, limits_line, print_tables
    from isomoe.bench.results import read_peers, write
    from isomoe.engine import LLM
    from isomoe.engine.model_info import ModelInfo

    for flag, value, least in (
        ("--repeats", args.repeats, 1),
        ("--profile-steps", args.profile_steps, 0),
    ):
        if value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}")
    if args.trace is not None and not args.profile_steps:
        raise ConfigError("--trace: needs --profile-steps above 0")
    config = replace(engine_config_from(args), disable_radix_cache=True)
    info = ModelInfo.of(config)
    counts = ModelCounts.of(info.hf_config, getattr(torch, info.dtype), info.expert_block)
    workloads = _workloads(args, info.device)
    for workload in workloads:
        check_context(info, workload)
        _trace_file(args.trace, workload.name)  # what is wrong with it is said before any work
    _say("measuring the device's copy bandwidth and rate of matrix products")
    limits = measure_limits(torch.device(info.device), getattr(torch, info.dtype))
    _say(limits_line(limits))
    peers = read_peers(info.hf_config)
    results: list[WorkloadResult] = []
    with (
        progress_bar("loading the weights") as progress,
        LLM.from_config(config, load_progress=progress) as llm,
    ):
        for workload in workloads:
            check_cache(llm, workload)
        for workload in workloads:
            results.append(_measure(args, llm, counts, limits, workload, len(workloads) > 1))
            document = _document(args, config, llm, counts, limits, results, peers)
            if args.json not in (None, "-"):
                # After each workload, so that little is lost if a later one is cut short.
                written = write(document, Path(args.json))
    if args.json == "-":
        print(json.dumps(document, allow_nan=False))
        return 0
    to = console()
    to.print(limits_line(limits))
    print_tables(to, results, peers)
    if args.json is not None:
        to.print(f"written to {written}")
    return 0


def _workloads(args: argparse.Namespace, device: str) -> "list[OfflineWorkload]":
    from isomoe.bench.offline_workload import OfflineWorkload, standard_workloads

    asked = {name: getattr(args, name) for name in _CUSTOM}
    given = [name for name, value in asked.items() if value is not None]
    if args.workloads is not None and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"--workloads {flag}: give either; {flag} is for a custom workload")
    names = args.workloads
    if names is None and not given and device == "cuda":
        names = list(_STANDARD)
    if names is None:
        sizes = {
            name: default if asked[name] is None else asked[name]
            for name, default in _CUSTOM.items()
        }
        return [OfflineWorkload.custom(**sizes)]
    standard = standard_workloads()
    for name in names:
        if name not in standard:
            raise ConfigError(f"--workloads {name}: must be among {', '.join(sorted(standard))}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--workloads {' '.join(names)}: one of them stands there twice")
    return [standard[name] for name in names]


def _measure(
    args: argparse.Namespace,
    llm: "LLM",
    counts: "ModelCounts",
    limits: "DeviceLimits",
    workload: "OfflineWorkload",
    several: bool,
) -> "WorkloadResult":
    from isomoe.bench.offline_engine import count_experts, run_once, warm_up
    from isomoe.bench.offline_report import WorkloadResult, result_line
    from isomoe.bench.profile import profile_workload

    _say(f"{workload.name}: {workload.title}; warming up")
    warm_up(llm, workload)
    result = WorkloadResult(workload)
    for repeat in range(args.repeats):
        result.samples.append(run_once(llm, workload, repeat))
        _say(f"{workload.name}: repeat {repeat + 1} of {args.repeats}: {result.values[-1]:.5g}")
    if workload.figure.is_decode:
        result.experts = count_experts(llm, workload, _EXPERT_STEPS)
    if args.profile_steps:
        trace = _trace_file(args.trace, workload.name if several else None)
        result.breakdown = profile_workload(llm, workload, args.profile_steps, trace)
        if result.breakdown is None:
            _say(
                f"{workload.name}: not profiled; that takes one rank, and longer answers for "
                "some steps of decode alone"
            )
    if llm.config.parallelism.tp_size == 1:
        distinct = None if result.experts is None else result.experts.distinct
        result.floor = workload.floor(counts, limits, distinct)
    _say(result_line(result))
    return result


def _trace_file(asked: str | None, name: str | None) -> Path | None:
    if asked is None:
        return None
    file = Path(asked)
    if not file.name.endswith((".json", ".json.gz")):
        raise ConfigError(f"--trace {asked}: must end in .json or .json.gz")
    if not file.parent.is_dir():
        raise ConfigError(f"--trace {asked}: there is no folder {file.parent}")
    stem, dot, rest = file.name.partition(".json")
    return file.with_name(f"{stem}-{name}{dot}{rest}") if name else file


def _document(
    args: argparse.Namespace,
    config: "EngineConfig",
    llm: "LLM",
    counts: "ModelCounts",
    limits: "DeviceLimits",
    results: "list[WorkloadResult]",
    peers: dict[str, Any] | None,
) -> dict[str, Any]:
    from isomoe.bench.results import conditions

    return {
        **conditions("offline", "isomoe " + shlex.join(sys.argv[1:]), args.commit),
        "device": limits.to_json(),
        "model": {
            "name": llm.info.folder.name
            if args.model_path is None
            else Path(args.model_path).name.removesuffix(".json"),
            "dtype": llm.info.dtype,
            **asdict(counts),
        },
        "settings": _plain(asdict(config)),
        "repeats": args.repeats,
        "workloads": [result.to_json(counts, peers) for result in results],
        "peers_conditions": None if peers is None else peers["conditions"],
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Enums as text, so that any JSON reader takes them."""
    return json.loads(json.dumps(settings, default=str))  # type: ignore[no-any-return]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
