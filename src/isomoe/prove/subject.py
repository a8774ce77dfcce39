"""What is proven: one model on one layout, cut down to what tells layouts apart."""

from dataclasses import dataclass

from isomoe.blocks import Ownership, Part, Routing, SparseMoe
from isomoe.layout import ExpertMap, Parallelism, Seat
from isomoe.models import CausalLM, HFConfig, build, family_of, representative

PROOF_VOCAB = 509
"""Vocabulary of the proof: more than the rows of any case, and prime, so that shards are padded."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model on one layout, cut down to one layer of each sort.

    Attributes:
        name: of the model.
        config: its config.json, with the proof's vocabulary.
        layers: the layers that stand for all.
    """

    name: str
    config: HFConfig
    layout: Parallelism
    layers: list[int]

    @classmethod
    def of(cls, name: str, config: HFConfig, layout: Parallelism) -> "Subject":
        """The subject for a checkpoint's config."""
        small = {**config, "vocab_size": PROOF_VOCAB}
        return cls(
            name=name,
            config=small,
            layout=layout,
            layers=representative(family_of(config), config),
        )

    def build(self, rank: int = 0) -> CausalLM:
        """The model on one rank, without weights."""
        return build(self.config, self.layout, rank, self.layers)

    def build_small(self, rank: int = 0, layout: Parallelism | None = None) -> CausalLM:
        """The same with few experts, to be run."""
        model = build(self.config, layout or self.layout, rank, self.layers)
        for block in model.blocks():
            if isinstance(block, SparseMoe):
                _keep_few_experts(block, model.seat, self.layout.ep_size)
        return model


def _keep_few_experts(block: SparseMoe, seat: Seat, ways: int) -> None:
    """Leaves one or two experts to each of `ways` ranks, and at most two to a token.

    Which experts a rank owns, all of them, and how it finds them, is checked among its shares.
    Here two a rank stand for them. How weights come of logits is no question of layout: all ranks
    work out the same of the same row.
    """
    count = ways * min(2, block.num_experts // ways)
    redundant = ways if seat.mesh.parallelism.ep_num_redundant_experts else 0
    block.num_experts = block.experts.num_experts = count
    share = seat.shard(count + redundant, seat.mesh.moe_ep, "experts")
    block.ownership = Ownership(ExpertMap.trivial(count, redundant), *share)
    block.experts.held = block.ownership.held
    block.routing = Routing(top_k=min(2, block.routing.top_k, count))
    block.router.parts = (Part(block.router.parts[0].source, count, 0, count),)
