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
    from rich.table import Table

    from isomoe.comm.measure import Reading
    from isomoe.layout import Link, Machine
    from isomoe.models import HFConfig

NAME = "comm"
HELP = (
    "Measure every collective that a plan may use, from 1 to 8192 rows, and sums fused with the "
    "norm behind them where GPUs make such; fit the planner's alpha (microseconds a call) and beta "
    "(bytes a microsecond) to it, and tell how far its predictions were off before and after, and "
    "whether it picks the moves that are fastest as measured."
)

_MOST = 8192
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
        metavar="N",
        help="of a group's step, two or more of them multiples of W (default: powers of 2 up to "
        f"{_MOST}, times what is odd in W)",
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
        nargs="?",
        const="",
        metavar="FILE",
        help="keep the fit: every later plan on this kind of device is made with it; with FILE, "
        "write that machine there instead. What is not measured stays as it is: links between "
        "nodes, and up to how many rows a second stream pays",
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
    from isomoe.bench.comm import MeasuredLink, MeasuredSums, Misses, fit, fit_fused
    from isomoe.bench.comm_plans import PickSummary, picks
    from isomoe.bench.results import write
    from isomoe.layout import MACHINES
    from isomoe.layout.cost import FILES
    from isomoe.models import read_config
    from isomoe.weights import resolve

    config = read_config(resolve(args.model_path, weights=False))
    document, readings = _read(args, config) if args.readings else _measure(args, config)
    settings = document["settings"]
    before = MACHINES[settings["device"]]
    if "no_fused_sums" not in document:  # judged by collectives alone
        before = replace(before, fused=None)
        document["no_fused_sums"] = "these readings are from before they were measured"
    why_none = document["no_fused_sums"]
    link, fused = fit(readings), fit_fused(readings) if why_none is None else None
    source = f"{settings['ranks']} x {document['device']['name']}, {document['date']}"
    after = replace(before, within=link, fused=fused, measured_on=source)
    truth = replace(
        before,
        within=MeasuredLink(readings),
        fused=MeasuredSums.of(fused, readings) if fused else None,
    )
    machines = {"before": before, "after": after}
    misses = {name: Misses.of(machine.within, readings) for name, machine in machines.items()}
    for name, machine in machines.items():
        if fused and machine.fused:
            misses[f"of fused sums {name}"] = Misses.of(machine.fused, readings, fused=True)
    most = max(reading.rows for reading in readings)
    buckets = [rows for rows in _PLAN_ROWS if rows <= most] or [most]
    chosen = {
        name: PickSummary.of(picks(config, settings["ranks"], machine, truth, buckets))
        for name, machine in machines.items()
    }
    document["fit"] = {"within": asdict(link), "fused": fused and asdict(fused)}
    document["misses"] = {name: asdict(miss) for name, miss in misses.items()}
    document["picks"] = {name: found and asdict(found) for name, found in chosen.items()}
    if args.json == "-":
        print(json.dumps(document, allow_nan=False))
    else:
        _print(before, after, readings)
        for name, miss in misses.items():
            print(f"predictions {name}: {miss}")
        if why_none is not None:
            print(f"no fused sums: {why_none}")
        for name, found in chosen.items():
            print(f"plans {name}: {found or 'no layout of the model has so many ranks'}")
    if args.json not in (None, "-"):
        print(f"written to {write(document, Path(args.json))}")
    if args.save is not None:
        file = Path(args.save) if args.save else FILES / f"{before.name}.json"
        after.save(file)
        print(f"kept in {file}", file=sys.stderr)
    return 0


def _measure(
    args: argparse.Namespace, config: "HFConfig"
) -> tuple[dict[str, Any], list["Reading"]]:
    import torch

    from isomoe.bench.comm import make_norm
    from isomoe.bench.device import device_name
    from isomoe.bench.results import conditions
    from isomoe.comm.measure import CommSettings, measure, unfused

    gpus = torch.cuda.device_count()
    if args.device == "cuda" and not gpus:
        raise ConfigError("--device cuda: there is no GPU here; cpu would work")
    device = ("cuda" if gpus else "cpu") if args.device == "auto" else args.device
    ranks = args.ranks if args.ranks is not None else max(2, gpus if device == "cuda" else 2)
    if not 2 <= ranks <= MAX_RANKS:
        raise ConfigError(f"--ranks {ranks}: must be 2 to {MAX_RANKS}")
    if args.save is not None and device == "cuda" and gpus < ranks:
        raise ConfigError(
            f"--save: {ranks} ranks on {gpus} GPU(s) talk through the host, which says nothing of "
            f"the links between GPUs; --ranks {gpus} or --device cpu"
        )
    rows = tuple(sorted(set(args.rows or _default_rows(ranks))))
    if rows[0] < 1 or sum(n % ranks == 0 for n in rows) < 2:
        raise ConfigError(
            f"--rows {' '.join(map(str, rows))}: must be at least 1, and two of them multiples of "
            f"{ranks} (--ranks), such as {ranks} and {64 * ranks}"
        )
    row_values = config["hidden_size"]
    settings = CommSettings(ranks=ranks, device=device, row_values=row_values, rows=rows)
    readings: list[Reading] = []
    # All-reduce has one form, the others two; where graphs replay, equal ones count twice, and
    # the two sums may be fused.
    kinds = 11 + 5 if device == "cuda" and gpus >= ranks else 7
    total = len(divisors(ranks)[1:]) * len(rows) * kinds
    with progress_bar("measuring collectives") as progress:
        for reading in measure(settings, make_norm):
            readings.append(reading)
            if progress is not None:
                progress(len(readings), max(total, len(readings)))
    document = {
        **conditions("comm", "isomoe " + shlex.join(sys.argv[1:]), args.commit),
        "device": {"name": device_name(torch.device(device))},
        "settings": {"ranks": ranks, "device": device, "row_values": row_values},
        "readings": [reading.to_json() for reading in readings],
        "no_fused_sums": unfused(settings, readings),
    }
    return document, readings


def _default_rows(ranks: int) -> list[int]:
    """One, and the powers of 2 up to the most, times what is odd in `ranks`: groups of every size
    can have as many rows each."""
    odd = ranks // (ranks & -ranks)
    return [1, *(odd * 2**power for power in range(14) if odd * 2**power <= max(_MOST, 2 * ranks))]


def _read(args: argparse.Namespace, config: "HFConfig") -> tuple[dict[str, Any], list["Reading"]]:
    """The document of an earlier measurement.

    Raises:
        ConfigError: if it is none, of other rows than the model's, or not to be kept.
    """
    from isomoe.comm.measure import OPS, CommSettings, Reading, unfused
    from isomoe.layout import MACHINES

    try:
        document = json.loads(Path(args.readings).read_text(encoding="utf-8"))
        readings = [Reading.of(found) for found in document["readings"]]
        settings = document["settings"]
        known = settings["device"] in MACHINES and document["device"]["name"] and document["date"]
        if not known or {reading.op for reading in readings if not reading.fused} != set(OPS):
            raise ValueError("readings of a collective are missing")
        row_values = int(settings["row_values"])
        measured = CommSettings(
            ranks=int(settings["ranks"]),
            device=settings["device"],
            row_values=row_values,
            rows=tuple({reading.rows for reading in readings}),
        )
        if document.get("no_fused_sums", "") is None and unfused(measured, readings):
            raise ValueError("readings of fused sums are missing")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--from {args.readings}: no document of `isomoe bench comm --json` ({error})"
        ) from None
    if row_values != config["hidden_size"]:
        raise ConfigError(
            f"--from {args.readings}: was measured with rows of {row_values} values, and the "
            f"model's have {config['hidden_size']}; --model-path names another"
        )
    if args.save is None or settings["device"] != "cuda":
        return document, readings
    if not any(one.replayed for one in readings):
        raise ConfigError(
            f"--save: the ranks of {args.readings} shared GPUs and talked through the host, which "
            "says nothing of the links between GPUs"
        )
    if "no_fused_sums" not in document:
        raise ConfigError(
            f"--save: {args.readings} is from before fused sums were measured, and a machine "
            "without them would be kept; measure anew"
        )
    return document, readings


def _print(before: "Machine", after: "Machine", readings: list["Reading"]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(_table(before.within, after.within, readings, fused=False))
    if after.fused is not None:
        console.print(_table(before.fused, after.fused, readings, fused=True))
        print("A fused sum holds addition and norm; apart: the collective, and these behind it.\n")


def _table(before: "Link | None", after: "Link", readings: list["Reading"], fused: bool) -> "Table":
    from rich import box
    from rich.table import Table

    from isomoe.bench.comm import predicted_us, telling

    what = "fused sum" if fused else "collective"
    table = Table(box=box.SIMPLE_HEAD)
    for title in (what, "steps", "ranks", "rows", "us", "before", "after"):
        table.add_column(title, justify="left" if title in (what, "steps") else "right")
    table.add_column("apart" if fused else "GB/s", justify="right")
    apart = {_kind(one): one.us for one in readings if not one.fused}
    for equal in (True, False):
        for one in telling(readings, equal, fused):
            beside = apart[_kind(one)] + one.norm_us if fused else one.sent_bytes / one.us / 1e3
            table.add_row(
                str(one.op),
                "equal" if equal else "ragged",
                str(one.members),
                f"{one.rows:,}",
                f"{one.us:,.1f}",
                *(
                    f"{predicted_us(link, equal, one):,.1f}" if link else "-"
                    for link in (before, after)
                ),
                f"{beside:,.1f}",
            )
    return table


def _kind(one: "Reading") -> tuple[object, ...]:
    return one.op, one.members, one.equal, one.replayed, one.rows
