import json
import math
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isomoe.bench import Workload, arrivals, read_dataset
from isomoe.errors import ConfigError


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0.0, 0.99), st.integers(0, 9), st.integers(0)
)
def test_lengths_and_ids_are_within_what_was_asked(
    input_len: int, output_len: int, ratio: float, prefix: int, seed: int
) -> None:
    workload = Workload(
        num_prompts=20, input_len=input_len, output_len=output_len, range_ratio=ratio,
        shared_prefix_len=prefix, seed=seed,
    )  # fmt: skip
    requests = workload.wave(0, 11)
    assert len(requests) == 20
    for request in requests:
        own = len(request.prompt) - prefix
        assert max(1, math.floor(input_len * (1 - ratio))) <= own
        assert own <= math.ceil(input_len * (1 + ratio))
        assert max(1, math.floor(output_len * (1 - ratio))) <= request.max_tokens
        assert request.max_tokens <= math.ceil(output_len * (1 + ratio))
        assert all(type(token) is int and 0 <= token < 11 for token in request.prompt)


def test_every_length_of_the_range_comes_up() -> None:
    requests = Workload(num_prompts=500, input_len=4, output_len=6, range_ratio=0.5).wave(0, 99)
    assert {len(request.prompt) for request in requests} == {2, 3, 4, 5, 6}
    assert {request.max_tokens for request in requests} == {3, 4, 5, 6, 7, 8, 9}


@pytest.mark.parametrize("vocab_size", [1000, None])
def test_waves_share_the_prefix_and_nothing_else(vocab_size: int | None) -> None:
    workload = Workload(num_prompts=4, input_len=16, shared_prefix_len=12, waves=2)
    first, second = (workload.wave(index, vocab_size) for index in (0, 1))
    assert first == workload.wave(0, vocab_size)
    prompts = [
        tuple(request.prompt.split() if isinstance(request.prompt, str) else request.prompt)
        for request in first + second
    ]
    assert {len(prompt) for prompt in prompts} == {28}
    assert len({prompt[:12] for prompt in prompts}) == 1
    assert len({prompt[12:16] for prompt in prompts}) == 8
    warm = workload.warmup(1, vocab_size)[0].prompt
    words = warm.split() if isinstance(warm, str) else warm
    assert len(words) == 28
    assert tuple(words[:12]) != prompts[0][:12], "it must not warm the prefix"
    other = Workload(num_prompts=4, input_len=16, shared_prefix_len=12, seed=1)
    assert other.wave(0, vocab_size)[0].prompt != first[0].prompt


def test_a_larger_wave_begins_with_the_smaller_one() -> None:
    small, large = (Workload(num_prompts=n, range_ratio=0.5).wave(0, 50) for n in (3, 5))
    assert large[:3] == small


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("num_prompts", 0, "--num-prompts 0"),
        ("input_len", 0, "--input-len 0"),
        ("output_len", -1, "--output-len -1"),
        ("range_ratio", 1.0, "--range-ratio 1.0"),
        ("range_ratio", math.nan, "--range-ratio nan"),
        ("shared_prefix_len", -1, "--shared-prefix-len -1"),
        ("waves", 0, "--waves 0"),
    ],
)
def test_a_field_out_of_range_is_refused_by_its_flag(field: str, value: float, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: must be"):
        Workload(**{field: value})  # type: ignore[arg-type]


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = list(islice(arrivals(50.0, seed=3), 4001))
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0.0
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.05)
    # An exponential's standard deviation is its mean, and a share of exp(-1) exceeds it.
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert times == list(islice(arrivals(50.0, seed=3), 4001))
    assert set(islice(arrivals(math.inf, seed=0), 5)) == {0.0}


def test_a_dataset_gives_texts_and_token_ids(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": [1, 2], "other": 3}\n')
    requests = read_dataset(str(file), 9)
    assert [(one.prompt, one.max_tokens) for one in requests] == [("one", 9), ((1, 2), 9)]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"text": "x"}', '{"prompt": ""}', '{"prompt": [1.5]}', '{"prompt": [true]}'],
)
def test_a_bad_line_of_a_dataset_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match="line 2 is not like"):
        read_dataset(str(file), 9)


def test_a_dataset_that_is_empty_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        read_dataset(str(tmp_path / "empty"), 9)
    with pytest.raises(ConfigError, match="not readable"):
        read_dataset(str(tmp_path / "missing"), 9)
