"""Decode and prefill of every layout of W ranks, as ratios to plain tp.

Other flags are handed to `isomoe bench offline`, such as `--workloads W1 W2 W3`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src/isomoe/models/configs/qwen3-30b-a3b.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ranks", type=int, nargs="?", help="W (default: one for each GPU)")
    args, more = parser.parse_known_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    plain = None
    with TemporaryDirectory() as folder:
        for layout in _layouts(args.ranks or _gpus()):
            figures = _figures(layout, more, Path(folder) / "offline.json")
            plain = plain or figures
            name = ",".join(f"{axis}{degree}" for axis, degree in layout.items())
            print(_line(name, figures, plain), flush=True)


def _gpus() -> int:
    import torch

    return max(2, torch.cuda.device_count())


def _layouts(ranks: int) -> list[dict[str, int]]:
    plain = {"tp": ranks}
    forms = [
        plain,
        plain | {"dp": ranks},
        plain | {"ep": ranks},
        plain | {"dp": ranks, "ep": ranks},
    ]
    return forms + ([plain | {"dp": ranks // 2, "ep": ranks}] if ranks >= 4 else [])


def _figures(layout: dict[str, int], more: list[str], file: Path) -> dict[str, tuple[str, float]]:
    """By workload: the figure's unit and its median."""
    flags = {"tp": "--tp", "dp": "--attn-dp-size", "ep": "--ep"}
    command = [sys.executable, "-m", "isomoe.cli.main", "bench", "offline"]
    command += ["--load-format", "dummy", "--model-path", str(MODEL), "--json", str(file)]
    for axis, degree in layout.items():
        command += [flags[axis], str(degree)]
    subprocess.run(command + more, check=True, stdout=subprocess.DEVNULL)
    found: list[dict[str, Any]] = json.loads(file.read_text())["workloads"]
    return {
        one["name"]: (
            one["figure"],
            1 / one["value"] if one["lower_is_better"] else one["value"],
        )
        for one in found
    }


def _line(
    name: str, figures: dict[str, tuple[str, float]], plain: dict[str, tuple[str, float]]
) -> str:
    parts = []
    for workload, (unit, speed) in figures.items():
        value = 1 / speed if unit.startswith("ms") else speed
        parts.append(f"{workload} {value:,.4g} {unit} ({speed / plain[workload][1]:.2f}x)")
    return f"{name:16} {'; '.join(parts)}"


if __name__ == "__main__":
    main()
