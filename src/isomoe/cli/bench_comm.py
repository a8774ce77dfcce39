"""`isomoe bench comm`: what the collectives of a plan cost on this machine."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomoe.cli.options import add_model_option
from isomoe.cli.progress import progress_bar
from isomoe.errors import ConfigError
from isomoe.layout.parallelism import MAX_RANKS, divisors

if TYPE_CHECKING:
    from isomoe.bench.comm_plans import Pick
    from isomoe.comm.measure import Reading
    from isomoe.layout import Link

NAME = "comm"
HELP = (
    "Measure every collective that a plan may use, from 1 to 8192 rows, fit the planner's alpha "
    "(microseconds a call) and beta (bytes a microsecond) to it, and tell how far its predictions "
    "were off before and after, and whether it picks the moves that are fastest as measured."
)

_ROWS = tuple(2**power for power in range(14))
_PLAN_ROWS = (8, 64, 512, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the measurement's flags."""
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="W",
        help="processes of this host; groups of every size that W can be cut into are measured "
        "(default: one for each GPU, or 2 on a CPU)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="ranks share GPUs, over Gloo, if there are too few (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=_ROWS,
        metavar="N",
        help="of a group's step (default: the powers of 2 up to 8192)",
    )
    add_model_option(parser)
    parser.add_argument(
        "--from",
        dest="readings",
        metavar="FILE",
        help="fit the readings of a document that --json wrote, and measure nothing",
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the fit: every later plan on this kind of device is made with it",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print one JSON document instead of the table; with FILE (or a folder), write it "
        "there and print the table, too",
    )
    output.add_argument("--commit", metavar="ID", help="that the document names (default: git's)")


def run(args: argparse.Namespace) -> int:
    """Runs the measurement."""
    from isomoe.bench.comm import MeasuredLink, Misses, fit, telling
    from isomoe.bench.comm_plans import picks
    from isomoe.bench.results import write
    from isomoe.layout import MACHINES
    from isomoe.layout.cost import FILES
    from isomoe.models import read_config
    from isomoe.weights import resolve

    config = read_config(resolve(args.model_path, weights=False))
    if args.readings is not None:
        document, readings = _read(Path(args.readings))
        if document["settings"]["row_values"] != config["hidden_size"]:
            raise ConfigError(
                f"--from {args.readings}: was measured with rows of "
                f"{document['settings']['row_values']} values, and the model's have "
                f"{config['hidden_size']}; --model-path names another"
            )
    else:
        document, readings = _measure(args, config["hidden_size"])
    before = MACHINES[document["settings"]["device"]]
    link = fit(readings)
    ranks = document["settings"]["ranks"]
    after = replace(
        before,
        within=link,
        measured_on=f"{ranks} x {document['device']['name']}, {document['date']}",
    )
    misses = {
        name: Misses.of(machine.within, readings)
        for name, machine in (("before", before), ("after", after))
    }
    most = max(reading.rows for reading in readings)
    buckets = [rows for rows in _PLAN_ROWS if rows <= most] or [most]
    chosen = {
        name: list(picks(config, ranks, machine, MeasuredLink(readings), buckets))
        for name, machine in (("before", before), ("after", after))
    }
    document["fit"] = asdict(link)
    document["misses"] = {name: asdict(miss) for name, miss in misses.items()}
    document["picks"] = {name: _summary(found) for name, found in chosen.items()}
    if args.json == "-":
        print(json.dumps(document, allow_nan=False))
    else:
        _print(before.within, link, {form: telling(readings, form) for form in (True, False)})
        for name, miss in misses.items():
            print(
                f"predictions {name}: off by {miss.median:.2f}x in the median, "
                f"{miss.worst:.1f}x at worst"
            )
        for name, found in chosen.items():
            print(f"plans {name}: {_line(found)}")
    if args.json not in (None, "-"):
        print(f"written to {write(document, Path(args.json))}")
    if args.save:
        file = FILES / f"{before.name}.json"
        try:
            after.save(file)
        except OSError as error:
            raise ConfigError(f"--save: {file} cannot be written ({error})") from None
        print(f"kept in {file}", file=sys.stderr)
    return 0


def _measure(args: argparse.Namespace, row_values: int) -> tuple[dict[str, Any], list["Reading"]]:
    import torch

    from isomoe.bench.device import device_name
    from isomoe.bench.results import conditions
    from isomoe.comm.measure import CommSettings, measure

    gpus = torch.cuda.device_count()
    if args.device == "cuda" and not gpus:
        raise ConfigError("--device cuda: there is no GPU here; cpu would work")
    device = ("cuda" if gpus else "cpu") if args.device == "auto" else args.device
    ranks = args.ranks if args.ranks is not None else max(2, gpus if device == "cuda" else 2)
    if not 2 <= ranks <= MAX_RANKS:
        raise ConfigError(f"--ranks {ranks}: must be 2 to {MAX_RANKS}")
    if min(args.rows) < 1 or max(args.rows) < ranks:
        raise ConfigError(
            f"--rows {' '.join(map(str, args.rows))}: must be at least 1, and one of them {ranks} "
            "(--ranks), so that each rank has a row"
        )
    settings = CommSettings(
        ranks=ranks, device=device, row_values=row_values, rows=tuple(sorted(set(args.rows)))
    )
    readings = []
    # All-reduce has one form, the others two; where graphs replay, equal ones count twice.
    kinds = 11 if device == "cuda" and gpus >= ranks else 7
    total = len(divisors(ranks)[1:]) * len(settings.rows) * kinds
    with progress_bar("measuring collectives") as progress:
        for reading in measure(settings):
            readings.append(reading)
            if progress is not None:
                progress(len(readings), max(total, len(readings)))
    document = {
        **conditions("comm", "isomoe " + shlex.join(sys.argv[1:]), args.commit),
        "device": {"name": device_name(torch.device(device))},
        "settings": {"ranks": ranks, "device": device, "row_values": row_values},
        "readings": [reading.to_json() for reading in readings],
    }
    return document, readings


def _read(file: Path) -> tuple[dict[str, Any], list["Reading"]]:
    from isomoe.comm.measure import Reading

    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return document, [Reading.of(found) for found in document["readings"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--from {file}: no document of `isomoe bench comm --json` ({error})"
        ) from None


def _summary(found: list["Pick"]) -> dict[str, Any]:
    worst = max(found, key=lambda pick: pick.loss)
    return {
        "regimes": len(found),
        "fastest": sum(pick.loss < 1e-9 for pick in found),
        "within_5_percent": sum(pick.loss < 0.05 for pick in found),
        "worst_loss": worst.loss,
        "worst": f"{worst.layout}, {worst.regime.name}",
    }


def _line(found: list["Pick"]) -> str:
    summary = _summary(found)
    return (
        f"of {summary['regimes']} regimes, the fastest moves as measured in "
        f"{summary['fastest']}, within 5% of them in {summary['within_5_percent']}; at worst "
        f"{summary['worst_loss']:.0%} slower ({summary['worst']})"
    )


def _print(before: "Link", after: "Link", forms: dict[bool, list["Reading"]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("collective", "steps", "ranks", "rows", "us", "before", "after", "GB/s"):
        table.add_column(title, justify="left" if title in ("collective", "steps") else "right")
    for equal, readings in forms.items():
        for one in readings:
            predicted = (
                link.microseconds(one.op, equal, one.members, one.sent_bytes)
                for link in (before, after)
            )
            table.add_row(
                str(one.op),
                "equal" if equal else "ragged",
                str(one.members),
                f"{one.rows:,}",
                f"{one.us:,.1f}",
                *(f"{us:,.1f}" for us in predicted),
                f"{one.sent_bytes / one.us / 1e3:,.1f}",
            )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(table)
