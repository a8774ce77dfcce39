"""The table and the JSON document of a comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isomoe.parity.compare import (
    Candidate,
    Comparison,
    Deltas,
    PromptComparison,
    Recording,
    Tolerance,
    Verdict,
)

_COLOURS = {Verdict.IDENTICAL: "green", Verdict.AGREES: "green", Verdict.DIFFERS: "red"}
_WIDTH = 160
"""Columns of the table where stdout is no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was compared, under which conditions, and what came of it.

    Attributes:
        model: as the user knows it.
        source: where the prompts come from.
        conditions: versions, dtype, device and whatever else the numbers depend on.
    """

    model: str
    source: str
    tolerance: Tolerance
    conditions: dict[str, object]
    baseline: Recording
    rows: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether no row differs; not where there is no row."""
        return bool(self.rows) and all(row.verdict is not Verdict.DIFFERS for row in self.rows)

    def to_json(self) -> dict[str, object]:
        """Everything, per prompt too. What is not finite is null."""
        return {
            "agrees": self.agrees,
            "model": self.model,
            "conditions": self.conditions,
            "prompts": {"source": self.source, "count": len(self.baseline.outputs)},
            "tokens": self.baseline.num_tokens,
            "tolerance": {"mean": self.tolerance.mean, "max": self.tolerance.most},
            "baseline": {
                "layout": self.baseline.name,
                "mean_logprob": _number(self.baseline.mean_logprob),
                "seconds": round(self.baseline.seconds, 2),
            },
            "rows": [_row(row) for row in self.rows],
        }

    def print(self) -> None:
        """The table, on stdout."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)
        what = ", ".join(str(self.conditions[key]) for key in ("dtype", "device"))
        console.print(
            f"{escape(self.model)} ({what}): {len(self.baseline.outputs)} prompts "
            f"({escape(self.source)}), {self.baseline.num_tokens} tokens decoded greedily by the "
            f"baseline {self.baseline.name} (mean logprob {self.baseline.mean_logprob:.3g}, "
            f"{self.baseline.seconds:.1f} s)",
            soft_wrap=True,
        )
        console.print(_table(self.rows))
        for row in self.rows:
            if row.reasons or row.notes:
                remarks = "; ".join((*row.reasons, *row.notes))
                console.print(f"{escape(row.name)}: {escape(remarks)}", soft_wrap=True)
        console.print(
            "|Δ logprob| in nats. Common prefix: decode against decode. Teacher-forced: the "
            "baseline's tokens, prefill against prefill. "
            f"Limits: mean {self.tolerance.mean:g}, max {self.tolerance.most:g}.",
            soft_wrap=True,
        )


def _table(rows: Sequence[Comparison]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layout", no_wrap=True)
    table.add_column("common prefix")
    for title in ("mean / max |Δ| on it", "teacher-forced mean / max |Δ|"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    table.add_column("seconds", justify="right")
    for row in rows:
        table.add_row(
            escape(row.name),
            f"{row.same_prompts}/{row.num_prompts} prompts, "
            f"{row.common_tokens}/{row.num_tokens} tokens",
            _pair(row.free),
            _pair(row.forced),
            f"[{_COLOURS[row.verdict]}]{row.verdict}[/]",
            f"{row.seconds:.1f}",
        )
    return table


def _pair(deltas: Deltas) -> str:
    if not deltas.tokens:
        return "no token"
    return f"{deltas.mean:.3g} / {deltas.most:.3g}"


def _row(row: Comparison) -> dict[str, object]:
    return {
        "layout": row.name,
        "verdict": str(row.verdict),
        "reasons": list(row.reasons),
        "notes": list(row.notes),
        "same_prompts": row.same_prompts,
        "common_prefix": row.common_tokens,
        "n_tokens": row.num_tokens,
        "decoded": _deltas(row.free),
        "teacher_forced": _deltas(row.forced),
        "seconds": round(row.seconds, 2),
        "prompts": [_prompt(prompt) for prompt in row.prompts],
    }


def _prompt(prompt: PromptComparison) -> dict[str, object]:
    parting = prompt.first_difference
    return {
        "common_prefix": prompt.common_prefix,
        "n_tokens": prompt.num_tokens,
        "identical": prompt.is_identical,
        "decoded": _deltas(prompt.free),
        "teacher_forced": _deltas(prompt.forced),
        "first_difference": parting
        and {
            "place": parting.place,
            "baseline": _candidate(parting.baseline),
            "other": _candidate(parting.other),
        },
    }


def _candidate(candidate: Candidate) -> dict[str, object]:
    return {
        "token_id": candidate.token_id,
        "baseline_logprob": _number(candidate.baseline),
        "other_logprob": _number(candidate.other),
    }


def _deltas(deltas: Deltas) -> dict[str, object]:
    return {
        "tokens": deltas.tokens,
        "mean": _number(deltas.mean),
        "max": _number(deltas.most),
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
