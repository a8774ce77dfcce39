"""Kernels are sorted by name, and gaps are what no kernel covers."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import gpu_interpreter  # noqa: F401 - before any kernel
import isomoe.kernels.gpu  # noqa: F401 - so that its kernels have names
from isomoe.bench.profile import CATEGORIES, GAPS, Event, break_down, category_of, read_trace


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("_decode_attention", "attention"),
        ("_prepare_heads", "attention"),
        ("_few_gate_up", "experts"),
        ("_down_kernel", "experts"),
        ("_combine_kernel", "experts"),
        ("_place", "routing"),
        ("_route", "routing"),
        ("_norm", "norms"),
        ("_vector", "dense linear"),
        ("_greedy", "sampling"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "dense linear"),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_tn_align8", "dense linear"),
        ("void cutlass::device_kernel<cutlass::gemm::GroupProblemShape<int>>", "experts"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
        ("void at::native::reduce_kernel<at::native::ArgMaxOps<float>>", "sampling"),
        ("isomoe: experts", "experts"),
    ],
)
def test_a_name_has_a_category(name: str, category: str) -> None:
    assert category_of(name) == category


def test_every_kernel_of_ours_has_a_category_of_its_own() -> None:
    from isomoe.bench.profile import own_kernels

    assert len(own_kernels()) > 10
    assert set(own_kernels().values()) <= set(CATEGORIES)


def event(name: str, begin: float, end: float) -> Event:
    return Event(name=name, begin=begin, end=end, category=category_of(name))


def test_time_is_summed_by_category_and_gaps_are_what_is_left() -> None:
    events = [
        event("_norm", 0.0, 10.0),
        event("_few_down", 15.0, 35.0),
        event("_few_down", 35.0, 55.0),
        event("Memcpy DtoH", 50.0, 60.0),  # waits for the one before
        event("_norm", 80.0, 100.0),
    ]
    found = break_down(events, "decode", 2)
    assert found is not None
    assert found.span_us == 50.0
    assert found.category_us["norms"] == 15.0
    assert found.category_us["experts"] == 20.0
    assert found.category_us["other"] == 2.5
    assert found.category_us[GAPS] == (5.0 + 20.0) / 2
    assert sum(found.category_us.values()) == found.span_us
    assert found.launches == 2.5
    assert found.kernels[0] == ("_few_down", 1.0, 20.0)
    document = found.to_json()
    assert set(document["us"]) == {*CATEGORIES, GAPS}  # type: ignore[call-overload]


def test_nothing_is_nothing() -> None:
    assert break_down([], "decode", 3) is None


def trace(folder: Path, events: list[dict[str, Any]], name: str = "t.json") -> Path:
    file = folder / name
    text = json.dumps({"traceEvents": events}).encode()
    file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return file


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_of_a_gpus_trace_the_kernels_count(tmp_path: Path, name: str) -> None:
    file = trace(
        tmp_path,
        [
            {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 50, "tid": 1},
            {"cat": "kernel", "name": "_norm", "ts": 10.5, "dur": 2.5, "tid": 7},
            {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 20, "dur": 1, "tid": 7},
            {"cat": "gpu_user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 9, "tid": 7},
            {"name": "no category", "ts": 1, "dur": 1, "tid": 7},
        ],
        name,
    )
    events = read_trace(file, on_gpu=True)
    assert [(one.name, one.begin, one.end) for one in events] == [
        ("_norm", 10.5, 13.0),
        ("Memcpy HtoD", 20, 21),
    ]


def test_of_a_cpus_trace_the_outermost_operations_of_the_main_thread_count(
    tmp_path: Path,
) -> None:
    file = trace(
        tmp_path,
        [
            {"cat": "user_annotation", "name": "isomoe: experts", "ts": 5, "dur": 20, "tid": 1},
            {"cat": "cpu_op", "name": "aten::mm", "ts": 6, "dur": 5, "tid": 1},
            {"cat": "cpu_op", "name": "aten::add", "ts": 30, "dur": 5, "tid": 1},
            {"cat": "cpu_op", "name": "aten::mm", "ts": 6, "dur": 5, "tid": 2},
            {"cat": "python_function", "name": "f", "ts": 0, "dur": 50, "tid": 1},
        ],
    )
    events = read_trace(file, on_gpu=False)
    assert [(one.name, one.category) for one in events] == [
        ("isomoe: experts", "experts"),
        ("aten::add", "other"),
    ]
