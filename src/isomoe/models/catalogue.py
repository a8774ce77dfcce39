"""What each family is made of, what was measured of it, and what is proven."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from isomoe.blocks import (
    Attention,
    Block,
    LatentAttention,
    LightningAttention,
    SparseMoe,
    WideNormAttention,
)
from isomoe.layout import Parallelism
from isomoe.models.causal_lm import CausalLM
from isomoe.models.registry import FAMILIES, build
from isomoe.models.shipped import shipped

MEASURED = Path(str(resources.files("isomoe") / "models" / "measured.json"))
"""What `make models` found, by a family's first architecture."""

Words = tuple[str, ...]
"""What something is, then its features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One class of the registry.

    Attributes:
        family: its module in `isomoe.models`.
        attention, router: of the configs that ship; "some" are features of some layers or configs.
        configs: their names.
        oracles: what its answers were compared with.
        delta: the largest difference of a logit, relative to the largest logit, in fp32.
        layouts_measured: in how many it was sought, all cases together.
        layouts_proven: for all configs together, of up to `max_ranks` ranks.
    """

    family: str
    architectures: tuple[str, ...]
    attention: str
    router: str
    configs: tuple[str, ...]
    oracles: tuple[str, ...] = ()
    delta: float | None = None
    layouts_measured: int | None = None
    layouts_proven: int | None = None
    max_ranks: int | None = None


def read_measured() -> dict[str, Any]:
    """What `make models` wrote; empty before it has run."""
    if not MEASURED.is_file():
        return {}
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def rows(measured: Mapping[str, Any]) -> list[Row]:
    """A row for each class of the registry, by family."""
    found = []
    for family in sorted(FAMILIES, key=family_name):
        configs = shipped(family)
        models = [build(config, Parallelism()) for config in configs.values()]
        layers = [layer for model in models for layer in model.layers]
        ffns = [block for layer in layers for block in layer.ffn]
        values = measured.get(family.architectures[0], {})
        found.append(
            Row(
                family=family_name(family),
                architectures=family.architectures,
                attention=_joined(_attention(layer.attn) for layer in layers),
                router=_joined(_router(block) for block in ffns if isinstance(block, SparseMoe)),
                configs=tuple(configs),
                oracles=tuple(values.get("oracles", ())),
                delta=values.get("delta"),
                layouts_measured=values.get("layouts_measured"),
                layouts_proven=values.get("layouts_proven"),
                max_ranks=values.get("max_ranks"),
            )
        )
    return found


def family_name(family: type[CausalLM]) -> str:
    """Its module, such as `mixtral`."""
    return family.__module__.rpartition(".")[2]


def _joined(kinds: Iterable[Words]) -> str:
    """The features that all have, then those that some have."""
    distinct = list(dict.fromkeys(kinds))
    names = " + ".join(dict.fromkeys(name for name, *_ in distinct))
    features = list(dict.fromkeys(word for _, *words in distinct for word in words))
    common = [word for word in features if all(word in words for words in distinct)]
    some = [word for word in features if word not in common]
    return ", ".join([names, *common]) + (f"; some: {', '.join(some)}" if some else "")


def _attention(block: Block) -> Words:
    """Of a block on one rank."""
    match block:
        case LatentAttention():
            return ("MLA",)
        case LightningAttention(core=core):
            partial = core.rope is not None and core.rope.dim < core.head_dim
            return _with("lightning", {"QK norm": core.q_norm is not None, "partial rope": partial})
        case Attention():
            return _grouped(block)
        case _:
            return (type(block).__name__,)


def _grouped(block: Attention) -> Words:
    core = block.core
    heads, rope = core.heads, core.rope
    features = {
        "QK norm over all heads": isinstance(block, WideNormAttention),
        "QK norm": core.q_norm is not None,
        "QK norm behind rope": core.unit_norm is not None,
        "bias": block.qkv.has_bias,
        "no rope": rope is None,
        "partial rope": rope is not None and rope.dim < heads.qk_dim,
        "sliding window": heads.span.window is not None,
        "chunks": heads.span.chunk is not None,
        "block-causal": heads.span.block is not None,
        "sinks": core.sinks_from is not None,
        "head gates": block.gate is not None,
    }
    return _with("GQA" if heads.kv < heads.query else "MHA", features)


def _router(block: SparseMoe) -> Words:
    routing = block.routing
    features = {
        "correction bias": block.router.correction_from is not None,
        "bias": block.router.has_bias,
        "groups": routing.num_groups > 1,
        "renormalised": routing.renormalize,
        "scales the input": block.experts.form.scales_input,
    }
    return _with(routing.scoring, features)


def _with(name: str, features: Mapping[str, bool]) -> Words:
    return (name, *(word for word, has in features.items() if has))
