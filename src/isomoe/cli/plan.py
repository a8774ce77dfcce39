"""`isomoe plan`: which collectives a model runs under a layout, and their predicted cost."""

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from isomoe.cli.options import add_layout_options, add_model_option, layout_from
from isomoe.cli.plan_table import Lost, print_plan
from isomoe.errors import ConfigError
from isomoe.layout import (
    MACHINES,
    Chain,
    Mesh,
    Plan,
    Regime,
    alternatives,
    make_plan,
    read_pinned,
    regimes,
)
from isomoe.models import build, read_config
from isomoe.models.memory import RankMemory
from isomoe.weights import Fp8, read_quantization, resolve

NAME = "plan"
HELP = (
    "Print which collectives a model runs under a layout, regime by regime, and the memory that a "
    "rank needs. Needs config.json only: no weights, no GPU, any number of ranks up to 1024."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_model_option(parser)
    add_layout_options(parser)
    parser.add_argument(
        "--rows", type=int, metavar="N", help="only the regimes of a step with N rows on all ranks"
    )
    parser.add_argument(
        "--device",
        default="cuda",
        choices=tuple(MACHINES),
        help="whose links the costs are of (default: %(default)s)",
    )
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="check and print the plan in a file that --json was written to, perhaps edited since",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also what lost, and by how much: the cheapest plan under one restriction each",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: must be at least 1")
    layout = layout_from(args)
    path = resolve(args.model_path, weights=False)
    config = read_config(path)
    model = build(config, layout)
    with suppress(ConfigError):  # that the engine does not read its weights is no matter here
        kept = read_quantization(config)
        if args.device == "cuda" and isinstance(kept, Fp8) and kept.square is not None:
            model.keep_experts_in_fp8(kept.square)  # as the engine does on GPUs
    memory = RankMemory.of(model)
    plan = _plan(args, model.chain)
    lost: Lost = alternatives(model.chain, plan) if args.explain else {}
    name = args.model_path or path.name
    if args.json:
        print(json.dumps({"model": name, "memory": asdict(memory), **_document(plan, lost)}))
    else:
        print_plan(name, plan, memory, lost, merge=args.rows is None)
    return 0


def _plan(args: argparse.Namespace, chain: Chain) -> Plan:
    machine = MACHINES[args.device]
    if args.plan is None:
        return make_plan(chain, machine, _wanted(chain.mesh, args.rows))
    if args.rows is not None:
        raise ConfigError(f"--rows {args.rows}: the regimes are those of --plan {args.plan}")
    return read_pinned(Path(args.plan), chain, machine)


def _document(plan: Plan, lost: Lost) -> dict[str, object]:
    document = plan.to_json()
    if lost:
        document["regimes"] = [
            {
                **bound.to_json(),
                "alternatives": [other.to_json() for other in lost[bound.regime]],
            }
            for bound in plan.regimes
        ]
    return document


def _wanted(mesh: Mesh, rows: int | None) -> list[Regime]:
    if rows is None:
        return regimes(mesh)
    return regimes(mesh, buckets=(rows,))
