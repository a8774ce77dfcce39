"""`isomoe models`: the families, what they are made of, what was measured and what is proven."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from isomoe.models.catalogue import Row, read_measured, rows

NAME = "models"
HELP = (
    "List the model families: architectures, attention, router, the oracle each was compared with, "
    "the largest difference found, and the layouts proven."
)

_FILE_WIDTH = 180
"""Columns of the table where the output is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    found = rows(read_measured())
    if args.json:
        print(json.dumps([asdict(row) for row in found]))
    else:
        print_table(found)
    return 0


def shown_delta(row: Row) -> str:
    """As tables have it."""
    return "not measured" if row.delta is None else f"{row.delta:.1e}"


def shown_layouts(row: Row) -> str:
    """As tables have it."""
    if row.layouts_proven is None:
        return "not proven"
    return f"{row.layouts_proven:,} (to {row.max_ranks} ranks)"


def print_table(found: Sequence[Row]) -> None:
    """The table on stdout; which families lack figures, on stderr."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("family", "architectures"):
        table.add_column(title, no_wrap=True)
    for title in ("attention", "router", "oracle"):
        table.add_column(title)
    table.add_column("largest |delta|", justify="right", no_wrap=True)
    table.add_column("layouts proven", justify="right", no_wrap=True)
    for row in found:
        table.add_row(
            row.family,
            "\n".join(row.architectures),
            row.attention,
            row.router,
            "\n".join(row.oracles),
            shown_delta(row),
            shown_layouts(row),
        )
    console.print(table)
    console.print(
        "delta: of a logit, relative to the largest one, fp32, over layouts of up to 8 ranks; "
        "some: in some layers or checkpoints",
        style="dim",
    )
    lacking = [row for row in found if row.delta is None or row.layouts_proven is None]
    if lacking:
        names = ", ".join(row.architectures[0] for row in lacking)
        print(
            f"isomoe: not measured or not proven yet: {names}; `make models` in a source tree "
            "does both",
            file=sys.stderr,
        )
