"""Outputs that are held to a grammar satisfy it, and a grammar that cannot be used is refused."""

import builtins
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isomoe.engine import LLM, FinishReason, SamplingParams
from isomoe.engine.grammar import GrammarFactory
from isomoe.errors import RequestError
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint

llguidance = pytest.importorskip("llguidance")

END = (0, 2)
PROMPTS = ["Tell me of a fruit.", "What is 17 + 25?"]

# Each has a longest instance that fits into MAX_TOKENS, so that every output ends by itself.
MAX_TOKENS = 800
SCHEMAS: list[Any] = [
    {"enum": ["apple", "pear", 3, None, {"deep": [True]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}[0-9]?$"},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 6},
            "count": {"type": "integer", "minimum": -20, "maximum": 1000},
            "kind": {"$ref": "#/$defs/kind"},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/kind"}, "maxItems": 2},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
        "$defs": {"kind": {"anyOf": [{"const": "whole"}, {"type": "null"}]}},
    },
]
PATTERNS = ["", "[a-z]{3,8}", "(yes|no|maybe)\\.", "\\d{1,3}(,\\d{3}){0,2}", "a?b{2}é\\n/ü🙂"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32") as llm:  # a batch may change ties of bfloat16
        yield llm


@pytest.fixture(scope="module")
def grammars() -> GrammarFactory:
    return GrammarFactory(bundled_checkpoint(), 640, END)


def drawn(**grammar: str) -> list[SamplingParams]:
    """Greedy, and a few draws."""
    draws = [SamplingParams(max_tokens=MAX_TOKENS, seed=seed, **grammar) for seed in range(5)]  # type: ignore[arg-type]
    return [SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, **grammar), *draws]  # type: ignore[arg-type]


def test_json_validates_against_its_schema(llm: LLM) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    cases = [
        (schema, prompt, params)
        for schema in SCHEMAS
        for prompt in PROMPTS
        for params in drawn(json_schema=json.dumps(schema))
    ]
    outputs = llm.generate([prompt for _, prompt, _ in cases], [params for *_, params in cases])
    for (schema, _, _), output in zip(cases, outputs, strict=True):
        assert output.finish_reason == FinishReason.STOP
        jsonschema.validate(json.loads(output.text), schema)
    assert len({output.text for output in outputs}) > len(SCHEMAS)


def test_any_object_parses_if_it_ends(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=200, seed=seed, json_schema='{"type": "object"}')
        for seed in range(8)
    ]
    ended = [
        output
        for output in llm.generate([PROMPTS[0]] * len(params), params)
        if output.finish_reason == FinishReason.STOP
    ]
    assert ended
    assert all(isinstance(json.loads(output.text), dict) for output in ended)


def test_an_output_matches_its_regular_expression_as_a_whole(llm: LLM) -> None:
    cases = [(regex, params) for regex in PATTERNS for params in drawn(regex=regex)]
    outputs = llm.generate([PROMPTS[0]] * len(cases), [params for _, params in cases])
    for (regex, _), output in zip(cases, outputs, strict=True):
        assert output.finish_reason == FinishReason.STOP
        assert re.fullmatch(regex, output.text), (regex, output.text)


def test_requests_with_and_without_grammars_share_a_batch(llm: LLM) -> None:
    plain = SamplingParams(temperature=0.0, max_tokens=20)
    held = SamplingParams(temperature=0.0, max_tokens=20, regex="[xyz]{4}")
    alone = [llm.generate(PROMPTS[1], params)[0].token_ids for params in (plain, held)]
    mixed = llm.generate([PROMPTS[1]] * 4, [plain, held, held, plain])
    assert [output.token_ids for output in mixed] == [alone[0], alone[1], alone[1], alone[0]]


def test_ranks_that_share_a_request_follow_its_grammar() -> None:
    regexes = ["[xyz]{4}", "(yes|no){1,3}", "[0-9]{2,5}"]
    params = [SamplingParams(max_tokens=40, seed=3, regex=regex) for regex in regexes]
    with LLM(device="cpu", tp_size=2) as split:
        outputs = split.generate([PROMPTS[0]] * len(params), params)
    for regex, output in zip(regexes, outputs, strict=True):
        assert re.fullmatch(regex, output.text), (regex, output.text)


def test_a_complete_grammar_ends_the_output_before_min_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=5, regex="ab?")
    output = llm.generate(PROMPTS[0], params)[0]
    assert output.text == "ab"  # the end was not allowed after "a", where more could follow


def test_a_biased_token_is_still_banned_by_the_grammar(llm: LLM) -> None:
    token = llm.tokenizer.encode("q")[0]
    params = SamplingParams(max_tokens=9, regex="[0-9]{3}", logit_bias=((token, 100.0),))
    assert re.fullmatch("[0-9]{3}", llm.generate(PROMPTS[0], params)[0].text)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ({"regex": "("}, r"regex cannot be used: unclosed group"),
        ({"regex": "a(?=b)"}, r"regex cannot be used: look-around"),
        ({"regex": "[^\\s\\S]"}, r"regex cannot be used: "),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, r"regex cannot be used: "),
        ({"json_schema": "false"}, r"json_schema cannot be used: Unsatisfiable schema"),
        ({"json_schema": '{"type": "nothing"}'}, r"json_schema cannot be used: Invalid type"),
        ({"json_schema": '{"$ref": "#"}'}, r"json_schema cannot be used: "),
        ({"json_schema": '{"$ref": "#/no/where"}'}, r"json_schema cannot be used: .*/no/where"),
        ({"json_schema": '{"$ref": "http://a.example/b"}'}, r"json_schema cannot be used: "),
        ({"json_schema": '{"minLength": -1}'}, r"json_schema cannot be used: "),
        ({"json_schema": '{"const": "\\ud800"}'}, r"json_schema cannot be used: "),
        (
            {"json_schema": '{"x-guidance": {"whitespace_pattern": "("}}'},
            r"json_schema cannot be used: ",
        ),
        ({"json_schema": '{"patternProperties": 5, "allOf": 5}'}, r"json_schema cannot be used: "),
        (
            {"json_schema": '{"items":' * 400 + "{}" + "}" * 400},
            r"json_schema cannot be used: recursion limit exceeded",
        ),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(
    grammars: GrammarFactory, grammar: dict[str, str], reason: str
) -> None:
    with pytest.raises(RequestError, match=f"^{reason}") as caught:
        grammars.check(SamplingParams(**grammar))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


OPTIONAL_DATE = {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "title": "x"}
NTH = [f"(a|b)*a(a|b){{{i}}}" for i in range(30)]  # their states double with each


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": pattern} for pattern in NTH]},
        {"allOf": [{"properties": {"a": {"pattern": pattern}}} for pattern in NTH]},
        {
            "$defs": {"n0": {"pattern": "a"}}
            | {f"n{i}": {"$ref": f"#/$defs/n{i - 1}", "pattern": NTH[i]} for i in range(1, 30)},
            "$ref": "#/$defs/n29",
        },
    ],
)
def test_patterns_that_would_take_minutes_to_join_are_refused_at_once(
    grammars: GrammarFactory, schema: Any
) -> None:
    with pytest.raises(RequestError, match=r"has (30|29) patterns and formats, the most is 8"):
        grammars.check(SamplingParams(json_schema=json.dumps(schema)))


def test_many_patterns_are_fine_as_long_as_they_are_not_joined(grammars: GrammarFactory) -> None:
    schema = {
        "$defs": {"date": OPTIONAL_DATE},
        "properties": {f"p{i}": OPTIONAL_DATE for i in range(15)}
        | {f"r{i}": {"allOf": [{"$ref": "#/$defs/date"}], "default": None} for i in range(3)},
    }
    grammars.check(SamplingParams(json_schema=json.dumps(schema)))


def test_a_grammar_that_takes_long_to_compile_is_refused(
    grammars: GrammarFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 7.0])
    monkeypatch.setattr("time.thread_time", lambda: next(clock))
    with pytest.raises(RequestError, match=r"^json_schema or regex took 7\.0 s to compile"):
        grammars.check(SamplingParams(regex="a"))


def test_params_without_a_grammar_need_no_tokenizer(tmp_path: Path) -> None:
    GrammarFactory(tmp_path, 640, END).check(SamplingParams())


HUGE: list[dict[str, str]] = [
    {"json_schema": json.dumps({"enum": [f"v{i}" for i in range(9000)]})},
    {
        "json_schema": json.dumps(
            {
                "properties": {f"p{i}": {"type": "integer"} for i in range(3000)},
                "required": [f"p{i}" for i in range(3000)],
            }
        )
    },
    {"json_schema": json.dumps({"properties": {f"p{i}": {} for i in range(2000)}})},
    {"json_schema": '{"type": "array", "minItems": 1000000000}'},
    {"json_schema": '{"type": "string", "minLength": 1000000000}'},
    {"json_schema": '{"items":' * 50 + "{}" + "}" * 50},
    {"regex": "a{1000000}"},
    {"regex": "((a{1,100}){1,100}){1,100}"},
    {"regex": "(?i)(\\w+\\s*){500}"},
]


@pytest.mark.parametrize("grammar", HUGE, ids=lambda grammar: next(iter(grammar.values()))[:30])
def test_a_huge_grammar_is_refused_or_leaves_something_to_draw(
    grammars: GrammarFactory, grammar: dict[str, str]
) -> None:
    params = SamplingParams(**grammar)  # type: ignore[arg-type]
    try:
        grammars.check(params)
    except RequestError:
        return
    matcher = grammars.matcher(params)
    for _ in range(30):
        allowed = tokens(matcher.allowed())
        assert allowed
        matcher.advance([allowed[len(allowed) // 2]])


def test_an_output_that_leaves_its_grammar_can_only_end(
    grammars: GrammarFactory, caplog: pytest.LogCaptureFixture
) -> None:
    matcher = grammars.matcher(SamplingParams(regex="[a-z]+"))
    matcher.advance(Tokenizer(bundled_checkpoint()).encode("7"))
    with caplog.at_level(logging.ERROR):
        assert tokens(matcher.allowed()) == list(END)
        assert tokens(matcher.allowed()) == list(END)
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].message


def test_a_matcher_of_a_bad_grammar_lets_the_output_end(
    grammars: GrammarFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert tokens(grammars.matcher(SamplingParams(regex="(")).allowed()) == list(END)
    assert len(caplog.records) == 1


def test_nothing_follows_an_end_token(grammars: GrammarFactory) -> None:
    matcher = grammars.matcher(SamplingParams(regex="a*"))
    assert set(END) < set(tokens(matcher.allowed()))
    matcher.advance([2, 0, 2])
    assert tokens(matcher.allowed()) == list(END)


def test_tokens_beyond_the_tokenizer_are_never_allowed() -> None:
    wide = GrammarFactory(bundled_checkpoint(), 700, END)
    allowed = tokens(wide.matcher(SamplingParams(regex="(?s).*")).allowed())
    assert len(allowed) > 100
    assert max(allowed) < 640
    assert wide.matcher(SamplingParams(regex="a")).allowed().shape == (22,)


def test_logits_too_narrow_for_the_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match=r"do not work with .*: vocab size too small"):
        GrammarFactory(bundled_checkpoint(), 600, END).check(SamplingParams(regex="a"))


def test_a_model_without_an_end_token_has_no_grammars() -> None:
    with pytest.raises(RequestError, match=r"do not work with .*must not be empty"):
        GrammarFactory(bundled_checkpoint(), 640, ()).check(SamplingParams(regex="a"))


def test_without_llguidance_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **rest: Any) -> Any:
        if name.split(".")[0] == "llguidance":
            raise ImportError(name)
        return original(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", without)
    grammars = GrammarFactory(bundled_checkpoint(), 640, END)
    with pytest.raises(RequestError, match=r"need the package llguidance: pip install 'isomoe\["):
        grammars.check(SamplingParams(regex="a"))
    grammars.check(SamplingParams())


def test_min_tokens_bias_and_penalties_reach_the_output(llm: LLM) -> None:
    short = SamplingParams(
        temperature=0.0, max_tokens=20, min_tokens=7, logit_bias=((0, 100.0), (2, 100.0))
    )
    forced = SamplingParams(max_tokens=5, logit_bias=((300, 100.0),), ignore_eos=True)
    usual = SamplingParams(temperature=0.0, max_tokens=6)
    first = llm.generate(PROMPTS[0], usual)[0].token_ids[0]
    banned = SamplingParams(temperature=0.0, max_tokens=6, logit_bias=((first, -100.0),))
    fresh = SamplingParams(
        temperature=0.0,
        max_tokens=40,
        frequency_penalty=2.0,
        presence_penalty=2.0,
        repetition_penalty=100.0,
        ignore_eos=True,
    )
    outputs = [
        one.token_ids for one in llm.generate([PROMPTS[0]] * 4, [short, forced, banned, fresh])
    ]
    assert len(outputs[0]) == 8
    assert outputs[0][-1] in END
    assert not set(outputs[0][:-1]) & set(END)
    assert outputs[1] == (300,) * 5
    assert first not in outputs[2]
    assert len(set(outputs[3])) == 40


def tokens(mask: torch.Tensor) -> list[int]:
    """The ids of a bitmask."""
    words = mask.tolist()
    return [32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1]
