"""`isomoe plan`: which collectives a model runs under a layout, and their predicted cost."""

import argparse
import json
import re
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from isomoe.cli.options import add_layout_options, add_model_option, layout_from
from isomoe.errors import ConfigError
from isomoe.layout import MACHINES, Mesh, Move, Plan, Regime, RegimePlan, make_plan, regimes
from isomoe.layout.plan import Delivery, Route, Settle
from isomoe.models import build, read_config
from isomoe.models.memory import RankMemory
from isomoe.units import scaled
from isomoe.weights import resolve

_FILE_WIDTH = 150
"""Columns of the table where the output is no terminal."""

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
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: must be at least 1")
    layout = layout_from(args)
    path = resolve(args.model_path, weights=False)
    model = build(read_config(path), layout)
    memory = RankMemory.of(model)
    plan = make_plan(model.chain, MACHINES[args.device], _wanted(model.chain.mesh, args.rows))
    name = args.model_path or path.name
    if args.json:
        print(json.dumps({"model": name, "memory": asdict(memory), **plan.to_json()}))
    else:
        _print(name, plan, memory, merge=args.rows is None)
    return 0


def _memory_line(memory: RankMemory) -> str:
    parts = [
        f"{scaled(memory.weight_bytes, 'B')} of weights",
        f"{scaled(memory.kv_bytes_per_token, 'B')} of KV cache a token",
    ]
    if memory.state_bytes_per_request:
        parts.append(f"{scaled(memory.state_bytes_per_request, 'B')} of states a request")
    return f"{', '.join(parts)} ({memory.dtype})"


def _wanted(mesh: Mesh, rows: int | None) -> list[Regime]:
    if rows is None:
        return regimes(mesh)
    return regimes(mesh, buckets=(rows,))


def _print(name: str, plan: Plan, memory: RankMemory, merge: bool) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    mesh = plan.mesh
    axes = " x ".join(map(str, mesh.axes)) or "1"
    console.print(f"[bold]{name}[/] on {mesh.parallelism}: {mesh.size} ranks, mesh {axes}")
    console.print(f"memory of a rank: {_memory_line(memory)}")
    groups = mesh.to_json()
    del groups["axes"]
    console.print(
        "axes: " + ", ".join(f"{g} {','.join(map(str, axes)) or '-'}" for g, axes in groups.items())
    )
    console.print(
        "S: different rows, R: the same rows, P: addends of the same rows, C: other features; "
        "one letter an axis",
        style="dim",
    )
    alike: dict[object, list[RegimePlan]] = {}
    for plan_of in plan.regimes:
        key = (plan_of.regime.equal, plan_of.signature if merge else plan_of.regime)
        alike.setdefault(key, []).append(plan_of)
    for same in alike.values():
        console.print()
        _print_regime(console, same)


def _print_regime(console: Console, same: list[RegimePlan]) -> None:
    """One table for regimes that make the same moves; costs are of the one with most rows."""
    plan = same[-1]
    rows = " / ".join(str(one.regime.rows) for one in same)
    form = "equal" if plan.regime.equal else "ragged"
    table = Table(
        title=f"steps of up to {rows} rows, {form} over the attention groups",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for title in ("", "block", "placement", "moves"):
        table.add_column(title, no_wrap=True)
    for title in ("bytes/row", "us"):
        table.add_column(title, justify="right")
    table.add_column("instead of")
    for count, lines in _folded(plan):
        for step, block, before, route, after in lines:
            name = block if count == 1 else f"{_kind(block)} x{count}"
            table.add_row(
                step,
                name.removeprefix("model."),
                before if before == after else f"{before} > {after}",
                " + ".join(map(_short, route.moves)),
                f"{route.sent_bytes_per_row:,.0f}",
                f"{route.predicted_us:,.1f}",
                _beaten(route),
            )
    for block, inner in plan.inner:
        for move in inner:
            table.add_row("inside", block, f"{move.before} > {move.after}", _short(move))
    console.print(table)
    console.print(f"all moves of a step of {plan.regime.rows} rows: {plan.predicted_us:,.0f} us")


def _short(move: Move) -> str:
    return f"{move.op}({','.join(map(str, move.axes))})"


def _beaten(route: Route) -> str:
    if route.beats is None:
        return ""
    return f"{' + '.join(map(_short, route.beats.moves))}: {route.beats.predicted_us:,.1f} us"


_Line = tuple[str, str, str, Route, str]


def _folded(plan: RegimePlan) -> list[tuple[int, list[_Line]]]:
    """The lines of each read; reads that are alike but for the layer's number are counted once."""
    folded: dict[tuple[object, ...], tuple[int, list[_Line]]] = {}
    for read in plan.reads:
        parts: list[Settle | Delivery] = []
        if read.carry and read.carry.route.moves:
            parts.append(read.carry)
        lines = [_line(part) for part in (*parts, *read.settles, *read.deliveries)]
        key = tuple((line[0], _kind(line[1]), line[2:]) for line in lines)
        count, kept = folded.get(key, (0, lines))
        folded[key] = (count + 1, kept)
    return list(folded.values())


def _line(part: Settle | Delivery) -> _Line:
    if isinstance(part, Settle):
        first, *others = part.producers
        producers = " + ".join([first, *(name.rpartition(".")[2] for name in others)])
        return "settle", producers, str(part.gives), part.route, str(part.residual)
    return "deliver", part.consumer, str(part.residual), part.route, str(part.needs)


def _kind(name: str) -> str:
    """A block's name without the layer's number."""
    return re.sub(r"\.\d+\.", ".*.", name)
