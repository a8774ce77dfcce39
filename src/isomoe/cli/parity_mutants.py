"""`isomoe parity --mutants`: every known defect, and who sees it."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from isomoe.cli.progress import progress_bar
from isomoe.prove.corpus import Fate, defects
from isomoe.prove.mutants import MUTANTS, Mutant, find_mutant

if TYPE_CHECKING:
    from isomoe.parity.defects import Row

_FILE_WIDTH = 150
"""Columns of the table where the output is no terminal."""


def run_mutants(args: argparse.Namespace) -> int:
    """Measures, and prints the table. Exit 0 if every defect is caught where it ought to be."""
    from isomoe.parity.defects import measure

    wanted = _wanted(args.only)
    total = len(wanted)
    done: list[Row] = []
    log = Console(stderr=True, highlight=False)

    def each(row: "Row") -> None:
        done.append(row)
        log.print(f"{len(done)}/{total} {row.mutant.name}: {row.verdict}")

    with TemporaryDirectory() as folder:
        rows = measure(wanted, Path(folder), progress_bar, each)
    rows.sort(key=lambda row: list(MUTANTS).index(row.mutant))
    if args.json:
        print(json.dumps(_document(rows), allow_nan=False))
    else:
        _print(rows, is_whole=args.only is None)
    return 0 if all(row.is_caught for row in rows) else 1


def _wanted(names: Sequence[str] | None) -> list[Mutant]:
    if names is None:
        return list(MUTANTS)
    found = [find_mutant(name) for name in names]
    return list(dict.fromkeys(found))


def _counts(rows: Sequence["Row"]) -> dict[str, int]:
    changed = [row for row in rows if row.changes_numbers]
    return {
        "mutants": len(rows),
        "type_check": sum(row.seen.type_check for row in rows),
        "proof": sum(row.seen.proof for row in rows),
        "change_numbers": len(changed),
        "verdict_differs": sum(row.verdict == "differs" for row in rows),
        "bisect_right": sum(row.block_is_right for row in changed),
    }


def _document(rows: Sequence["Row"]) -> dict[str, object]:
    return {
        "counts": _counts(rows),
        "rows": [row.to_json() for row in rows],
        "not_planted": [
            {"row": one.row, "id": one.ids[0], "fate": str(one.fate), "reason": one.reason}
            for one in defects()
            if one.fate is not Fate.PLANTED
        ],
    }


def _print(rows: Sequence["Row"], is_whole: bool) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_FILE_WIDTH)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("defect", no_wrap=True)
    table.add_column("op", no_wrap=True)
    table.add_column("historic", no_wrap=True)
    table.add_column("seen by, expected")
    for title in ("type check", "proof", "verdict", "x floor", "bisect names"):
        table.add_column(title)
    for row in rows:
        ids = row.ids[0] + (f" +{len(row.ids) - 1}" if len(row.ids) > 1 else "") if row.ids else ""
        table.add_row(
            row.mutant.name,
            row.mutant.code,
            ids,
            ", ".join(map(str, row.seen.expected)),
            "refused" if row.seen.type_check else "",
            "found" if row.seen.proof else "",
            str(row.verdict),
            "" if row.effect is None else f"{row.effect:.3g}",
            _named(row),
        )
    console.print(table)
    counts = _counts(rows)
    console.print(
        "{mutants} mutants: {type_check} refused by the type check, {proof} found by the proof; "
        "{change_numbers} change the numbers of a run that ends, the verdict tells "
        "{verdict_differs} of them apart, and the bisection names the right block of "
        "{bisect_right}.".format(**counts),
        soft_wrap=True,
    )
    for row in rows:
        if row.why:
            console.print(f"{row.mutant.name}: {row.verdict}: {row.why}", soft_wrap=True)
        if row.broke:
            console.print(f"{row.mutant.name}: not bisected: {row.broke}", soft_wrap=True)
    if is_whole:
        _print_others(console)


def _named(row: "Row") -> str:
    if not row.changes_numbers:
        return ""
    if row.broke:
        return "broke"
    found = row.named or "nothing"
    return found if row.block_is_right else f"{found}, not {row.mutant.block}"


def _print_others(console: Console) -> None:
    """The historic defects that no mutant plants."""
    found = [one for one in defects() if one.fate is not Fate.PLANTED]
    fates = Counter(str(one.fate) for one in found)
    console.print(
        f"\nof {len(defects())} historic defects, "
        + ", ".join(f"{count} are {fate}" for fate, count in fates.items())
        + ":"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("historic", "fate", "why"):
        table.add_column(title, no_wrap=title != "why")
    for one in found:
        table.add_row(one.ids[0], str(one.fate), one.reason or "")
    console.print(table)
