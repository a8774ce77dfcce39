"""Tools of the oracle modules: random weights, what models answer, checkpoints."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from families.case import Oracle

OUTPUT = re.compile(r"\.(o_proj|out_proj|dense|down_proj|w2)\b|\.down_proj_bias$")
"""The projections whose results are added to the residual stream, in any family's spelling."""


def random_model(kind: Any, config: Any, spread: float = 0.15) -> Any:
    """A transformers model in fp32, computed the plain way, with random weights."""
    model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager")
    draw(model.state_dict(), seed=0, spread=spread)
    return model.float().eval()


def draw(tensors: Mapping[str, Tensor], seed: int, spread: float = 0.15) -> None:
    """Random values in place: norms around one, the rest around zero.

    What layers add and correction biases are small: else what all tokens have in common, or the
    bias alone, decides the routing, and most experts are never chosen. The embeddings stay small
    with them, so that the eps of the norms matters.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        norm = name.endswith("norm.weight")
        deviation = 0.2 if tensor.dim() == 1 else spread
        if OUTPUT.search(name):
            deviation /= 20
        elif name.endswith(("correction_bias", "expert_bias", "router_bias")):
            deviation /= 2
        tensor.normal_(1.0 if norm else 0.0, deviation, generator=generator)


def drawn(
    shapes: Mapping[str, tuple[int, ...]], seed: int, spread: float = 0.15
) -> dict[str, Tensor]:
    """New random tensors."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    draw(tensors, seed, spread)
    return tensors


def predictor(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Layer `index`, which predicts further tokens: shaped as the layer before, and its inputs."""
    last, at = f"model.layers.{index - 1}.", f"model.layers.{index}."
    shapes = {
        at + name.removeprefix(last): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    hidden = shapes[f"{at}input_layernorm.weight"][0]
    shapes[f"{at}eh_proj.weight"] = (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        shapes[f"{at}{norm}.weight"] = (hidden,)
    return drawn(shapes, seed=1)


def causal(model: nn.Module) -> Oracle:
    """What a transformers model answers for one sequence."""

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        answer: Tensor = model(ids.unsqueeze(0), use_cache=False).logits[0]
        return answer

    return logits


def block_causal(model: nn.Module, block: int) -> Oracle:
    """The same where a position sees all of its own block and of the blocks before it."""

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        number = torch.arange(len(ids)) // block
        mask = torch.zeros(1, 1, len(ids), len(ids))
        mask[0, 0, number.unsqueeze(1) < number] = torch.finfo(torch.float32).min
        answer: Tensor = model(ids.unsqueeze(0), attention_mask=mask, use_cache=False).logits[0]
        return answer

    return logits


def split_experts(
    tensors: Mapping[str, Tensor],
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> dict[str, Tensor]:
    """transformers' stacked experts as one matrix for each expert and projection."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        at, _, last = name.rpartition(".")
        if at.endswith(".experts") and last == "gate_up_proj":
            halves = [matrix.chunk(2) for matrix in tensor]
            split |= {f"{at}.{i}.{gate}.weight": half[0] for i, half in enumerate(halves)}
            split |= {f"{at}.{i}.{up}.weight": half[1] for i, half in enumerate(halves)}
        elif at.endswith(".experts") and last == "down_proj":
            split |= {f"{at}.{i}.{down}.weight": matrix for i, matrix in enumerate(tensor)}
        else:
            split[name] = tensor
    return split


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
