"""What models are made of. Each block declares the placements it takes and gives."""

from isomoe.blocks.attention import (
    Attention,
    AttentionCore,
    AttentionNames,
    HeadGate,
    QueryScale,
)
from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block, Inner
from isomoe.blocks.cache import Memory
from isomoe.blocks.embedding import Embedding, LmHead, Lookup
from isomoe.blocks.expert_names import (
    PER_EXPERT,
    ExpertNames,
    PerExpert,
    Stacked,
    Transposed,
    runs,
)
from isomoe.blocks.experts import ExpertWeights, SparseMoe
from isomoe.blocks.ffn import Gated, GatedMLP, SigmoidGate
from isomoe.blocks.leaf import Fp8Part, Leaf, WeightSlice
from isomoe.blocks.lightning import GatedGroupNorm, LightningAttention, LightningCore
from isomoe.blocks.linear import Linear, Part, Router, RowLinear
from isomoe.blocks.mla import LatentAttention, LatentCore, LowRankQuery
from isomoe.blocks.norm import RMSNorm
from isomoe.blocks.ownership import Ownership
from isomoe.blocks.rope import Rope
from isomoe.blocks.wide_norm import SquareSums, WideNormAttention, WideNormCore
from isomoe.blocks.wire import Pack, Unpack
from isomoe.kernels import (
    CAUSAL,
    SWIGLU,
    ClampedSwiGlu,
    LinearScaling,
    Llama3,
    Routing,
    Scaling,
    Span,
    SwiGlu,
    Yarn,
)

__all__ = [
    "Fp8Part",
    "CAUSAL",
    "SWIGLU",
    "ClampedSwiGlu",
    "LinearScaling",
    "Llama3",
    "Routing",
    "Scaling",
    "Span",
    "SwiGlu",
    "Yarn",
    "PER_EXPERT",
    "Attention",
    "AttentionCore",
    "AttentionNames",
    "Batch",
    "Block",
    "Embedding",
    "ExpertNames",
    "ExpertWeights",
    "Gated",
    "GatedGroupNorm",
    "GatedMLP",
    "HeadGate",
    "Inner",
    "LatentAttention",
    "LatentCore",
    "Leaf",
    "LightningAttention",
    "LightningCore",
    "Linear",
    "LmHead",
    "Lookup",
    "LowRankQuery",
    "Memory",
    "Ownership",
    "Pack",
    "Part",
    "PerExpert",
    "QueryScale",
    "RMSNorm",
    "Rope",
    "Router",
    "RowLinear",
    "SigmoidGate",
    "SparseMoe",
    "SquareSums",
    "Stacked",
    "Transposed",
    "Unpack",
    "WeightSlice",
    "WideNormAttention",
    "WideNormCore",
    "runs",
]
