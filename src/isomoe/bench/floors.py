"""What a step must move and compute: counted from the config.json and the workload.

T: rows   E: experts   K: experts a row   H: hidden size   N: query heads   d: head dim

Counted are the bytes of weights that a step reads (of experts, those that any row chose), the keys
and values that its attention reads, the rows of the embedding, and the floating-point operations
of matrix products and of causal attention. Activations are left out: they can stay in the cache.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from isomoe.bench.device import DeviceLimits
from isomoe.blocks import ExpertWeights, Leaf, Memory, SparseMoe
from isomoe.layout import Parallelism
from isomoe.models import HFConfig, build


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What some steps move and compute, as far as it cannot be avoided.

    Attributes:
        weight_bytes: of weights read.
        kv_bytes: of keys and values read.
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
        kv_values: keys and values that a token leaves in the cache, in all layers.
        pair_flops: operations for one query row and one key that it sees, in all layers.
        item_bytes: of a parameter, and of a value in the cache.
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
    kv_values: int
    pair_flops: int
    item_bytes: int

    @classmethod
    def of(cls, config: HFConfig, dtype: torch.dtype = torch.bfloat16) -> "ModelCounts":
        """The counts of a checkpoint.

        Raises:
            ConfigError: if no family runs it.
        """
        model = build(config, Parallelism())
        for leaf in model.leaves():
            leaf.allocate(dtype, torch.device("meta"))
        attention = router = dense = expert = sparse_layers = num_experts = top_k = 0
        kv_values = pair_flops = 0
        for layer in model.layers:
            attention += _parameters(layer.attn.leaves())
            for leaf in layer.attn.leaves():
                if isinstance(leaf, Memory):
                    kv_values += leaf.cache_bytes_per_token(dtype) // dtype.itemsize
                    pair_flops += leaf.pair_flops()
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
            kv_values=kv_values,
            pair_flops=pair_flops,
            item_bytes=dtype.itemsize,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the KV cache."""
        return self.kv_values * self.item_bytes

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

    def step(
        self, *, rows: int, logits_rows: int, pairs: float, keys: float, experts: float | None
    ) -> Work:
        """The work of one step.

        Args:
            rows: T.
            logits_rows: rows that get logits.
            pairs: of a query row and a key that it sees.
            keys: in the cache that attention reads: once for each request.
            experts: distinct experts of a layer; None expects them of an even choice.
        """
        if experts is None:
            experts = self.expected_experts(rows)
        parameters = self.attention + self.norms + self.router + self.dense
        parameters += rows * self.hidden_size
        if logits_rows:
            parameters += self.lm_head
        read = parameters + self.sparse_layers * experts * self.expert
        return Work(
            weight_bytes=read * self.item_bytes,
            kv_bytes=keys * self.kv_bytes_per_token,
            flops=rows * self.row_flops + pairs * self.pair_flops + 2 * logits_rows * self.lm_head,
        )

    def decode(self, contexts: Sequence[float], experts: float | None = None) -> Work:
        """A step of one new row a request. contexts: the keys that each row sees, its own too."""
        requests, keys = len(contexts), sum(contexts)
        return self.step(
            rows=requests, logits_rows=requests, pairs=keys, keys=keys, experts=experts
        )

    def prefill(self, lengths: Iterable[int], experts: float | None = None) -> Work:
        """All prompts in one step; their own keys need not come from memory."""
        lengths = list(lengths)
        return self.step(
            rows=sum(lengths),
            logits_rows=len(lengths),
            pairs=sum(length * (length + 1) / 2 for length in lengths),
            keys=0,
            experts=experts,
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
