"""Checkpoints: where they lie, and how a rank reads its part."""

from isomoe.weights.load import LoadReport, load_dummy, load_safetensors
from isomoe.weights.quantization import Fp8, Quantization, read_quantization
from isomoe.weights.source import bundled_checkpoint, resolve

__all__ = [
    "Fp8",
    "LoadReport",
    "Quantization",
    "bundled_checkpoint",
    "load_dummy",
    "load_safetensors",
    "read_quantization",
    "resolve",
]
