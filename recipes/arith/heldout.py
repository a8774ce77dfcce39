"""Writes the held-out problems in GSM8K's published format, one JSON object a line.

Run as `python -m recipes.arith.heldout FILE`. The file is the same on every platform.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes.arith.problems import Problem, problems

HELD_OUT_SEED = 2026
HELD_OUT_COUNT = 500


def held_out(count: int = HELD_OUT_COUNT) -> list[Problem]:
    """The problems that the checkpoint's accuracy is measured on."""
    return problems(HELD_OUT_SEED, "test", count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=HELD_OUT_COUNT)
    args = parser.parse_args()
    lines = [json.dumps({"question": p.question, "answer": p.answer}) for p in held_out(args.count)]
    args.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} problems written to {args.file}")


if __name__ == "__main__":
    main()
