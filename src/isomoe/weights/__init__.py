"""Checkpoints: where they lie, and how a rank reads its part."""

from isomoe.weights.load import load_dummy, load_safetensors
from isomoe.weights.source import bundled_checkpoint, resolve

__all__ = ["bundled_checkpoint", "load_dummy", "load_safetensors", "resolve"]
