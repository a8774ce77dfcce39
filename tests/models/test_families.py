"""Every family answers as its oracle does, from a checkpoint in its published format."""

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families.case import Case, Oracle
from isomoe.layout import Parallelism
from isomoe.models import FAMILIES, CausalLM, family_of, read_config
from model_layouts import few, kinds, sample
from support import load_model, load_weights, run_steps, simulate

FOLDER = Path(__file__).parent.parent / "families"
CASES: list[Case] = [
    case
    for file in sorted(FOLDER.glob("*.py"))
    if hasattr(module := importlib.import_module(f"families.{file.stem}"), "CASES")
    for case in module.CASES
]
PROMPTS = [((9, 21, 3),), ((), (14,), (1, 10)), ((13,), (), (1,), (12, 1), (), (6,), (1,), (11, 1))]
"""Lengths of the prompts of each attention-DP group; groups beyond a list are empty."""

GROUPS = {"attn_dp", "attn_tp", "moe_ep", "moe_tp", "ffn_tp", "lm_dp", "lm_tp"}


class Answers:
    """The oracle's logits of a prompt, each computed once."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.known: dict[tuple[int, ...], Tensor] = {}

    def prompt(self, ids: tuple[int, ...]) -> Tensor:
        if ids not in self.known:
            self.known[ids] = self.oracle(torch.tensor(ids))
        return self.known[ids]

    def group(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        parts = [self.prompt(tuple(ids)) for ids in prompts]
        return torch.cat(parts) if parts else None


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, config, answers) of one case."""
    folder = tmp_path_factory.mktemp("checkpoint")
    answers = Answers(request.param.save(folder))
    return folder, read_config(folder), answers


def tokens(length: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(100 * seed + length)
    drawn: list[int] = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    return drawn


def prompts_of(lengths: Sequence[Sequence[int]], groups: int, vocabulary: int) -> list[list[Any]]:
    padded = [*lengths, *([()] * groups)][:groups]
    return [
        [tokens(n, 10 * g + i, vocabulary) for i, n in enumerate(p)] for g, p in enumerate(padded)
    ]


def assert_near(got: Tensor, expected: Tensor | None, what: object) -> None:
    if expected is None:
        assert len(got) == 0, what
        return
    assert got.shape == expected.shape, what
    # 1e-4 of the largest logit: fp32, summed in another order through several layers.
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"{what}: {error:.1e}"


@pytest.mark.parametrize("of", [few, pytest.param(sample, marks=pytest.mark.slow)])
def test_logits_are_the_oracles_on_every_kind_of_group(checkpoint: Any, of: Any) -> None:
    folder, config, answers = checkpoint
    family = family_of(config)
    chosen = of(family, config)
    met = {name for layout in chosen for name, _ in kinds(family, config, layout)}
    copies = {f"copies of {heads} KV heads" for heads in family.kv_heads(config) if heads < 6}
    assert met >= GROUPS | copies | ({"ffn_dp"} if family.has_dense(config) else set())
    assert len(chosen) > 2
    for layout in chosen:
        models = [load_model(folder, layout, r, torch.float32) for r in range(layout.tp_size)]
        for lengths in PROMPTS[:1] if layout.attn_dp_size == 1 else PROMPTS[1:]:
            prompts = prompts_of(lengths, layout.attn_dp_size, config["vocab_size"])
            for rank, logits in enumerate(simulate(models, prompts)):
                expected = answers.group(prompts[rank // layout.attn_tp])
                assert_near(logits, expected, f"{layout}, rank {rank}")


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_prompt_in_chunks_and_token_by_token_is_the_prompt(checkpoint: Any, layout: str) -> None:
    """Two requests of unequal lengths side by side, in steps that mix prompts and decodes."""
    folder, config, answers = checkpoint
    parallelism = Parallelism.parse(layout)
    models = [load_model(folder, parallelism, r, torch.float32) for r in range(parallelism.tp_size)]
    diffusion = models[0].diffusion(config)
    unit = diffusion.block_size if diffusion else 1  # the least that can be committed
    long, short = (tokens(length, 1, config["vocab_size"]) for length in (24, 16))
    pieces = [(8, 8), (8, 0), *([(unit, unit)] * (8 // unit))]
    for ids, logits in zip((long, short), run_steps(models, [long, short], pieces), strict=True):
        assert_near(logits, answers.prompt(tuple(ids)), f"{layout}, {len(ids)} tokens")


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2,dp1,ep2", "tp4,dp2,ep4"])
def test_each_rank_reads_its_share_of_the_checkpoint(checkpoint: Any, layout: str) -> None:
    """And nothing else, once. Loading fails unless every tensor is known and has its shape."""
    folder, *_ = checkpoint
    parallelism = Parallelism.parse(layout)
    for rank in range(parallelism.tp_size):
        model, report = load_weights(folder, parallelism, rank, torch.float32)
        kept: Counter[str] = Counter()
        seen = set()  # what embedding and head share is read once
        for piece in model.weight_slices():
            box = (piece.source, *map(slice.indices, piece.index, piece.shape))
            if box not in seen:
                kept[piece.source] += piece.out.nbytes  # in fp32, as in the file
            seen.add(box)
        assert {model.canonical(name): n for name, n in report.bytes_read.items()} == +kept


def test_every_family_with_kv_heads_has_a_case_whose_ranks_hold_copies(tmp_path: Path) -> None:
    """Of fewer KV heads than layouts have ranks; see the groups above."""
    most: dict[type[CausalLM], bool] = {}
    for case in CASES:
        folder = tmp_path / case.name
        folder.mkdir()
        case.save(folder)
        config = read_config(folder)
        family = family_of(config)
        if heads := family.kv_heads(config):
            most[family] = most.get(family, False) or min(heads) < 6
    assert most
    assert all(most.values()), most


def test_every_family_has_a_case() -> None:
    named = {case.family for case in CASES}
    assert {family.__module__.rpartition(".")[2] for family in FAMILIES} == named
