"""What all families share: the loop over the layers, and the chain that the planner sees."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from isomoe.blocks import (
    AttentionCore,
    Batch,
    Block,
    Embedding,
    Leaf,
    LmHead,
    RMSNorm,
    WeightSlice,
)
from isomoe.errors import ConfigError
from isomoe.layout import Chain, Mesh, Parallelism, ReadSpec, Seat
from isomoe.stream import ResidualStream

_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

HFConfig = Mapping[str, Any]
"""A checkpoint's config.json."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: each norm reads the stream, each block writes to it.

    Attributes:
        ffn: blocks fed by the same norm, such as routed and shared experts.
    """

    attn_norm: RMSNorm
    attn: Block
    ffn_norm: RMSNorm
    ffn: tuple[Block, ...]


class CausalLM(ABC):
    """A decoder on one rank's seat. A family says what its layers are made of.

    Construction makes no weights, so it is cheap, and refuses layouts that cannot work.

    Args:
        config: the checkpoint's config.json.
        seat: the rank.
        layers: which layers to build; all by default. The proof builds one of each sort.

    Raises:
        ConfigError: if the seat's layout does not divide the model.
    """

    architectures: ClassVar[tuple[str, ...]]
    """Names in `architectures` of the config.json, older spellings included."""

    def __init__(self, config: HFConfig, seat: Seat, layers: Iterable[int] | None = None) -> None:
        self.config = config
        self.seat = seat
        for key in _COUNTS:
            if type(config[key]) is not int or config[key] < 1:
                raise ConfigError(f"config.json: {key!r} is {config[key]!r}, not a count")
        self.prepare()
        wanted = range(self.num_layers(config)) if layers is None else layers
        vocab_size, hidden_size = config["vocab_size"], config["hidden_size"]
        self.embedding = Embedding(seat, "model.embed_tokens", vocab_size, hidden_size)
        self.layers = [self.layer(index) for index in wanted]
        self.norm = self.rms_norm("model.norm")
        tied = "model.embed_tokens" if config.get("tie_word_embeddings") else None
        self.lm_head = LmHead(seat, "lm_head", vocab_size, hidden_size, tied)
        self.chain = Chain(
            mesh=seat.mesh,
            embedding=self.embedding.spec,
            reads=tuple(self._reads()),
            hidden_size=hidden_size,
        )

    @abstractmethod
    def layer(self, index: int) -> Layer:
        """The blocks of layer `index`."""

    def prepare(self) -> None:
        """What the layers share (a rope table, say); runs before any layer is built."""

    @classmethod
    def kv_heads(cls, config: HFConfig) -> tuple[int, ...]:
        """The numbers of KV heads that occur in the model."""
        heads = config["num_key_value_heads"]
        if type(heads) is not int or heads < 1:
            raise ConfigError(f"config.json: 'num_key_value_heads' is {heads!r}, not a count")
        return (heads,)

    @classmethod
    def num_layers(cls, config: HFConfig) -> int:
        """Decoder layers."""
        return int(config["num_hidden_layers"])

    @classmethod
    def sorts(cls, config: HFConfig) -> list[object]:
        """For each layer, a value that is equal for layers made of the same blocks."""
        return [None] * cls.num_layers(config)

    @classmethod
    def mesh(cls, config: HFConfig, parallelism: Parallelism) -> Mesh:
        """The mesh of this model under `parallelism`."""
        return Mesh.of(parallelism, cls.kv_heads(config))

    def rms_norm(self, name: str) -> RMSNorm:
        """A norm over the hidden size with the model's eps."""
        return RMSNorm(name, self.config["hidden_size"], self.config["rms_norm_eps"])

    def forward(self, batch: Batch, stream: ResidualStream) -> Tensor:
        """One step. Returns logits [selected rows of this rank's attention group, vocab]."""
        stream.write(self.embedding.name, self.embedding(batch.ids, batch))
        for layer in self.layers:
            h = stream.read(layer.attn_norm, layer.attn_norm.name)
            stream.write(layer.attn.name, layer.attn(h.to(layer.attn.name), batch))
            h = stream.read(layer.ffn_norm, layer.ffn_norm.name)
            for part in layer.ffn:
                stream.write(part.name, part(h.to(part.name), batch))
        h = stream.read(self.norm, self.norm.name, rows=batch.logits_rows)
        logits = self.lm_head(h.to(self.lm_head.name), batch)
        return self.lm_head.trim(stream.collect(self.lm_head.name, logits))

    def blocks(self) -> Iterator[Block]:
        """Every block, in the order of the forward pass."""
        yield self.embedding
        for layer in self.layers:
            yield layer.attn
            yield from layer.ffn
        yield self.lm_head

    def norms(self) -> Iterator[RMSNorm]:
        """The norms that read the stream, in order."""
        for layer in self.layers:
            yield layer.attn_norm
            yield layer.ffn_norm
        yield self.norm

    def leaves(self) -> Iterator[Leaf]:
        """Every leaf of the model."""
        yield from self.norms()
        for block in self.blocks():
            yield from block.leaves()

    def attention_cores(self) -> list[AttentionCore]:
        """The leaves that hold a KV cache."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, AttentionCore)]

    def weight_slices(self) -> Iterator[WeightSlice]:
        """What this rank keeps of the checkpoint. The leaves must be allocated."""
        for leaf in self.leaves():
            yield from leaf.slices()

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor of the checkpoint may be left unread."""
        tied = self.config.get("tie_word_embeddings") and tensor == "lm_head.weight"
        return bool(tied) or tensor.endswith("rotary_emb.inv_freq")

    def _reads(self) -> Iterator[ReadSpec]:
        for layer in self.layers:
            yield ReadSpec(name=layer.attn_norm.name, consumers=(layer.attn.spec,))
            specs = tuple(part.spec for part in layer.ffn)
            yield ReadSpec(name=layer.ffn_norm.name, consumers=specs)
        yield ReadSpec(name=self.norm.name, consumers=(self.lm_head.spec,), selects_rows=True)
