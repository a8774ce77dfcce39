"""The GPU's way through the engine, on whatever is here.

Without a GPU, Triton's interpreter runs the kernels on the CPU: batches, kernels, sampling and
scheduling ahead, with tokens that the host does not know yet, are then those of a GPU. Captured
graphs are not.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

import gpu_interpreter  # noqa: F401 - first of all
from families import deepseek_v2
from families.answers import check_answers, family_cases
from families.case import Case
from gpu_support import ON_GPU
from isomoe.blocks import Attention, Batch, Rope
from isomoe.engine import LLM, RequestOutput, SamplingParams
from isomoe.engine.executor import LocalExecutor
from isomoe.engine.gpu_batches import GpuBatches
from isomoe.kernels import PagedRows, dispatch
from isomoe.layout import Mesh, Parallelism, Seat
from isomoe.models import family_of, read_config

PROMPTS = [[5, 9, 2, 7, 7, 1, 30, 4, 11], [3], [8, 1], [6] * 5]
PARAMS = [
    SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=5, temperature=0.9, top_p=0.8, seed=3, logprobs=0),
    SamplingParams(max_tokens=4, temperature=0.0, repetition_penalty=1.4, prompt_logprobs=1),
    SamplingParams(max_tokens=0, prompt_logprobs=1),
]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """From now on kernels are Triton's; the device that they run on."""

    def begin() -> str:
        monkeypatch.setattr(dispatch, "interpreted", not ON_GPU)
        if not ON_GPU:  # programs run one after the other: as few as one processor needs
            monkeypatch.setattr(LINEAR, "_processors", lambda: 1)
            LINEAR._default.cache_clear()
        return "cuda" if ON_GPU else "cpu"

    yield begin
    LINEAR._default.cache_clear()


LINEAR = import_module("isomoe.kernels.gpu.linear")  # the package has a function of that name


def llm(folder: Path, device: str, **options: str) -> LLM:
    return LLM(
        str(folder),
        device=device,
        page_size=4,
        chunked_prefill_size=8,
        max_total_tokens=512,
        dtype="float32",
        **options,  # type: ignore[arg-type]
    )


def scores(output: RequestOutput) -> list[tuple[int, float]]:
    """Every logprob that an output has."""
    found = (*(output.logprobs or ()), *(output.prompt_logprobs or ()))
    return [(token.token_id, token.logprob) for token in found if token is not None]


def test_the_kernels_of_a_gpu_give_the_plain_ones_answers(
    folder: Path, on_triton: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with llm(folder, "cpu") as plain:
        expected = plain.generate(PROMPTS, PARAMS)
    unknown = 0
    columns = GpuBatches._columns

    def counted(batches: GpuBatches) -> tuple[list[int], list[int], list[int]]:
        nonlocal unknown
        found = columns(batches)
        unknown += found[2].count(-1)
        return found

    monkeypatch.setattr(GpuBatches, "_columns", counted)
    with llm(folder, on_triton()) as engine:
        engine.core._depth = 2
        engine.core.scheduler.limits = replace(engine.core.scheduler.limits, graph_rows=(1, 2, 4))
        found = engine.generate(PROMPTS, PARAMS)
        assert isinstance(engine.core.executor, LocalExecutor)
        assert len(engine.core.executor.worker._sampler._open) <= 2, "answers are kept"
    assert unknown, "the host knew every token"
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert scores(one) == [
            (token, pytest.approx(logprob, abs=1e-4)) for token, logprob in scores(other)
        ]


@pytest.mark.parametrize("wire", ["none", "fp8"])
def test_experts_in_fp8_give_the_plain_kernels_answers(
    wire: str, folder: Path, on_triton: Callable[[], str]
) -> None:
    """Packed rows meet packed weights there; here both count as their values."""
    options = {"moe_weight_format": "fp8", "moe_wire_format": wire}
    prompts, params = PROMPTS[::3], [PARAMS[0], PARAMS[3]]
    with llm(folder, "cpu", **options) as plain:
        expected = plain.generate(prompts, params)
    with llm(folder, "cpu") as unrounded:
        assert scores(unrounded.generate(prompts, params)[0]) != scores(expected[0])
    with llm(folder, on_triton(), **options) as engine:
        found = engine.generate(prompts, params)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert scores(one) == [
            (token, pytest.approx(logprob, abs=1e-4)) for token, logprob in scores(other)
        ]


QUICK = deepseek_v2.CASES[0].name
"""The interpreter takes a minute or two for a family; a GPU seconds."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name != QUICK))
        for case in family_cases()
    ],
)
def test_a_family_answers_as_its_oracle_does(
    case: Case, tmp_path: Path, on_triton: Callable[[], str]
) -> None:
    oracle = case.save(tmp_path)
    config = read_config(tmp_path)
    if family_of(config).diffusion(config) is not None:
        pytest.skip("block diffusion does not run on GPUs")
    with llm(tmp_path, on_triton()) as engine:
        if ON_GPU:
            check_answers(engine, oracle, most=1e-3)
        else:
            check_answers(engine, oracle, most=1e-3, lengths=(5, 1), new_tokens=2)


def test_a_rank_without_rows_gives_none(on_triton: Callable[[], str]) -> None:
    """An attention-DP group that has no request takes part in the step all the same."""
    device = torch.device(on_triton())
    block = Attention(
        Seat(Mesh.of(Parallelism(), (2,)), 0),
        "attention",
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=Rope(8, 1e4),
    )
    for leaf in block.leaves():
        leaf.allocate(torch.float32, device)
    block.core.allocate_cache(4, 4, torch.float32, device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    rows = PagedRows(
        table_rows=none,
        positions=none,
        block_tables=torch.zeros(1, 4, dtype=torch.int32, device=device),
        page_size=4,
        num_decodes=0,
        max_context=16,
    )
    batch = cast(Batch, SimpleNamespace(attention=rows, positions=none))
    out = block(torch.zeros(0, 16, device=device), batch, lambda name, x: x)
    assert out.shape == (0, 16)
