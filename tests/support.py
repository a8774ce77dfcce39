"""What several tests need: small random models, their forward pass on simulated ranks, and where
rows and ranks stand, worked out from coordinates (it shares no code with `isomoe.layout`)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isomoe.blocks import Batch
from isomoe.comm import Communicator, SimWorld
from isomoe.kernels import AttentionBatch
from isomoe.layout import MACHINES, Parallelism, Plan, TokenRows, make_plan
from isomoe.models import CausalLM, build, read_config
from isomoe.stream import ResidualStream
from isomoe.weights import LoadReport, load_safetensors

PAGE = 4

torch.set_num_threads(1)  # tensors are tiny, and idle threads would spin on shared cores


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config with every mechanism of the family switched on, small."""
    from transformers import Qwen2MoeConfig, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    if family == "qwen2":
        sizes |= {"shared_expert_intermediate_size": 40, "norm_topk_prob": False}
    kind = Qwen2MoeConfig if family == "qwen2" else Qwen3MoeConfig
    return kind(**(sizes | changes))


def save_random(config: Any, folder: Path, seed: int = 0) -> Any:
    """transformers' own model with random weights, norms and biases too, saved in `folder`."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    kind = Qwen2MoeForCausalLM if isinstance(config, Qwen2MoeConfig) else Qwen3MoeForCausalLM
    model = kind._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                weight.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model


def load_weights(
    folder: Path, layout: Parallelism, rank: int, dtype: torch.dtype
) -> tuple[CausalLM, LoadReport]:
    """One rank's model with its weights, and what it read."""
    model = build(read_config(folder), layout, rank)
    for leaf in model.leaves():
        leaf.allocate(dtype, torch.device("cpu"))
    wanted = model.weight_slices()
    report = load_safetensors(folder, wanted, model.ignores, canonical=model.canonical)
    return model, report


def load_model(folder: Path, layout: Parallelism, rank: int, dtype: torch.dtype) -> CausalLM:
    """One rank's model with its weights and a KV cache of 64 pages."""
    model, _ = load_weights(folder, layout, rank, dtype)
    for memory in model.memories():
        memory.allocate_cache(64, PAGE, dtype, torch.device("cpu"))
        memory.allocate_states(8, torch.device("cpu"))
    return model


@lru_cache(maxsize=4)
def plan_of(model: CausalLM) -> Plan:
    """The plan on CPUs, made once a model."""
    return make_plan(model.chain, MACHINES["cpu"])


def simulate(
    models: Sequence[CausalLM],
    prompts: Sequence[Sequence[Sequence[int]]],
    padded: Sequence[int] | None = None,
    regime: int | None = None,
    chosen: Sequence[Sequence[int]] | None = None,
) -> list[Tensor]:
    """Prefills prompts on simulated ranks; the logits of each rank's group.

    Args:
        models: one for each rank.
        prompts: for each attention-DP group, its requests' token ids.
        padded: rows of each group, padding included.
        regime: index of the plan's regime; None lets the plan choose.
        chosen: for each group, the rows that get logits; None for every token.
    """
    mesh = models[0].seat.mesh
    plan = plan_of(models[0])
    real = [sum(map(len, group)) for group in prompts]
    rows = TokenRows.of(mesh, real, padded)
    held = [stop - start for start, stop in rows.groups]
    selected = rows.select([list(range(n)) for n in real] if chosen is None else chosen)
    bound = plan.regimes[plan.choose(held) if regime is None else regime]

    def rank_main(comm: Communicator) -> Tensor:
        seat = comm.seat
        group = seat.rank // mesh.parallelism.attn_tp
        ids = [token for prompt in prompts[group] for token in prompt]
        places = [place for prompt in prompts[group] for place in range(len(prompt))]
        pad = [0] * (held[group] - len(ids))
        batch = Batch(
            ids=torch.tensor(ids + pad, dtype=torch.int64),
            positions=torch.tensor(places + pad, dtype=torch.int64),
            attention=attention_batch(prompts[group]),
            rows=rows,
            logits_rows=selected,
            rank=seat.rank,
        )
        stream = ResidualStream(bound, comm, rows, torch.float32)
        return models[seat.rank].forward(batch, stream)

    with torch.inference_mode():
        return SimWorld(mesh).run(rank_main)


def attention_batch(prompts: Sequence[Sequence[int]]) -> AttentionBatch:
    """Whole prompts, each on pages of its own."""
    lens = tuple(map(len, prompts))
    pages = [-(-n // PAGE) for n in lens]
    table = torch.zeros(len(lens), max(pages, default=1), dtype=torch.int64)
    first = 0
    for request, count in enumerate(pages):
        table[request, :count] = torch.arange(first, first + count)
        first += count
    return AttentionBatch(
        query_lens=lens,
        context_lens=lens,
        block_tables=table,
        page_size=PAGE,
        state_slots=tuple(range(len(lens))),
    )


def run_steps(
    models: Sequence[CausalLM],
    requests: Sequence[Sequence[int]],
    pieces: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Runs requests side by side, some tokens of each a step; all logits of each request.

    Args:
        models: one for each rank of a single attention group.
        pieces: for each step, how many tokens of each request it takes.
    """
    mesh = models[0].seat.mesh
    plan = plan_of(models[0])
    pages = [-(-len(ids) // PAGE) for ids in requests]
    table = torch.zeros(len(requests), max(pages), dtype=torch.int64)
    for index, count in enumerate(pages):  # interleaved, so that no request's pages are a run
        table[index, :count] = torch.arange(count) * len(requests) + index
    found: list[list[Tensor]] = [[] for _ in requests]
    done = [0] * len(requests)
    for step in pieces:
        taken = [index for index, count in enumerate(step) if count]
        counts = tuple(step[index] for index in taken)
        ids = [requests[i][done[i] + n] for i in taken for n in range(step[i])]
        places = [done[i] + n for i in taken for n in range(step[i])]
        for index in taken:
            done[index] += step[index]
        rows = TokenRows.of(mesh, [len(ids)])
        batch = Batch(
            ids=torch.tensor(ids),
            positions=torch.tensor(places),
            attention=AttentionBatch(
                query_lens=counts,
                context_lens=tuple(done[index] for index in taken),
                block_tables=table[taken],
                page_size=PAGE,
                state_slots=tuple(taken),
            ),
            rows=rows,
            logits_rows=rows.select([range(len(ids))]),
            rank=0,
        )
        bound = plan.regimes[plan.choose([len(ids)])]

        def rank_main(comm: Communicator, batch: Batch = batch, bound: Any = bound) -> Tensor:
            stream = ResidualStream(bound, comm, batch.rows, torch.float32)
            mine = replace(batch, rank=comm.seat.rank)
            return models[comm.seat.rank].forward(mine, stream)

        with torch.inference_mode():
            logits = SimWorld(mesh).run(rank_main)[0]
        for index, part in zip(taken, torch.split(logits, counts), strict=True):
            found[index].append(part)
    return [torch.cat(parts) for parts in found]


def coordinates(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Of each rank, minor axis last."""
    return list(product(*map(range, axes)))


def placements(axes: int, letters: str = "SRP") -> list[str]:
    """Every placement whose row-sharded axes come first."""
    found = ["".join(p) for p in product(letters, repeat=axes)]
    return [p for p in found if all(b != "S" or a == "S" for a, b in pairwise(p))]


def runs(axes: int) -> list[tuple[int, ...]]:
    """Every run of neighbouring axes."""
    return [tuple(range(i, j)) for i in range(axes) for j in range(i + 1, axes + 1)]


def leaves_of(axes: Sequence[int], attn_dp: int, held: Sequence[int]) -> list[int]:
    """For each row, the rank that holds it when every axis is row-sharded."""
    width = len(coordinates(axes)) // attn_dp
    owner: list[int] = []
    for group, rows in enumerate(held):
        for part, chunk in enumerate(np.array_split(np.arange(rows), width)):
            owner += [group * width + part] * len(chunk)
    return owner


def held_rows(axes: Sequence[int], owner: Sequence[int], rank: int, row_axes: int) -> list[int]:
    """The rows that `rank` holds when the first `row_axes` axes are row-sharded."""
    where = coordinates(axes)
    mine = where[rank][:row_axes]
    return [row for row, leaf in enumerate(owner) if where[leaf][:row_axes] == mine]


def group_of(axes: Sequence[int], rank: int, along: Sequence[int]) -> list[int]:
    """The ranks that differ from `rank` along `along` only."""
    where = coordinates(axes)
    return [
        other
        for other, place in enumerate(where)
        if all(
            a == b or i in along for i, (a, b) in enumerate(zip(place, where[rank], strict=True))
        )
    ]
