"""What a step must move and compute: counted from the config.json and the workload.

T: rows   E: experts   K: experts a row   H: hidden size   N: query heads   d: head dim

Counted are the bytes of weights that a step reads (of experts, those that any row chose), the keys
and values that its attention reads, the states that linear attention reads and writes, the rows of
the embedding, and the floating-point operations of matrix products and of attention. Activations
are left out: they can stay in the cache.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from isomoe.bench.device import DeviceLimits
from isomoe.blocks import AttentionCore, ExpertWeights, Leaf, Memory, SparseMoe
from isomoe.errors import ConfigError
from isomoe.kernels import CAUSAL, Span
from isomoe.layout import Parallelism
from isomoe.models import HFConfig, build


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What some steps move and compute, as far as it cannot be avoided.

    Attributes:
        weight_bytes: of weights read.
        kv_bytes: of keys and values read, and of states read and written.
        flops: additions and multiplications.
    """

    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            weight_bytes=self.weight_bytes + other.weight_bytes,
            kv_bytes=self.kv_bytes + other.kv_bytes,
            flops=self.flops + other.flops,
        )

    @classmethod
    def mean(cls, works: Sequence["Work"]) -> "Work":
        """Of at least one."""
        return cls(
            weight_bytes=fmean(work.weight_bytes for work in works),
            kv_bytes=fmean(work.kv_bytes for work in works),
            flops=fmean(work.flops for work in works),
        )

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    def seconds(self, limits: DeviceLimits) -> float:
        """The least time on a device."""
        return limits.seconds(self.bytes, self.flops)

    def to_json(self) -> dict[str, float]:
        """As plain numbers."""
        return {
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "flops": self.flops,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Attending:
    """All layers whose queries see the same keys.

    Attributes:
        kv_values: keys and values that a token leaves in their caches.
        pair_flops: operations for one query row and one key that it sees.
    """

    span: Span
    kv_values: int
    pair_flops: int

    def keys(self, context: int) -> int:
        """That the last of `context` rows sees."""
        return context - self.span.start(context - 1)

    def pairs(self, length: int) -> int:
        """Of a query row and a key that it sees, in a prompt."""
        most = min(length, self.span.chunk or self.span.window or length)
        first = most * (most + 1) // 2
        if self.span.chunk is None:
            return first + (length - most) * most
        chunks, rest = divmod(length, most)
        return chunks * first + rest * (rest + 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCounts:
    """A model's parameters, by what reads them.

    Attributes:
        hidden_size: H.
        attention: parameters of all attention blocks, their norms included.
        norms: of all norms that read the residual stream.
        router: of all routers.
        dense: of all dense FFNs and shared experts.
        expert: of one expert of one layer.
        lm_head: of the output matrix, also where it is the embedding.
        embedding: of the embedding matrix.
        sparse_layers: layers with experts.
        num_experts: E; 0 without.
        top_k: K.
        attending: the layers with a KV cache.
        state_bytes: of a request, in all layers with linear attention.
        state_flops: operations of a row on them.
        item_bytes: of a parameter, and of a value in the cache.
        expert_item_bytes: of a parameter of an expert.
    """

    hidden_size: int
    attention: int
    norms: int
    router: int
    dense: int
    expert: int
    lm_head: int
    embedding: int
    sparse_layers: int
    num_experts: int
    top_k: int
    attending: tuple[Attending, ...]
    state_bytes: int
    state_flops: int
    item_bytes: int
    expert_item_bytes: float

    @classmethod
    def of(
        cls,
        config: HFConfig,
        dtype: torch.dtype = torch.bfloat16,
        expert_block: int | None = None,
    ) -> "ModelCounts":
        """The counts of a checkpoint.

        Args:
            expert_block: rows and columns that share a scale, of experts kept in FP8.

        Raises:
            ConfigError: if no family runs it, or it is counted otherwise.
        """
        model = build(config, Parallelism())
        if model.diffusion(config) is not None:
            raise ConfigError("floors are of models that append tokens; this one fills in blocks")
        for leaf in model.leaves():
            leaf.allocate(dtype, torch.device("meta"))
        attention = router = dense = expert = sparse_layers = num_experts = top_k = 0
        attending: dict[Span, Attending] = {}
        state_bytes = 0
        for layer in model.layers:
            attention += _parameters(layer.attn.leaves())
            for leaf in layer.attn.leaves():
                if isinstance(leaf, Memory):
                    state_bytes += leaf.state_bytes()
                    _add(attending, leaf, dtype)
            for block in layer.ffn:
                if not isinstance(block, SparseMoe):
                    dense += _parameters(block.leaves())
                    continue
                sparse_layers += 1
                num_experts, top_k = block.num_experts, block.routing.top_k
                for leaf in block.leaves():
                    if isinstance(leaf, ExpertWeights):
                        expert = _parameters([leaf]) // num_experts
                    else:
                        router += _parameters([leaf])
        return cls(
            hidden_size=config["hidden_size"],
            attention=attention,
            norms=_parameters(model.norms()),
            router=router,
            dense=dense,
            expert=expert,
            lm_head=_parameters(model.lm_head.leaves()),
            embedding=_parameters(model.embedding.leaves()),
            sparse_layers=sparse_layers,
            num_experts=num_experts,
            top_k=top_k,
            attending=tuple(attending.values()),
            state_bytes=state_bytes,
            # Of each value in fp32: a product brings it up to date, another one reads it.
            state_flops=4 * state_bytes // 4,
            item_bytes=dtype.itemsize,
            expert_item_bytes=dtype.itemsize if expert_block is None else 1 + 4 / expert_block**2,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the KV cache."""
        return sum(layers.kv_values for layers in self.attending) * self.item_bytes

    @property
    def row_flops(self) -> int:
        """Operations for one row, without attention over keys and without the lm_head."""
        experts = self.sparse_layers * self.top_k * self.expert
        return 2 * (self.attention + self.router + self.dense + experts)

    def expected_experts(self, rows: int) -> float:
        """Distinct experts that `rows` rows choose in a layer if all choose evenly at random."""
        if not self.num_experts:
            return 0.0
        return float(self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** rows))

    def decode(self, contexts: Sequence[int], experts: float | None = None) -> Work:
        """A step of one new row a request.

        Args:
            contexts: tokens of each request, the row's own included.
            experts: distinct experts of a layer; None expects them of an even choice.
        """
        rows = len(contexts)
        kv_bytes, flops = 2.0 * rows * self.state_bytes, 0.0
        for layers in self.attending:
            keys = sum(layers.keys(context) for context in contexts)
            kv_bytes += keys * layers.kv_values * self.item_bytes
            flops += keys * layers.pair_flops
        return self._step(rows, rows, experts) + Work(kv_bytes=kv_bytes, flops=flops)

    def prefill(self, lengths: Iterable[int], experts: float | None = None) -> Work:
        """All prompts in one step; their own keys and states need not come from memory."""
        lengths = list(lengths)
        flops = sum(
            layers.pair_flops * layers.pairs(length)
            for layers in self.attending
            for length in lengths
        )
        return self._step(sum(lengths), len(lengths), experts) + Work(flops=flops)

    def _step(self, rows: int, logits_rows: int, experts: float | None) -> Work:
        """All but attention over keys. logits_rows: rows that get logits."""
        if experts is None:
            experts = self.expected_experts(rows)
        parameters = self.attention + self.norms + self.router + self.dense
        parameters += rows * self.hidden_size + self.lm_head
        of_experts = self.sparse_layers * experts * self.expert
        return Work(
            weight_bytes=parameters * self.item_bytes + of_experts * self.expert_item_bytes,
            flops=rows * (self.row_flops + self.state_flops) + 2 * logits_rows * self.lm_head,
        )


def _add(attending: dict[Span, Attending], leaf: Memory, dtype: torch.dtype) -> None:
    """One more layer, unless it has no KV cache."""
    values = leaf.cache_bytes_per_token(dtype) // dtype.itemsize
    if not values:
        return
    span = leaf.heads.span if isinstance(leaf, AttentionCore) else CAUSAL
    known = attending.get(span, Attending(span=span, kv_values=0, pair_flops=0))
    attending[span] = Attending(
        span=span,
        kv_values=known.kv_values + values,
        pair_flops=known.pair_flops + leaf.pair_flops(),
    )


def _parameters(leaves: Iterable[Leaf]) -> int:
    """Values of the checkpoint's tensors that the leaves are filled from."""
    total = 0
    for leaf in leaves:
        for piece in leaf.slices():
            size = 1
            for length in piece.shape:
                size *= length
            total += size
    return total
