"""Plans as tables, for terminals and files."""

import re
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from isomoe.layout import Alternative, Move, Plan, Regime, RegimePlan
from isomoe.layout.plan import Delivery, Route, Settle
from isomoe.models.memory import RankMemory
from isomoe.units import scaled

_FILE_WIDTH = 150
"""Columns of the table where the output is no terminal."""

Lost = Mapping[Regime, Sequence[Alternative]]
"""For each regime what its plan was chosen before; empty where nobody asked."""


def print_plan(name: str, plan: Plan, memory: RankMemory, lost: Lost, merge: bool) -> None:
    """Prints a plan as tables.

    Args:
        name: of the model.
        lost: is printed under each table, where there is any.
        merge: whether regimes that make the same moves share a table.
    """
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
        _print_lost(console, same[-1], lost)


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
                _moves(route),
                f"{route.sent_bytes_per_row:,.0f}",
                f"{route.predicted_us:,.1f}",
                _beaten(route),
            )
    for block, inner in plan.inner:
        for move in inner:
            table.add_row("inside", block, f"{move.before} > {move.after}", _short(move))
    console.print(table)
    console.print(f"all moves of a step of {plan.regime.rows} rows: {plan.predicted_us:,.0f} us")


def _print_lost(console: Console, plan: RegimePlan, lost: Lost) -> None:
    if not lost.get(plan.regime):
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("instead", no_wrap=True)
    for title in ("us", "lost by", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for other in lost[plan.regime]:
        share = f"{other.lost_by_us / plan.predicted_us:.1%}" if plan.predicted_us else ""
        table.add_row(
            other.what, f"{other.predicted_us:,.0f}", f"{other.lost_by_us:,.1f} us", share
        )
    console.print(table)


def _moves(route: Route) -> str:
    moves = " + ".join(map(_short, route.moves))
    return f"{moves} fused with the norm" if route.fused else moves


def _short(move: Move) -> str:
    return f"{move.op}({','.join(map(str, move.axes))})"


def _beaten(route: Route) -> str:
    if route.beats is None:
        return ""
    return f"{_moves(route.beats)}: {route.beats.predicted_us:,.1f} us"


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


def _memory_line(memory: RankMemory) -> str:
    parts = [
        f"{scaled(memory.weight_bytes, 'B')} of weights",
        f"{scaled(memory.kv_bytes_per_token, 'B')} of KV cache a token",
    ]
    if memory.state_bytes_per_request:
        parts.append(f"{scaled(memory.state_bytes_per_request, 'B')} of states a request")
    dtype = f"{memory.dtype}{', experts in FP8' if memory.fp8_experts else ''}"
    return f"{', '.join(parts)} ({dtype})"
