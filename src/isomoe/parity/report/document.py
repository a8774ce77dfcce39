"""The JSON document of a comparison: everything but the candidates, which the saved runs have."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from isomoe.parity.compare import FirstDifference, PromptComparison, Summary
from isomoe.parity.report.model import Report
from isomoe.parity.run import Candidate, Run
from isomoe.parity.verdict import Row

FORMAT = "isomoe-parity-report/1"
"""Names the document's format."""

_DIGITS = 6


def document(report: Report) -> dict[str, Any]:
    """The report as JSON, per prompt and per token. What is not finite is null."""
    floor = report.floor_summary
    found = {
        "format": FORMAT,
        "exit_code": report.exit_code,
        "headline": report.headline,
        "thresholds": asdict(report.thresholds),
        "conditions": report.conditions,
        "prompts": {
            "source": report.source,
            "count": len(report.baseline.outputs),
            "kinds": [prompt.kind for prompt in report.baseline.prompts],
        },
        "baseline": {
            **_run(report.baseline),
            "tokens": report.baseline.num_tokens,
            "mean_logprob": report.baseline.mean_logprob,
            "token_ids": [
                [place.token.token_id for place in output] for output in report.baseline.outputs
            ],
        },
        "noise_floor": {
            "all": floor and _summary(floor),
            "sources": {source.name: _summary(source.summary) for source in report.floor},
            "counted": [source.name for source in report.floor if source.is_counted],
            "unit": report.noise.unit,
            "notes": report.noise.notes,
        },
        "targets": [_row(row) for row in report.rows],
        "bisections": [bisection.to_json() for bisection in report.bisections],
    }
    whole: dict[str, Any] = _finite(found)
    return whole


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "dialect": run.dialect,
        "facts": run.facts,
        "seconds": round(run.seconds, 2),
        "notes": run.notes,
        "error": run.error,
    }


def _row(row: Row) -> dict[str, Any]:
    comparison, judgement = row.comparison, row.judgement
    return {
        **_run(comparison.other),
        "notes": [*judgement.notes, *comparison.other.notes],
        "verdict": str(judgement.verdict),
        "reasons": judgement.reasons,
        "effect": judgement.effect,
        "bias": judgement.bias,
        "chance": judgement.chance,
        "tests": [asdict(test) for test in judgement.tests],
        "same_prompts": comparison.same_prompts,
        "common_tokens": comparison.common_tokens,
        "free": _summary(comparison.free),
        "forced": comparison.forced and _summary(comparison.forced),
        "kl": comparison.kl,
        "top1": comparison.top1,
        "prompts": [_prompt(prompt) for prompt in comparison.prompts],
    }


def _prompt(prompt: PromptComparison) -> dict[str, Any]:
    forced = prompt.forced
    return {
        "tokens": prompt.num_tokens,
        "common_prefix": prompt.common_prefix,
        "identical": prompt.is_identical,
        "first_difference": prompt.first_difference and _difference(prompt.first_difference),
        "free": list(prompt.free),
        "forced": forced
        and {
            "deltas": [token.delta for token in forced],
            "ranks": [token.rank for token in forced],
            "kl": [token.kl for token in forced],
        },
    }


def _difference(found: FirstDifference) -> dict[str, Any]:
    return {
        "place": found.place,
        "baseline": found.baseline and _candidate(found.baseline),
        "other": found.other and _candidate(found.other),
        "baseline_of_other": found.baseline_of_other,
        "other_of_baseline": found.other_of_baseline,
    }


def _candidate(token: Candidate) -> dict[str, Any]:
    return {"token_id": token.token_id, "text": token.text, "logprob": token.logprob}


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "tokens": summary.tokens,
        "mean": summary.mean,
        "median": summary.median,
        "p99": summary.p99,
        "max": summary.most,
        "bias": summary.bias,
    }


def _finite(value: Any) -> Any:
    """As JSON's own types; numbers to six digits, and null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)
