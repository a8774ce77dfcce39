"""Level 0: each real block, with real weights, gives what it declares, on every rank.

Summed along P, equal along R, the right rows along S and the right features along C, it must be
what the same block gives on one rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import isomoe.blocks
from isomoe.blocks import (
    Attention,
    Batch,
    Block,
    Embedding,
    GatedMLP,
    LmHead,
    RMSNorm,
    Rope,
    SparseMoe,
)
from isomoe.errors import ConfigError
from isomoe.kernels import AttentionBatch
from isomoe.layout import Mesh, Parallelism, Seat, TokenRows
from support import attention_batch, coordinates, held_rows, leaves_of

HIDDEN = 24
VOCABULARY = 37  # a prime: no number of ranks divides it
LENGTHS = ((3, 1), (5,), (), (2, 2, 1), (1,), (4,))
"""Prompts of each attention-DP group; one group is empty."""
PADDING = (0, 2, 1, 0, 0, 3)


@dataclass(frozen=True)
class Case:
    """A block to lay out.

    Attributes:
        build: the block on a seat; on a mesh that does not fit it raises ConfigError.
        kv_heads: as the mesh must know them.
    """

    name: str
    build: Callable[[Seat], Block]
    kv_heads: tuple[int, ...] = ()
    takes_ids: bool = False


def attention(**sizes: object) -> Callable[[Seat], Block]:
    def build(seat: Seat) -> Block:
        given = {"hidden_size": HIDDEN, "head_dim": 8, "rope": Rope(8, 10000.0, 32)}
        return Attention(seat, "attn", **(given | sizes))

    return build


def mlp(axes: str, gate: str | None = None) -> Case:
    def build(seat: Seat) -> Block:
        return GatedMLP(
            seat,
            "mlp",
            hidden_size=HIDDEN,
            intermediate_size=24,
            axes=getattr(seat.mesh, axes),
            gate=gate,
        )

    return Case(f"GatedMLP over {axes}{' with a gate' if gate else ''}", build)


def moe(num_experts: int, width: int, top_k: int, renormalize: bool) -> Case:
    def build(seat: Seat) -> Block:
        return SparseMoe(
            seat,
            "moe",
            hidden_size=HIDDEN,
            intermediate_size=width,
            num_experts=num_experts,
            top_k=top_k,
            renormalize=renormalize,
        )

    return Case(f"SparseMoe of {num_experts} renormalize={renormalize}", build)


def head(tied: str | None) -> Case:
    def build(seat: Seat) -> Block:
        return LmHead(seat, "lm_head", VOCABULARY, HIDDEN, tied)

    return Case(f"LmHead tied={tied}", build)


def embedding(vocabulary: int) -> Case:
    return Case(
        f"Embedding of {vocabulary}",
        lambda seat: Embedding(seat, "embed", vocabulary, HIDDEN),
        takes_ids=True,
    )


GROUPS = ("all", "attn_dp", "attn_tp", "moe_ep", "moe_tp", "ffn_dp", "ffn_tp", "lm_dp", "lm_tp")
CASES = [
    embedding(VOCABULARY),
    embedding(12),
    Case("Attention", attention(num_heads=12, num_kv_heads=12), (12,)),
    Case("Attention GQA", attention(num_heads=12, num_kv_heads=6, bias=True), (6,)),
    Case(
        "Attention with 2 KV heads, biases and QK norm",
        attention(num_heads=24, num_kv_heads=2, bias=True, output_bias=True, qk_norm=1e-6),
        (2,),
    ),
    Case(
        "Attention with 3 KV heads and an output bias",
        attention(num_heads=12, num_kv_heads=3, output_bias=True),
        (3,),
    ),
    Case("Attention MQA", attention(num_heads=24, num_kv_heads=1, qk_norm=1e-5), (1,)),
    moe(24, 12, 3, renormalize=True),
    moe(12, 24, 2, renormalize=False),
    *(mlp(axes) for axes in GROUPS),
    mlp("all", gate="mlp.gate"),
    mlp("ffn_tp", gate="mlp.gate"),
    head(None),
    head("embed"),
]


def layouts() -> Iterator[Parallelism]:
    for tp in (1, 2, 3, 4, 6, 8, 12):
        degrees = [d for d in range(1, tp + 1) if tp % d == 0]
        for dp, ep, dense, dp_head in product(degrees, degrees, [None, *degrees], (False, True)):
            if dp <= len(LENGTHS):
                yield Parallelism(
                    tp_size=tp,
                    attn_dp_size=dp,
                    ep_size=ep,
                    moe_dense_tp_size=dense,
                    enable_dp_lm_head=dp_head,
                )


def meshes(case: Case) -> Iterator[Mesh]:
    """One for each way in which the block can be sharded on axes of their own."""
    seen = set()
    for layout in layouts():
        try:
            mesh = Mesh.of(layout, case.kv_heads)
            spec = case.build(Seat(mesh, 0)).spec
        except ConfigError:
            continue
        key = (mesh.axes, mesh.attn_dp, spec.variants, spec.inner, layout.ep_size)
        if not case.name.startswith("SparseMoe"):
            key = key[:-1]
        if key not in seen:
            seen.add(key)
            yield mesh


def fill(block: Block, seed: int) -> dict[str, tuple[int, ...]]:
    """Random weights, the same for a name on every layout; the full shapes that were named."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in block.leaves():
        leaf.allocate(torch.float32, torch.device("cpu"))
        for piece in leaf.slices():
            assert shapes.setdefault(piece.source, piece.shape) == piece.shape
            name = np.frombuffer(piece.source.encode(), dtype=np.uint8)
            generator = np.random.default_rng([seed, *name.tolist()])
            full = torch.from_numpy(generator.normal(0, 0.5, piece.shape)).float()
            piece.out.copy_(full[piece.index])
        if hasattr(leaf, "allocate_cache"):
            leaf.allocate_cache(16, 4, torch.float32, torch.device("cpu"))
    return shapes


@dataclass
class Step:
    """Rows of a step over all groups, and what the block gives for them on one rank."""

    groups: int
    case: Case
    given: Tensor = field(init=False)
    expected: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = LENGTHS[: self.groups]
        self.real = [sum(lengths) for lengths in self.lengths]
        self.held = [n + pad for n, pad in zip(self.real, PADDING, strict=False)]
        random = np.random.default_rng(self.groups)
        total = sum(self.held)
        if self.case.takes_ids:
            self.given = torch.from_numpy(random.integers(0, 12, total))
        else:
            self.given = torch.from_numpy(random.normal(0, 1, (total, HIDDEN))).float()
        self.expected = torch.cat([self.on_one_rank(group) for group in range(self.groups)])

    def on_one_rank(self, group: int) -> Tensor:
        seat = Seat(Mesh.of(Parallelism()), 0)
        block = self.case.build(seat)
        self.shapes = fill(block, seed=1)
        start = sum(self.held[:group])
        rows = TokenRows.of(seat.mesh, [self.real[group]], [self.held[group]])
        x = self.given[start : start + self.held[group]]
        return block(x, self.batch(group, rows, 0))

    def batch(self, group: int, rows: TokenRows, rank: int) -> Batch:
        places = [place for length in self.lengths[group] for place in range(length)]
        pad = [0] * (self.held[group] - len(places))
        return Batch(
            ids=torch.empty(0, dtype=torch.int64),
            positions=torch.tensor(places + pad, dtype=torch.int64),
            attention=as_attention(self.lengths[group]),
            rows=rows,
            logits_rows=rows.select([[]] * len(rows.real)),
            rank=rank,
        )


def as_attention(lengths: Sequence[int]) -> AttentionBatch:
    return attention_batch([[0] * n for n in lengths])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_block_gives_what_it_declares(case: Case) -> None:
    steps: dict[int, Step] = {}
    tried = 0
    with torch.inference_mode():
        for mesh in meshes(case):
            groups = mesh.parallelism.attn_dp_size
            step = steps.setdefault(groups, Step(groups, case))
            tried += check(case, mesh, step)
    assert tried > 10


def check(case: Case, mesh: Mesh, step: Step) -> int:
    """Every variant on every rank of `mesh`; returns how many were compared."""
    rows = TokenRows.of(mesh, step.real, step.held)
    owner = leaves_of(mesh.axes, step.groups, step.held)
    blocks = [case.build(Seat(mesh, rank)) for rank in range(mesh.size)]
    for block in blocks:
        assert fill(block, seed=1) == step.shapes, "every rank names the same tensors"
        assert block.spec == blocks[0].spec, "every rank declares the same"
    variants = blocks[0].spec.variants
    for variant in variants:
        # The embedding takes the ids of its attention group.
        shards = len(mesh.attn_dp) if variant.needs is None else str(variant.needs).count("S")
        given = []
        for rank, block in enumerate(blocks):
            held = held_rows(mesh.axes, owner, rank, shards)
            group = rank // mesh.parallelism.attn_tp
            given.append(block(step.given[held], step.batch(group, rows, rank)))
        compare(mesh, str(variant.gives), given, step.expected, owner, f"{mesh.axes} {variant}")
    return len(variants)


def compare(
    mesh: Mesh, gives: str, given: list[Tensor], expected: Tensor, owner: list[int], where: str
) -> None:
    places = coordinates(mesh.axes)

    def among(rank: int, letters: str) -> tuple[int, ...]:
        """Where a rank stands along the axes with some letters."""
        return tuple(at for at, held in zip(places[rank], gives, strict=True) if held in letters)

    feature_ranks = sorted({among(rank, "C") for rank in range(mesh.size)})
    for rank in range(mesh.size):
        family = [r for r in range(mesh.size) if among(r, "SCR") == among(rank, "SCR")]
        total = torch.stack([given[r].double() for r in family]).sum(0)
        right = expected[held_rows(mesh.axes, owner, rank, gives.count("S"))].double()
        if "C" in gives:
            width = given[rank].shape[1]
            first = feature_ranks.index(among(rank, "C")) * width
            short = max(0, len(feature_ranks) * width - right.shape[1])
            right = torch.nn.functional.pad(right, (0, short))[:, first : first + width]
        assert total.shape == right.shape, f"{where}, rank {rank}"
        # Sums of up to 12 addends of size 1 to 30 in fp32, of which each is off by some 1e-7.
        assert torch.allclose(total, right, rtol=1e-4, atol=1e-4), f"{where}, rank {rank}"
        copies = [r for r in range(mesh.size) if among(r, "SCP") == among(rank, "SCP")]
        assert all(torch.equal(given[r], given[rank]) for r in copies), f"{where}: copies differ"


def test_every_block_has_a_case() -> None:
    exported = [getattr(isomoe.blocks, name) for name in isomoe.blocks.__all__]
    kinds = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Block)}
    one = Seat(Mesh.of(Parallelism()), 0)
    assert {type(case.build(one)) for case in CASES} == kinds - {Block}


def test_the_cases_meet_every_kind_of_group_and_axes_of_three() -> None:
    met: set[str] = set()
    sizes: set[int] = set()
    replicated_heads = 0
    for case in CASES:
        for mesh in meshes(case):
            met |= {name for name in GROUPS if getattr(mesh, name)}
            sizes |= set(mesh.axes)
            if case.kv_heads and mesh.parallelism.attn_tp > case.kv_heads[0]:
                replicated_heads += 1
    assert met == set(GROUPS)
    assert {2, 3} <= sizes
    assert replicated_heads > 10


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_cover_every_weight(case: Case) -> None:
    """Joined over the ranks, the kept slices are the whole of every tensor."""
    for mesh in meshes(case):
        if mesh.size > 6:
            continue
        covered: dict[str, Tensor] = {}
        for rank in range(mesh.size):
            block = case.build(Seat(mesh, rank))
            fill(block, seed=1)
            for leaf in block.leaves():
                for piece in leaf.slices():
                    mask = covered.setdefault(piece.source, torch.zeros(piece.shape))
                    mask[piece.index] += 1
                    assert piece.out.shape == mask[piece.index].shape
        assert covered
        for name, mask in covered.items():
            assert mask.min() >= 1, f"{mesh.axes}: {name} is not kept whole"


@pytest.mark.parametrize("layout", ["tp1", "tp2,ep2", "tp3", "tp6,dp2,ep6", "tp4,dp4,ep2"])
def test_padding_rows_are_routed_nowhere(layout: str) -> None:
    mesh = Mesh.of(Parallelism.parse(layout))
    groups = mesh.parallelism.attn_dp_size
    real, held = [2, 0, 1, 3][:groups], [4, 1, 1, 5][:groups]
    rows = TokenRows.of(mesh, real, held)
    is_padding = np.concatenate([np.arange(h) >= r for r, h in zip(real, held, strict=True)])
    for rank in range(mesh.size):
        block = moe(24, 12, 24, renormalize=True).build(Seat(mesh, rank))  # all experts chosen
        fill(block, seed=2)
        assert isinstance(block, SparseMoe)
        batch = Batch(
            ids=torch.empty(0),
            positions=torch.empty(0),
            attention=as_attention(()),
            rows=rows,
            logits_rows=rows.select([[]] * groups),
            rank=rank,
        )
        x = torch.randn(sum(held), HIDDEN, generator=torch.Generator().manual_seed(0))
        falling = -torch.arange(24.0).repeat(len(x), 1)  # every row ranks the experts 0, 1, ...
        _, local = block.route(falling, batch)
        assert (local[is_padding] == -1).all()
        owned = mesh.index(rank, mesh.moe_ep) if mesh.moe_ep else 0
        share = 24 // mesh.parallelism.ep_size
        for row in local[~is_padding].tolist():
            mine = range(owned * share, (owned + 1) * share)
            assert row == [e - mine.start if e in mine else -1 for e in range(24)]
        given = block(x, batch)
        assert (given[is_padding] == 0).all()
        assert (given[~is_padding] != 0).any(dim=1).all()


@pytest.mark.parametrize(
    ("layout", "build", "message"),
    [
        ("tp5", attention(num_heads=12, num_kv_heads=5), "5 does not divide 12 attention heads"),
        ("tp3", attention(num_heads=12, num_kv_heads=4), "3 does not divide 4 KV heads"),
        (
            "tp6",
            attention(num_heads=12, num_kv_heads=4),
            "attn_tp=6 is no multiple of 4 KV heads",
        ),
        ("tp5,ep5", moe(24, 12, 3, True).build, "5 does not divide 24 experts"),
        ("tp5", moe(24, 12, 3, True).build, "5 does not divide 12 columns of an expert"),
        ("tp5", mlp("all").build, "5 does not divide 24 columns of the dense FFN"),
    ],
)
def test_sizes_that_do_not_split_are_refused_with_the_numbers(
    layout: str, build: Callable[[Seat], Block], message: str
) -> None:
    mesh = Mesh.of(Parallelism.parse(layout))
    with pytest.raises(ConfigError) as refused:
        build(Seat(mesh, 0))
    assert str(refused.value).startswith(f"{mesh.parallelism.flags}: ")
    assert message in str(refused.value)


def test_a_norm_has_no_placement_and_keeps_its_shape() -> None:
    norm = RMSNorm("norm", HIDDEN, 1e-6)
    norm.allocate(torch.float32, torch.device("cpu"))
    (piece,) = norm.slices()
    assert (piece.source, piece.shape) == ("norm.weight", (HIDDEN,))
    assert norm(torch.randn(0, HIDDEN)).shape == (0, HIDDEN)
    assert not hasattr(norm, "spec")


def test_trim_drops_the_vocabulary_s_padding() -> None:
    seat = Seat(Mesh.of(Parallelism(tp_size=3)), 0)
    block = head(None).build(seat)
    assert isinstance(block, LmHead)
    assert block.trim(torch.zeros(2, 39)).shape == (2, VOCABULARY)
