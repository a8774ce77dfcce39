import json
from dataclasses import replace

import jsonschema
import pytest
from report_samples import judged, run_of, sample

from isomoe.parity.noise import Noise
from isomoe.parity.report import Report, document
from isomoe.parity.verdict import Verdict

NUMBER = {"type": ["number", "null"]}
SUMMARY = {
    "type": ["object", "null"],
    "required": ["tokens", "mean", "median", "p99", "max", "bias"],
    "properties": {"tokens": {"type": "integer"}, "mean": NUMBER, "max": NUMBER},
    "additionalProperties": NUMBER,
}
RUN = {
    "type": "object",
    "required": ["name", "dialect", "facts", "seconds", "notes", "error"],
    "properties": {"facts": {"type": "object"}, "notes": {"type": "array"}},
}
PROMPT = {
    "type": "object",
    "required": ["tokens", "common_prefix", "identical", "first_difference", "free", "forced"],
    "properties": {
        "free": {"type": "array", "items": NUMBER},
        "forced": {
            "type": ["object", "null"],
            "required": ["deltas", "ranks", "kl"],
            "additionalProperties": {"type": "array", "items": NUMBER},
        },
        "first_difference": {
            "type": ["object", "null"],
            "required": [
                "place",
                "baseline",
                "other",
                "baseline_of_other",
                "other_of_baseline",
            ],
        },
    },
}
TARGET = {
    **RUN,
    "required": [
        *RUN["required"],
        *("verdict", "reasons", "effect", "bias", "chance", "same_prompts", "common_tokens"),
        *("free", "forced", "kl", "top1", "prompts"),
    ],
    "properties": {
        "verdict": {"enum": [str(verdict) for verdict in Verdict]},
        "reasons": {"type": "array", "items": {"type": "string"}},
        "effect": NUMBER,
        "chance": NUMBER,
        "free": SUMMARY,
        "forced": SUMMARY,
        "prompts": {"type": "array", "items": PROMPT},
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        *("format", "exit_code", "headline", "thresholds", "conditions", "prompts"),
        *("baseline", "noise_floor", "targets", "bisections"),
    ],
    "properties": {
        "format": {"const": "isomoe-parity-report/1"},
        "exit_code": {"enum": [0, 1, 2]},
        "headline": {"type": "string"},
        "thresholds": {"type": "object"},
        "conditions": {"type": "object"},
        "prompts": {"type": "object", "required": ["source", "count", "kinds"]},
        "baseline": {**RUN, "required": [*RUN["required"], "tokens", "mean_logprob", "token_ids"]},
        "noise_floor": {
            "type": "object",
            "required": ["all", "sources"],
            "properties": {
                "all": SUMMARY,
                "sources": {"type": "object", "additionalProperties": SUMMARY},
            },
        },
        "targets": {"type": "array", "items": TARGET},
        "bisections": {"type": "array", "items": {"type": "object", "required": ["curve"]}},
    },
}


def test_the_document_has_its_schema() -> None:
    text = json.dumps(document(sample()), allow_nan=False)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_every_token_is_in_the_document() -> None:
    report = sample()
    found = document(report)
    for target in found["targets"][:3]:
        for prompt, output in zip(target["prompts"], report.baseline.outputs, strict=True):
            assert len(prompt["forced"]["deltas"]) == len(output)
    assert found["targets"][2]["prompts"][2]["first_difference"]["place"] == 5
    assert [len(ids) for ids in found["baseline"]["token_ids"]] == [
        len(output) for output in report.baseline.outputs
    ]


def test_what_is_not_finite_is_null() -> None:
    base = run_of("base", 1, 4, 2)
    place = base.outputs[0][0]
    bad = place._replace(token=place.token._replace(logprob=float("nan")))
    text = (bad, *base.outputs[0][1:])
    other = replace(base, name="other", outputs=(text,), scores=(text,))
    row = judged(base, other, Verdict.NOT_COMPARED, effect=float("inf"))
    found = document(Report(baseline=base, source="sample", rows=(row,), noise=Noise.of(base)))
    json.dumps(found, allow_nan=False)
    target = found["targets"][0]
    assert target["effect"] is None
    assert target["forced"]["mean"] is None
    assert target["prompts"][0]["forced"]["deltas"][0] is None


def test_a_target_that_was_not_compared_has_its_error_and_no_prompt() -> None:
    target = document(sample())["targets"][3]
    assert target["error"] == "gone: no answer within 60 s"
    assert target["prompts"] == []


def test_numbers_have_six_digits() -> None:
    report = sample()
    comparison = report.rows[1].comparison
    found = document(report)["targets"][1]
    assert comparison.forced is not None
    assert found["forced"]["mean"] == pytest.approx(comparison.forced.mean, rel=1e-5)
    assert found["forced"]["mean"] != comparison.forced.mean
    assert document(report)["noise_floor"]["counted"] == ["alone"]
