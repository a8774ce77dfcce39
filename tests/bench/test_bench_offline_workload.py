"""The standard workloads are those that others ran, and figures follow from times as said."""

import pytest
from test_bench_floors import CONFIGS, LIMITS

from isomoe.bench.floors import ModelCounts
from isomoe.bench.offline_report import WorkloadResult, shown
from isomoe.bench.offline_workload import Figure, OfflineWorkload, Sample, standard_workloads
from isomoe.bench.results import read_peers
from isomoe.errors import ConfigError, IsomoeError
from isomoe.models import read_config

QWEN3_30B = read_config(CONFIGS / "qwen3-30b-a3b.json")


def test_the_standard_workloads_have_the_sizes_that_others_ran() -> None:
    sizes = {
        name: (work.num_requests, sum(work.input_lens), sum(work.output_lens), work.context_length)
        for name, work in standard_workloads().items()
    }
    assert sizes["W1"] == (1, 128, 256, 384)
    assert sizes["W2"] == (64, 64 * 512, 64 * 256, 768)
    assert sizes["W3"] == (16, 65536, 16, 4097)
    assert sizes["W4"][:3] == (256, 144831, 144160)
    assert sizes["W4"][3] <= 2048


def test_prompts_are_the_same_for_the_same_part_and_fresh_for_another() -> None:
    work = OfflineWorkload.custom(3, 20, 4)
    first = work.prompts(50, "repeat 0")
    assert first == work.prompts(50, "repeat 0")
    assert first != work.prompts(50, "repeat 1")
    assert [len(prompt) for prompt in first] == [20, 20, 20]
    assert all(0 <= token < 50 for prompt in first for token in prompt)


@pytest.mark.parametrize(
    ("sizes", "figure", "sample", "value"),
    [
        ((1, 9, 5), Figure.TOKEN_TIME, Sample(seconds=3.0, first_seconds=1.0), 500.0),
        ((4, 9, 5), Figure.DECODE_RATE, Sample(seconds=3.0, first_seconds=1.0), 8.0),
        ((4, 9, 1), Figure.INPUT_RATE, Sample(seconds=2.0), 18.0),
    ],
)
def test_a_figure_follows_from_times(
    sizes: tuple[int, int, int], figure: Figure, sample: Sample, value: float
) -> None:
    work = OfflineWorkload.custom(*sizes)
    assert work.figure is figure
    assert work.value(sample) == pytest.approx(value)


def test_mixed_lengths_are_told_by_all_output_tokens() -> None:
    assert standard_workloads()["W4"].value(Sample(seconds=10.0)) == pytest.approx(14416.0)


def test_answers_that_are_too_short_to_tell_are_refused() -> None:
    with pytest.raises(IsomoeError, match="a larger --output-len would do"):
        OfflineWorkload.custom(1, 9, 2).value(Sample(seconds=1.0, first_seconds=1.0))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        OfflineWorkload.custom(*sizes)


def test_the_floors_of_qwen3_30b_are_the_known_ones() -> None:
    counts = ModelCounts.of(QWEN3_30B)
    floors = {name: work.floor(counts, LIMITS).value for name, work in standard_workloads().items()}
    assert floors["W1"] == pytest.approx(2.036, rel=1e-3)  # ms: 6.11 GB at 3.0 TB/s
    assert floors["W2"] == pytest.approx(64 / (63.54e9 / 3.0e12), rel=1e-3)
    assert floors["W3"] == pytest.approx(109_000, rel=1e-2)
    assert 4_000 < floors["W4"] < 8_000


def test_the_floor_of_mixed_lengths_is_that_of_its_steps() -> None:
    counts = ModelCounts.of(QWEN3_30B)
    work = OfflineWorkload(
        name="mixed", input_lens=(10, 20), output_lens=(1, 3), figure=Figure.OUTPUT_RATE
    )
    floor = work.floor(counts, LIMITS)
    steps = [counts.prefill([10, 20]), counts.decode([21]), counts.decode([22])]
    assert floor.seconds == pytest.approx(sum(step.seconds(LIMITS) for step in steps))
    assert floor.work.bytes == pytest.approx(sum(step.bytes for step in steps))
    assert floor.value == pytest.approx(4 / floor.seconds)


def test_measured_experts_lower_the_floor() -> None:
    counts = ModelCounts.of(QWEN3_30B)
    work = standard_workloads()["W2"]
    assert work.floor(counts, LIMITS, 64.0).seconds < work.floor(counts, LIMITS).seconds
    even = counts.expected_experts(64)
    assert work.floor(counts, LIMITS, even).seconds == work.floor(counts, LIMITS).seconds


def test_shares_are_of_the_limit_for_times_and_for_rates() -> None:
    counts = ModelCounts.of(QWEN3_30B)
    for name, sample in (
        ("W1", Sample(seconds=1.0 + 255 * 4.072e-3, first_seconds=1.0)),
        ("W3", Sample(seconds=2 * 65536 / 109_000)),
    ):
        work = standard_workloads()[name]
        result = WorkloadResult(work, [sample], work.floor(counts, LIMITS))
        assert result.share == pytest.approx(0.5, rel=1e-2)
        document = result.to_json(counts, read_peers(QWEN3_30B))
        assert document["peers"]
        reached = document["reached"]
        assert isinstance(reached, dict)
        bound = max(
            reached["bytes_per_s"] / LIMITS.copy_bytes_per_s,
            reached["flops_per_s"] / LIMITS.matmul_flops_per_s,
        )
        assert bound == pytest.approx(0.5, rel=1e-2)


def test_peers_are_those_of_the_same_shape_only() -> None:
    peers = read_peers(QWEN3_30B)
    assert peers is not None
    assert {engine["name"].split()[0] for engine in peers["engines"]} == {
        "vLLM",
        "SGLang",
        "transformers",
    }
    assert read_peers({**QWEN3_30B, "num_experts": 64}) is None


@pytest.mark.parametrize(
    ("value", "text"), [(3.338, "3.34"), (109_019.4, "109,019"), (345.6, "346"), (0.5, "0.50")]
)
def test_numbers_are_shown_with_three_digits(value: float, text: str) -> None:
    assert shown(value) == text
