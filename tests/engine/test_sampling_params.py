"""`SamplingParams` as a value: equal, hashed and sent between processes by what it holds."""

import pickle
import sys

import pytest

from isomoe.engine import SamplingParams
from isomoe.errors import RequestError

EVERYTHING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_p=0.9,
    top_k=3,
    min_p=0.1,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    repetition_penalty=1.1,
    logit_bias=((3, -100.0), (5, 1.5)),
    seed=-(2**63),
    min_tokens=7,
    stop=("a", "\n\n"),
    stop_token_ids=(4, 2),
    ignore_eos=True,
    json_schema='{"type": "object"}',
    logprobs=2,
    prompt_logprobs=0,
    prompt_logprobs_start=9,
)


@pytest.mark.parametrize("params", [SamplingParams(), EVERYTHING, SamplingParams(regex="a+")])
def test_params_survive_the_way_to_another_process(params: SamplingParams) -> None:
    msgspec = pytest.importorskip("msgspec")
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params
    assert pickle.loads(pickle.dumps(params)) == params


def test_whole_numbers_serve_where_numbers_are_asked_for() -> None:
    msgspec = pytest.importorskip("msgspec")
    params = SamplingParams(temperature=1, top_p=1, presence_penalty=2, logit_bias=((1, 5),))
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params


def test_lists_and_mappings_become_tuples() -> None:
    params = SamplingParams(
        stop=["a"],  # type: ignore[arg-type]
        stop_token_ids=[4],  # type: ignore[arg-type]
        logit_bias={3: 1.0},  # type: ignore[arg-type]
    )
    assert (params.stop, params.stop_token_ids) == (("a",), (4,))
    assert params.logit_bias == ((3, 1.0),)
    assert params == SamplingParams(logit_bias=[[3, 1.0]], stop=("a",), stop_token_ids=(4,))  # type: ignore[arg-type]
    assert len({params, EVERYTHING, SamplingParams(), SamplingParams()}) == 3


@pytest.mark.parametrize(
    ("params", "penalties", "grammar", "adjusts"),
    [
        (SamplingParams(temperature=0.7, top_k=5, stop=("x",), seed=1), False, False, False),
        (SamplingParams(presence_penalty=0.1), True, False, True),
        (SamplingParams(frequency_penalty=-0.1), True, False, True),
        (SamplingParams(repetition_penalty=0.9), True, False, True),
        (SamplingParams(logit_bias=((1, 0.5),)), False, False, True),
        (SamplingParams(min_tokens=1), False, False, True),
        (SamplingParams(json_schema="true"), False, True, True),
        (SamplingParams(regex=""), False, True, True),
    ],
)
def test_params_know_whether_they_change_logits(
    params: SamplingParams, penalties: bool, grammar: bool, adjusts: bool
) -> None:
    assert params.has_penalties is penalties
    assert params.has_grammar is grammar
    assert params.adjusts_logits is adjusts


def test_a_schema_as_deep_as_can_be_is_refused_and_no_crash() -> None:
    depth = 10 * sys.getrecursionlimit()
    with pytest.raises(RequestError, match="cannot be read as JSON") as caught:
        SamplingParams(json_schema='{"not":' * depth + "{}" + "}" * depth)
    assert len(str(caught.value)) < 300
