"""Level 0: each real block, with real weights, gives what it declares, on every rank.

Summed along P, equal along R and the right rows along S, it must be what the same block gives on
one rank. The inner moves that a block declares are carried out by a real stream.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import isomoe.blocks
from isomoe.blocks import (
    Attention,
    AttentionNames,
    Batch,
    Block,
    Embedding,
    ExpertNames,
    ExpertWeights,
    GatedMLP,
    LatentAttention,
    LightningAttention,
    LmHead,
    Memory,
    PerExpert,
    QueryScale,
    RMSNorm,
    Rope,
    SparseMoe,
    Stacked,
    Transposed,
    WideNormAttention,
)
from isomoe.blocks.lightning import slopes
from isomoe.comm import Communicator, SimWorld
from isomoe.errors import ConfigError
from isomoe.kernels import AttentionBatch, ClampedSwiGlu, Routing, Span, SwiGlu
from isomoe.layout import (
    A2ABackend,
    Mesh,
    Move,
    Parallelism,
    Regime,
    RegimePlan,
    Seat,
    TokenRows,
    Variant,
    WireFormat,
)
from isomoe.stream import ResidualStream
from support import PAGE, attention_batch, coordinates, held_rows, leaves_of

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


def attention(kind: type[Attention] = Attention, /, **sizes: object) -> Callable[[Seat], Block]:
    def build(seat: Seat) -> Block:
        given = {"hidden_size": HIDDEN, "head_dim": 8, "rope": Rope(8, 10000.0)}
        return kind(seat, "attn", **(given | sizes))

    return build


def latent(q_latent: int | None) -> Case:
    def build(seat: Seat) -> Block:
        return LatentAttention(
            seat,
            "attn",
            hidden_size=HIDDEN,
            num_heads=12,
            q_latent=q_latent,
            kv_latent=8,
            head_dim=6,
            v_head_dim=5,
            rope=Rope(4, 10000.0, interleaved=True),
            eps=1e-6,
        )

    return Case(f"LatentAttention q_latent={q_latent}", build)


def lightning(**options: object) -> Case:
    def build(seat: Seat) -> Block:
        names = AttentionNames(q="qkv", k="qkv", v="qkv", output="dense")
        given = {"rope": Rope(4, 10000.0), "decay_factor": 0.7, "norm_groups": 12, "eps": 1e-6}
        sizes = {"hidden_size": HIDDEN, "num_heads": 24, "head_dim": 8, "names": names}
        return LightningAttention(seat, "attn", **(sizes | given | options))

    return Case(f"LightningAttention {', '.join(options)}".strip(), build)


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


def moe(name: str, num_experts: int, width: int, routing: Routing, **options: object) -> Case:
    def build(seat: Seat) -> Block:
        return SparseMoe(
            seat,
            "moe",
            hidden_size=HIDDEN,
            intermediate_size=width,
            num_experts=num_experts,
            routing=routing,
            **options,
        )

    return Case(f"SparseMoe of {num_experts} {name}", build)


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
    Case(
        "Attention with a window, sinks and biases",
        attention(
            num_heads=12,
            num_kv_heads=6,
            span=Span(window=2),
            has_sinks=True,
            bias=True,
            output_bias=True,
        ),
        (6,),
    ),
    Case(
        "Attention with fused names, zero-centred norms and partial rope",
        attention(
            num_heads=12,
            num_kv_heads=3,
            bias=True,
            names=AttentionNames(q="qkv", k="qkv", v="qkv"),
            qk_norm=1e-6,
            zero_centred=True,
            rope=Rope(4, 10000.0),
        ),
        (3,),
    ),
    Case(
        "Attention with fused names, scaled values of other dims and sinks",
        attention(
            num_heads=24,
            num_kv_heads=2,
            v_head_dim=3,
            value_scale=0.7,
            names=AttentionNames(q="qkv", k="qkv", v="qkv", sinks="sink"),
            has_sinks=True,
        ),
        (2,),
    ),
    Case(
        "Attention by chunks, with a unit norm and interleaved rope",
        attention(
            num_heads=12,
            num_kv_heads=2,
            span=Span(chunk=2),
            unit_norm=1e-5,
            rope=Rope(8, 10000.0, interleaved=True),
        ),
        (2,),
    ),
    Case(
        "Attention without rope, with a query scale",
        attention(num_heads=12, num_kv_heads=6, rope=None, query_scale=QueryScale(0.5, 2.0)),
        (6,),
    ),
    Case(
        "Attention by blocks, with a gate",
        attention(num_heads=12, num_kv_heads=3, span=Span(block=2), has_gate=True, qk_norm=1e-6),
        (3,),
    ),
    Case(
        "WideNormAttention",
        attention(WideNormAttention, num_heads=12, num_kv_heads=12, qk_norm=1e-6),
        (12,),
    ),
    Case(
        "WideNormAttention with 2 KV heads and partial rope",
        attention(
            WideNormAttention, num_heads=12, num_kv_heads=2, qk_norm=1e-6, rope=Rope(4, 10000.0)
        ),
        (2,),
    ),
    latent(q_latent=7),
    latent(q_latent=None),
    lightning(qk_norm=1e-6),
    lightning(rope=None, eps=0.1),
    moe("renormalized", 24, 12, Routing(top_k=3, renormalize=True)),
    moe("not renormalized", 12, 24, Routing(top_k=2)),
    moe(
        "by sigmoid, in groups, corrected",
        24,
        12,
        Routing(
            top_k=3, scoring="sigmoid", renormalize=True, scale=2.5, num_groups=4, kept_groups=2
        ),
        correction="gate.bias",
        router_fp32=True,
        names=Stacked(),
    ),
    moe(
        "Transposed with biases",
        12,
        12,
        Routing(top_k=3, renormalize=True),
        router="router",
        router_bias=True,
        names=Transposed(interleaved=True, has_bias=True),
        activation=ClampedSwiGlu(limit=1.5),
    ),
    moe(
        "Transposed in halves, with scaled inputs",
        12,
        12,
        Routing(top_k=1, scoring="sigmoid"),
        names=Transposed(),
        scales_input=True,
    ),
    moe(
        "Stacked, limited, the best of groups",
        12,
        12,
        Routing(top_k=2, num_groups=3, kept_groups=2, group_score="max"),
        experts="",
        names=Stacked(),
        activation=SwiGlu(limit=0.5),
    ),
    *(mlp(axes) for axes in GROUPS),
    mlp("all", gate="mlp.gate"),
    mlp("ffn_tp", gate="mlp.gate"),
    head(None),
    head("embed"),
]


def ways(layout: Parallelism) -> Iterator[Parallelism]:
    """A layout with each of the ways between rows and experts."""
    yield layout
    if layout.tp_size > 6 or layout.moe_dense_tp_size or layout.enable_dp_lm_head:
        return  # the other ways are no different there
    packed = replace(layout, moe_wire_format=WireFormat.FP8)
    yield packed
    if layout.ep_size > 1:
        for one in (layout, packed):
            yield replace(one, moe_a2a_backend=A2ABackend.TORCH)
            yield replace(
                one,
                moe_a2a_backend=A2ABackend.TORCH,
                ep_num_redundant_experts=2 * layout.ep_size,
            )
            yield replace(one, ep_num_redundant_experts=layout.ep_size)


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
    routed = case.name.startswith("SparseMoe")
    for layout in (one for plain in layouts() for one in (ways(plain) if routed else (plain,))):
        try:
            mesh = Mesh.of(layout, case.kv_heads)
            spec = case.build(Seat(mesh, 0)).spec
        except ConfigError:
            continue
        key = (mesh.axes, mesh.attn_dp, spec.variants, layout.ep_size)
        if routed:
            key = (*key, layout.ep_num_redundant_experts, layout.moe_wire_format)
        else:
            key = key[:-1]
        if key not in seen:
            seen.add(key)
            yield mesh


@lru_cache(maxsize=256)
def checkpoint_tensor(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    generator = np.random.default_rng([seed, *name.encode()])
    return torch.from_numpy(generator.normal(0, 0.5, shape)).bfloat16().float()


def fill(block: Block, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[int, ...]]:
    """Random weights, the same for a name on every layout; the full shapes that were named."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in block.leaves():
        leaf.allocate(dtype, torch.device("cpu"))
        for piece in leaf.slices():
            assert shapes.setdefault(piece.source, piece.shape) == piece.shape
            full = checkpoint_tensor(seed, piece.source, piece.shape)
            piece.out.copy_(full[piece.index] + piece.plus)
        if isinstance(leaf, Memory):
            leaf.allocate_cache(16, PAGE, dtype, torch.device("cpu"))
            leaf.allocate_states(8, torch.device("cpu"))
    return shapes


def run(
    blocks: Sequence[Block],
    mesh: Mesh,
    rows: TokenRows,
    given: Sequence[Tensor],
    batches: Sequence[Batch],
    variant: Variant | None = None,
) -> list[Tensor]:
    """What each rank's block gives, its inner moves carried out on simulated ranks."""
    spec = blocks[0].spec
    variant = variant or spec.variants[0]
    plan = RegimePlan(
        regime=Regime(rows=len(rows.real), equal=False),
        mesh=mesh,
        embedding="",
        embedding_gives=spec.variants[0].gives,
        reads=(),
        inner=((spec.name, variant.inner),) if variant.inner else (),
        kinds={spec.name: spec.kind},
        predicted_us=0.0,
    )

    def rank_main(comm: Communicator) -> Tensor:
        rank = comm.seat.rank
        stream = ResidualStream(plan, comm, rows, torch.float32)
        return blocks[rank](given[rank], batches[rank], stream)

    return SimWorld(mesh).run(rank_main)


@dataclass
class Step:
    """Rows of a step over all groups, and what the block gives for them on one rank."""

    groups: int
    case: Case
    form: WireFormat = WireFormat.NONE
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
        seat = Seat(Mesh.of(Parallelism(moe_wire_format=self.form)), 0)
        block = self.case.build(seat)
        self.shapes = fill(block, seed=1)
        start = sum(self.held[:group])
        rows = TokenRows.of(seat.mesh, [self.real[group]], [self.held[group]])
        x = self.given[start : start + self.held[group]]
        (out,) = run([block], seat.mesh, rows, [x], [self.batch(group, rows, 0)])
        return out

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
    steps: dict[tuple[int, WireFormat], Step] = {}
    tried = 0
    with torch.inference_mode():
        for mesh in meshes(case):
            groups = mesh.parallelism.attn_dp_size
            key = groups, mesh.parallelism.moe_wire_format
            if key not in steps:
                steps[key] = Step(groups, case, key[1])
            step = steps[key]
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
    spec = blocks[0].spec
    batches = [
        step.batch(rank // mesh.parallelism.attn_tp, rows, rank) for rank in range(mesh.size)
    ]
    for variant in spec.variants:
        # The embedding takes the ids of its attention group.
        shards = len(mesh.attn_dp) if variant.needs is None else str(variant.needs).count("S")
        given = [step.given[held_rows(mesh.axes, owner, r, shards)] for r in range(mesh.size)]
        # Features that are sharded behind a block are joined by its inner moves.
        gives = str(variant.inner[-1].after if "C" in str(variant.gives) else variant.gives)
        out = run(blocks, mesh, rows, given, batches, variant)
        compare(mesh, gives, out, step.expected, owner, f"{mesh.axes} {variant}")
    return len(spec.variants)


def compare(
    mesh: Mesh, gives: str, given: list[Tensor], expected: Tensor, owner: list[int], where: str
) -> None:
    places = coordinates(mesh.axes)

    def among(rank: int, letters: str) -> tuple[int, ...]:
        """Where a rank stands along the axes with some letters."""
        return tuple(at for at, held in zip(places[rank], gives, strict=True) if held in letters)

    for rank in range(mesh.size):
        family = [r for r in range(mesh.size) if among(r, "SR") == among(rank, "SR")]
        total = torch.stack([given[r].double() for r in family]).sum(0)
        right = expected[held_rows(mesh.axes, owner, rank, gives.count("S"))].double()
        assert total.shape == right.shape, f"{where}, rank {rank}"
        # Sums of up to 12 addends of size 1 to 30 in fp32, of which each is off by some 1e-7.
        assert torch.allclose(total, right, rtol=1e-4, atol=1e-4), f"{where}, rank {rank}"
        copies = [r for r in range(mesh.size) if among(r, "SP") == among(rank, "SP")]
        assert all(torch.equal(given[r], given[rank]) for r in copies), f"{where}: copies differ"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_packed_block_in_bf16_is_near_what_it_is_in_fp32(case: Case) -> None:
    """The weights are the same: those of a checkpoint are made in bf16."""
    step = Step(1, case)
    seat = Seat(Mesh.of(Parallelism()), 0)
    rows = TokenRows.of(seat.mesh, step.real, step.held)
    block = case.build(seat)
    fill(block, 1, torch.bfloat16)
    for leaf in block.leaves():
        leaf.pack()
    given = step.given if case.takes_ids else step.given.bfloat16()
    with torch.inference_mode():
        (out,) = run([block], seat.mesh, rows, [given], [step.batch(0, rows, 0)])
    off = (out.float() - step.expected).norm(dim=1) / step.expected.norm(dim=1)
    assert off[: step.real[0]].max() < 0.03


REMEMBERING = [
    case
    for case in CASES
    # A query may see later tokens of its block, which then must be in the same step.
    if "attn" in case.build(Seat(Mesh.of(Parallelism()), 0)).name and "by blocks" not in case.name
]


@pytest.mark.parametrize("tp", [1, 6])
@pytest.mark.parametrize("case", REMEMBERING, ids=lambda case: case.name)
def test_pieces_of_requests_give_what_whole_requests_give(case: Case, tp: int) -> None:
    """Memories last from step to step, and padding rows leave no trace in them."""
    whole = (7, 5)
    pieces = ((3, 0), (1, 4), (0, 1), (3, 0))  # tokens of each request in each step
    random = np.random.default_rng(0)
    x = [torch.from_numpy(random.normal(0, 1, (n, HIDDEN))).float() for n in whole]
    slots = (5, 2)
    tables = torch.tensor([[3, 0], [1, 9]])

    def step(
        mesh: Mesh, blocks: Sequence[Block], done: Sequence[int], new: Sequence[int]
    ) -> Tensor:
        """The rows of a step in which some tokens of each request are new."""
        taken = [request for request in range(2) if new[request]]
        spans = [slice(done[r], done[r] + new[r]) for r in taken]
        real = sum(new)
        rows = TokenRows.of(mesh, [real], [real + 2])
        given = torch.cat([x[r][span] for r, span in zip(taken, spans, strict=True)])
        given = torch.cat((given, torch.full((2, HIDDEN), 9.0)))
        places = [p for span in spans for p in range(span.start, span.stop)]
        attention = AttentionBatch(
            query_lens=tuple(new[r] for r in taken),
            context_lens=tuple(span.stop for span in spans),
            block_tables=tables[taken],
            page_size=PAGE,
            state_slots=tuple(slots[r] for r in taken),
        )
        batches = [
            Batch(
                ids=torch.empty(0),
                positions=torch.tensor([*places, 0, 0]),
                attention=attention,
                rows=rows,
                logits_rows=rows.select([[]]),
                rank=rank,
            )
            for rank in range(mesh.size)
        ]
        out = run(blocks, mesh, rows, [given] * mesh.size, batches)
        return torch.stack(out).sum(0)[:real]

    def ranks(tp: int) -> tuple[Mesh, list[Block]]:
        mesh = Mesh.of(Parallelism(tp_size=tp), case.kv_heads)
        blocks = [case.build(Seat(mesh, rank)) for rank in range(tp)]
        for block in blocks:
            fill(block, seed=3)
        return mesh, blocks

    with torch.inference_mode():
        expected = torch.split(step(*ranks(1), (0, 0), whole), whole)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        done = [0, 0]
        mesh, blocks = ranks(tp)
        for new in pieces:
            out = torch.split(step(mesh, blocks, done, new), new)
            for request, part in enumerate(out):
                parts[request].append(part)
                done[request] += new[request]
    for got, right in zip(parts, expected, strict=True):
        torch.testing.assert_close(torch.cat(got), right, rtol=1e-4, atol=1e-4)


def test_slopes_are_a_geometric_series_with_every_other_one_of_the_next() -> None:
    assert slopes(1) == [2**-8]
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(12) == [*slopes(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]


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


class NothingMoves:
    """For a block that declares no inner moves."""

    def inner(self, block: str) -> tuple[Move, ...]:
        return ()


@pytest.mark.parametrize("layout", ["tp1", "tp2,ep2", "tp3", "tp6,dp2,ep6", "tp4,dp4,ep2"])
def test_padding_rows_are_routed_nowhere(layout: str) -> None:
    mesh = Mesh.of(Parallelism.parse(layout))
    groups = mesh.parallelism.attn_dp_size
    real, held = [2, 0, 1, 3][:groups], [4, 1, 1, 5][:groups]
    rows = TokenRows.of(mesh, real, held)
    is_padding = np.concatenate([np.arange(h) >= r for r, h in zip(real, held, strict=True)])
    for rank in range(mesh.size):
        every = Routing(top_k=24, renormalize=True)
        block = moe("of which all are chosen", 24, 12, every).build(Seat(mesh, rank))
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
        given = block(x, batch, NothingMoves())
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
        ("tp5", latent(7).build, "5 does not divide 12 attention heads"),
        ("tp5", lightning().build, "5 does not divide 24 attention heads"),
        ("tp8", lightning().build, "8 does not divide 12 groups of the linear attention's norm"),
        ("tp5,ep5", moe("", 24, 12, Routing(top_k=3)).build, "5 does not divide 24 experts"),
        ("tp5", moe("", 24, 12, Routing(top_k=3)).build, "5 does not divide 12 columns"),
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


def grouped(**options: object) -> Callable[[Seat], Block]:
    return moe("", 24, 12, Routing(top_k=6, **options)).build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (attention(num_heads=12, num_kv_heads=5), "12 heads on 5 KV heads cannot be"),
        (moe("", 24, 12, Routing(top_k=25)).build, "25 experts a token of 24 cannot be"),
        (grouped(num_groups=5), "24 experts in 5 equal groups cannot be"),
        (grouped(num_groups=0), "24 experts in 0 equal groups cannot be"),
        (
            grouped(num_groups=8, kept_groups=1),
            "6 experts a token of the best 1 of 8 groups of 3 cannot be",
        ),
        (
            grouped(num_groups=4, kept_groups=5),
            "6 experts a token of the best 5 of 4 groups of 6 cannot be",
        ),
        (grouped(num_groups=24, kept_groups=6), "a group of one expert has no two best"),
    ],
)
def test_sizes_that_make_no_block_are_refused_with_the_numbers(
    build: Callable[[Seat], Block], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Seat(Mesh.of(Parallelism()), 0))


def test_experts_are_the_same_however_they_are_stored() -> None:
    torch.manual_seed(0)
    experts, width, hidden = 4, 6, 5
    gate, up = torch.randn(2, experts, width, hidden)
    down = torch.randn(experts, hidden, width)
    gate_bias, up_bias = torch.randn(2, experts, width)
    turns = (
        torch.stack((gate, up), 2).flatten(1, 2),
        torch.stack((gate_bias, up_bias), 2).flatten(1),
    )
    halves = torch.cat((gate, up), 1), torch.cat((gate_bias, up_bias), 1)
    stored: list[tuple[ExpertNames, dict[str, Tensor]]] = [
        (
            PerExpert(gate="w1", up="w3", down="w2"),
            {
                f"mlp.{expert}.{name}.weight": weight[expert]
                for expert in range(experts)
                for name, weight in (("w1", gate), ("w3", up), ("w2", down))
            },
        ),
        (
            Stacked(),
            {
                "mlp.gate_proj.weight": gate,
                "mlp.up_proj.weight": up,
                "mlp.down_proj.weight": down,
            },
        ),
        *(
            (
                Transposed(interleaved=both is turns, has_bias=True),
                {
                    "mlp.gate_up_proj": both[0].transpose(1, 2),
                    "mlp.gate_up_proj_bias": both[1],
                    "mlp.down_proj": down.transpose(1, 2),
                    "mlp.down_proj_bias": down[:, :, 0],
                },
            )
            for both in (halves, turns)
        ),
    ]
    for names, tensors in stored:
        for here in (True, False):
            # Experts 1 and 2 of this rank, and columns 2 to 4 of each.
            leaf = ExpertWeights(
                "mlp", experts, hidden, width, (1, 2), (2, 5), names, bias_here=here
            )
            leaf.allocate(torch.float32, torch.device("cpu"))
            found = list(leaf.slices())
            assert {piece.source for piece in found} == set(tensors)
            for piece in found:
                assert piece.shape == tensors[piece.source].shape
                piece.out.copy_(tensors[piece.source][piece.index])
            assert torch.equal(leaf.gate_up, torch.cat((gate[1:3, 2:5], up[1:3, 2:5]), 1))
            assert torch.equal(leaf.down, down[1:3, :, 2:5])
            assert names.has_bias == (leaf.form.gate_up_bias is not None)
            if leaf.form.gate_up_bias is not None and leaf.form.down_bias is not None:
                biases = torch.cat((gate_bias[1:3, 2:5], up_bias[1:3, 2:5]), 1)
                assert torch.equal(leaf.form.gate_up_bias, biases)
                assert torch.equal(leaf.form.down_bias, down[1:3, :, 0] * here)


def test_a_norm_has_no_placement_and_keeps_its_shape() -> None:
    norm = RMSNorm("norm", HIDDEN, 1e-6)
    norm.allocate(torch.float32, torch.device("cpu"))
    (piece,) = norm.slices()
    assert (piece.source, piece.shape) == ("norm.weight", (HIDDEN,))
    assert norm(torch.randn(0, HIDDEN)).shape == (0, HIDDEN)
    assert not hasattr(norm, "spec")
