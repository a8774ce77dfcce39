"""`isomoe prove`: that every plan sums every contribution exactly once, without weights."""

import argparse
import json
import time
from dataclasses import asdict

from rich.console import Console

from isomoe.cli.options import add_model_option
from isomoe.cli.progress import progress_bar
from isomoe.errors import ConfigError
from isomoe.layout import Parallelism
from isomoe.layout.parallelism import MAX_RANKS
from isomoe.models import HFConfig, build, known_configs, read_config
from isomoe.prove import MUTANTS, Report, expressible, find_mutant, prove_models
from isomoe.prove.corpus import ids_of
from isomoe.weights import bundled_checkpoint, resolve

NAME = "prove"
HELP = (
    "Prove, over every valid layout, that each norm sees the rows it should and every contribution "
    "counted exactly once. Real model classes, streams, plans and row maps run on simulated ranks; "
    "leaf operations emit exact integer provenance. No weights, no GPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_model_option(parser)
    parser.add_argument(
        "--all-models", action="store_true", help="every model that isomoe ships a config of"
    )
    parser.add_argument(
        "--max-ranks", type=int, default=64, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--all-paths",
        action="store_true",
        help="also with experts by all-to-all, rows packed before they are gathered, and redundant "
        "experts, on each layout",
    )
    parser.add_argument(
        "--mutant",
        metavar="NAME",
        help="plant a known defect, named or by the id of a historic one (sglang-23731): the proof "
        "must then fail (exit 1)",
    )
    parser.add_argument("--list-mutants", action="store_true", help="list the known defects")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.list_mutants:
        return _list_mutants(args.json)
    if not 1 <= args.max_ranks <= MAX_RANKS:
        raise ConfigError(f"--max-ranks {args.max_ranks}: must be from 1 to {MAX_RANKS}")
    configs = _configs(args)
    if args.mutant is not None:
        find_mutant(args.mutant)
        if not expressible(args.mutant, configs.values()):
            raise ConfigError(
                f"--mutant {args.mutant}: no block of {', '.join(configs)} has the part that it "
                "changes; --all-models has one that does"
            )
    began = time.monotonic()
    with progress_bar("proving layouts") as progress:
        report = prove_models(
            configs, args.max_ranks, args.mutant, progress, all_paths=args.all_paths
        )
    seconds = time.monotonic() - began
    if args.json:
        print(json.dumps(_document(args, report, seconds)))
    else:
        _print(args, report, seconds)
    return 1 if report.finding else 0


def _configs(args: argparse.Namespace) -> dict[str, HFConfig]:
    if args.all_models:
        if args.model_path:
            raise ConfigError("--all-models and --model-path exclude one another")
        return {bundled_checkpoint().name: read_config(bundled_checkpoint()), **known_configs()}
    path = resolve(args.model_path, weights=False)
    config = read_config(path)
    build(config, Parallelism())  # refuses what fits no layout at all
    return {args.model_path or path.name: config}


def _document(args: argparse.Namespace, report: Report, seconds: float) -> dict[str, object]:
    return {
        "holds": report.finding is None,
        "max_ranks": args.max_ranks,
        "all_paths": args.all_paths,
        "mutant": args.mutant,
        "models": report.models,
        "seconds": round(seconds, 2),
        "checked": asdict(report.stats),
        "violation": asdict(report.finding) if report.finding else None,
    }


def _print(args: argparse.Namespace, report: Report, seconds: float) -> None:
    console = Console(highlight=False, soft_wrap=True)
    s = report.stats
    planted = f" with {args.mutant} planted" if args.mutant else ""
    if report.finding is not None:
        console.print(f"[red]violated[/]{planted}: {report.finding}")
    else:
        console.print(
            f"[green]holds[/]{planted}: {report.models} model(s) on every layout of up to "
            f"{args.max_ranks} ranks, in {seconds:.0f} s"
        )
    console.print(
        f"checked {s.layouts:,} layouts, {s.regimes:,} regimes ({s.proven_as_equal:,} of them "
        f"proven once with an equal plan), {s.steps:,} steps, {s.moves:,} moves, "
        f"{s.contributions:,} contributions"
    )


def _list_mutants(as_json: bool) -> int:
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": mutant.name,
                        "operator": mutant.code,
                        "what": mutant.what,
                        "runs_in_engine": mutant.runs_in_engine,
                        "defects": ids_of(mutant.name),
                    }
                    for mutant in MUTANTS
                ]
            )
        )
        return 0
    width = max(len(mutant.name) for mutant in MUTANTS)
    for mutant in MUTANTS:
        ids = ids_of(mutant.name)
        known = f" ({', '.join(ids)})" if ids else ""
        print(f"{mutant.name:<{width}}  {mutant.code}  {mutant.what}{known}")
    return 0
