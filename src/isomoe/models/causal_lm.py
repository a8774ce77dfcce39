"""What all families share: the loop over the layers, and the chain that the planner sees."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from isomoe.blocks import (
    Batch,
    Block,
    Embedding,
    GatedMLP,
    Leaf,
    LmHead,
    Memory,
    RMSNorm,
    SparseMoe,
    WeightSlice,
)
from isomoe.errors import ConfigError
from isomoe.layout import Chain, ExpertLocation, Mesh, Parallelism, ReadSpec, Seat
from isomoe.stream import Normed, ResidualStream

_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SIZES = (
    "head_dim", "intermediate_size", "kv_lora_rank", "moe_intermediate_size", "n_routed_experts",
    "num_experts", "num_local_experts", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "shared_expert_intermediate_size", "v_head_dim",
)  # fmt: skip
"""Counts, or absent; 0 is as good as absent."""

HFConfig = Mapping[str, Any]
"""A checkpoint's config.json."""


Supported = Mapping[str, tuple[Any, ...]]
"""Options of a config.json, and the values of each that a family does."""


@dataclass(frozen=True, slots=True)
class BlockDiffusion:
    """How a model generates that fills in a block of tokens at a time.

    Attributes:
        block_size: tokens of a block; a row sees its whole block, and every earlier one.
        mask_token_id: stands where a token is not yet known.
    """

    block_size: int
    mask_token_id: int


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
        location: which rank holds which expert; None: in order.

    Raises:
        ConfigError: if the seat's layout does not divide the model.
    """

    architectures: ClassVar[tuple[str, ...]]
    """Names in `architectures` of the config.json, older spellings included."""

    only: ClassVar[Supported] = {}
    """Options of the config.json of which only these values are supported; the first is what an
    absent one means."""

    layers_at: ClassVar[str] = "model.layers"
    embedding_at: ClassVar[str] = "model.embed_tokens"
    norm_at: ClassVar[str] = "model.norm"
    head_at: ClassVar[str] = "lm_head"
    """What the checkpoint calls these parts."""

    def __init__(
        self,
        config: HFConfig,
        seat: Seat,
        layers: Iterable[int] | None = None,
        location: ExpertLocation | None = None,
    ) -> None:
        self.config = config
        self.seat = seat
        self.location = location
        for key in _COUNTS:
            if type(config[key]) is not int or config[key] < 1:
                raise ConfigError(f"config.json: {key!r} is {config[key]!r}, not a count")
        for key in _SIZES:
            value = config.get(key)
            if value not in (None, 0) and (type(value) is not int or value < 1):
                raise ConfigError(f"config.json: {key!r} is {value!r}, not a count")
        self._check_options()
        self.prepare()
        wanted = range(self.num_layers(config)) if layers is None else layers
        vocab_size, hidden_size = config["vocab_size"], config["hidden_size"]
        self.embedding = Embedding(seat, self.embedding_at, vocab_size, hidden_size)
        self.layers = [self.layer(index) for index in wanted]
        self.norm = self.rms_norm(self.norm_at)
        tied = self.embedding_at if config.get("tie_word_embeddings") else None
        self.lm_head = LmHead(seat, self.head_at, vocab_size, hidden_size, tied)
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
    def is_sparse(cls, config: HFConfig, index: int) -> bool:
        """Whether layer `index` has routed experts."""
        return True

    @classmethod
    def has_sparse(cls, config: HFConfig) -> bool:
        """Whether any layer has routed experts."""
        return any(cls.is_sparse(config, index) for index in range(cls.num_layers(config)))

    @classmethod
    def has_dense(cls, config: HFConfig) -> bool:
        """Whether any layer has a dense FFN instead."""
        return not all(cls.is_sparse(config, index) for index in range(cls.num_layers(config)))

    @classmethod
    def attention_sort(cls, config: HFConfig, index: int) -> object:
        """A value that is equal for layers whose attention is made of the same blocks."""
        return None

    @classmethod
    def sorts(cls, config: HFConfig) -> list[object]:
        """For each layer, a value that is equal for layers made of the same blocks."""
        return [
            (cls.attention_sort(config, index), cls.is_sparse(config, index))
            for index in range(cls.num_layers(config))
        ]

    @classmethod
    def diffusion(cls, config: HFConfig) -> BlockDiffusion | None:
        """How it fills in blocks; None for a model that appends one token after the other."""
        return None

    @classmethod
    def mesh(cls, config: HFConfig, parallelism: Parallelism) -> Mesh:
        """The mesh of this model under `parallelism`."""
        return Mesh.of(parallelism, cls.kv_heads(config))

    @property
    def eps(self) -> float:
        """Of the model's norms."""
        return float(self.config["rms_norm_eps"])

    def rms_norm(self, name: str) -> RMSNorm:
        """A norm over the hidden size with the model's eps."""
        return RMSNorm(name, self.config["hidden_size"], self.eps)

    def routed_experts(self, at: str, **options: Any) -> SparseMoe:
        """`SparseMoe` on this seat."""
        if self.location is not None:
            index = int(at.removeprefix(f"{self.layers_at}.").partition(".")[0])
            options["location"] = self.location.for_layer(index, options["num_experts"])
        return SparseMoe(self.seat, at, hidden_size=self.config["hidden_size"], **options)

    def shared_expert(self, at: str, width: int, **options: Any) -> GatedMLP:
        """A shared expert: a second write to the stream, beside the routed ones.

        Its width is sharded over as many ranks as it divides by. Over all of them it takes rows
        where the routed experts do and its addend joins theirs, so that it moves nothing and no
        rank reads more of it than it must. Over fewer, the plan chooses which rows a rank takes.
        """
        return GatedMLP(
            self.seat,
            at,
            hidden_size=self.config["hidden_size"],
            intermediate_size=width,
            axes=self.seat.mesh.shared_expert(width),
            kind="shared expert",
            beside=True,
            **options,
        )

    def dense_ffn(self, at: str, width: int, **options: Any) -> GatedMLP:
        """The FFN of a layer without experts, its width over ffn_tp."""
        return GatedMLP(
            self.seat,
            at,
            hidden_size=self.config["hidden_size"],
            intermediate_size=width,
            axes=self.seat.mesh.ffn_tp,
            **options,
        )

    def forward(self, batch: Batch, stream: ResidualStream) -> Tensor:
        """One step. Returns logits [selected rows of this rank's attention group, vocab]."""
        stream.write(self.embedding.name, self.embedding(batch.ids, batch, stream))
        for layer in self.layers:
            h = stream.read(layer.attn_norm, layer.attn_norm.name)
            stream.write(layer.attn.name, layer.attn(h.to(layer.attn.name), batch, stream))
            h = stream.read(layer.ffn_norm, layer.ffn_norm.name)
            for part in layer.ffn:  # all before any is launched that others run beside
                h.to(part.name)
            for part in layer.ffn:
                stream.write(part.name, _beside(part, h, batch, stream))
        h = stream.read(self.norm, self.norm.name, rows=batch.logits_rows)
        return self.lm_head(h.to(self.lm_head.name), batch, stream)

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

    def keep_experts_in_fp8(self, block: int) -> str | None:
        """Keeps all routed experts in FP8, with a scale for each square block. Before `allocate`.

        Returns:
            What is in the way, on every rank; none are kept then.
        """
        routed = [one.experts for one in self.blocks() if isinstance(one, SparseMoe)]
        for experts in routed:
            if reason := experts.lacks_for_fp8(block):
                return reason
        for experts in routed:
            experts.block = block
        return None

    def memories(self) -> list[Memory]:
        """The leaves that hold a KV cache, or recurrent states."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Memory)]

    def weight_slices(self) -> Iterator[WeightSlice]:
        """What this rank keeps of the checkpoint. The leaves must be allocated."""
        for leaf in self.leaves():
            yield from leaf.slices()

    @classmethod
    def canonical(cls, tensor: str) -> str:
        """The name that the model asks for a tensor by, of that in the checkpoint."""
        return tensor

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor of the checkpoint may be left unread.

        Layers behind the last, or of their own, are for multi-token prediction, which is not built.
        """
        if tensor.startswith(("mtp.", "model.mtp.")) or tensor.endswith("rotary_emb.inv_freq"):
            return True
        tied = self.config.get("tie_word_embeddings") and tensor == f"{self.head_at}.weight"
        index = tensor.removeprefix(f"{self.layers_at}.").partition(".")[0]
        beyond = index.isdigit() and int(index) >= self.num_layers(self.config)
        return bool(tied) or beyond

    def _check_options(self) -> None:
        """Refuses what the family does not do.

        Raises:
            ConfigError: naming the option.
        """
        for key, values in {"hidden_act": ("silu",), **self.only}.items():
            found = self.config.get(key, values[0])
            if found not in values:
                known = " or ".join(repr(value) for value in values)
                raise ConfigError(f"config.json: {key} {found!r} is not supported; {known} is")

    def _reads(self) -> Iterator[ReadSpec]:
        for layer in self.layers:
            yield ReadSpec(name=layer.attn_norm.name, consumers=(layer.attn.spec,))
            specs = tuple(part.spec for part in layer.ffn)
            yield ReadSpec(name=layer.ffn_norm.name, consumers=specs)
        yield ReadSpec(name=self.norm.name, consumers=(self.lm_head.spec,), selects_rows=True)


def _beside(part: Block, h: Normed, batch: Batch, stream: ResidualStream) -> Tensor:
    """What a block makes of its rows, launched where the plan says."""
    with h.beside(part.name):
        return part(h.to(part.name), batch, stream)
