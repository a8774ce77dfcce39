"""What models are made of. Each block declares the placements it takes and gives."""

from isomoe.blocks.attention import Attention, AttentionCore, Rope
from isomoe.blocks.batch import Batch
from isomoe.blocks.block import Block
from isomoe.blocks.embedding import Embedding, LmHead, Lookup
from isomoe.blocks.experts import ExpertWeights, SparseMoe
from isomoe.blocks.ffn import GatedMLP, SigmoidGate, SiluAndMul
from isomoe.blocks.leaf import Leaf, WeightSlice
from isomoe.blocks.linear import Linear, Part, Router, RowLinear
from isomoe.blocks.norm import RMSNorm

__all__ = [
    "Attention",
    "AttentionCore",
    "Batch",
    "Block",
    "Embedding",
    "ExpertWeights",
    "GatedMLP",
    "Leaf",
    "Linear",
    "LmHead",
    "Lookup",
    "Part",
    "RMSNorm",
    "Rope",
    "Router",
    "RowLinear",
    "SigmoidGate",
    "SiluAndMul",
    "SparseMoe",
    "WeightSlice",
]
