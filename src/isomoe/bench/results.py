"""The JSON documents of measurements, and what they need to be read years later."""

import json
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from isomoe import __version__
from isomoe.errors import ConfigError
from isomoe.files import write_atomically

_ROOT = Path(__file__).parents[3]
BENCHMARKS = _ROOT / "benchmarks"
"""Of a checkout; an installed package has none."""
RESULTS = BENCHMARKS / "results"

Json = dict[str, Any]


def conditions(what: str, command: str, commit: str | None = None) -> Json:
    """What a number depends on besides the device: versions, date, command.

    Args:
        what: which measurement this is.
        command: as it was typed.
        commit: of isomoe; asked of git where it is None.
    """
    return {
        "what": what,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "isomoe": __version__,
            "commit": commit or _commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
        },
    }


def write(document: Mapping[str, Any], target: Path) -> Path:
    """Writes a document; a folder gets a file <date>-<card>-<what>.json.

    Raises:
        ConfigError: if that cannot be.
    """
    if target.is_dir() or not target.suffix:
        card = slug(document["device"]["name"])
        target = target / f"{document['date']}-{card}-{document['what']}.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json {target}: not writable ({error})") from None
    write_atomically(target, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return target


def slug(text: str) -> str:
    """A name as a part of a file's name: NVIDIA H100 80GB HBM3 is nvidia-h100-80gb-hbm3."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)


def read_peers(config: Mapping[str, Any]) -> Json | None:
    """What other engines reach on the standard workloads; None if not known for this model."""
    file = BENCHMARKS / "peers.json"
    if not file.is_file():
        return None
    peers: Json = json.loads(file.read_text(encoding="utf-8"))
    same = all(config.get(key) == value for key, value in peers["model"].items())
    return peers if same else None


def _commit() -> str | None:
    """Of the checkout, with a + if files of it were changed; None without git."""
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if status else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
