"""Small quantised checkpoints, and what they stand for.

The references are written from the formats' definitions, in numpy, a value at a time.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def fp8(*block: int) -> dict[str, Any]:
    """The `quantization_config` of FP8 with a scale for each block."""
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}


MXFP4 = {"quant_method": "mxfp4"}


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a sign, an exponent and a mantissa, all finite."""
    mantissa = (code % 2**mantissa_bits) / 2**mantissa_bits
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        return math.copysign(math.ldexp(mantissa, 1 - bias), sign)
    return sign * math.ldexp(1 + mantissa, exponent - bias)


E4M3 = [math.nan if code & 0x7F == 0x7F else minifloat(code, 4, 3) for code in range(256)]
E2M1 = [minifloat(code, 2, 1) for code in range(16)]


def rounded(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """fp32 as it is; to bf16, to the nearest, ties to even, on the bits."""
    if dtype is torch.float32:
        return torch.from_numpy(values)
    bits = values.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return torch.from_numpy(bits.astype(np.uint16)).view(torch.bfloat16)


def plain_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Of codes and scales, the values."""
    codes, factors = weight.view(torch.uint8).numpy(), scales.float().numpy()
    out = np.zeros(codes.shape, np.float32)
    for *stack, row, column in np.ndindex(*codes.shape):
        scale = factors[(*stack, row // block[0], column // block[1])]
        value = np.float32(E4M3[codes[(*stack, row, column)]])
        out[(*stack, row, column)] = np.float32(value * scale)
    return rounded(out, dtype)


def plain_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Of blocks and scales, the values."""
    experts, rows, groups, _ = blocks.shape
    out = np.zeros((experts, groups * 32, rows), np.float32)
    for e, row, group, byte in np.ndindex(*blocks.shape):
        code, scale = int(blocks[e, row, group, byte]), int(scales[e, row, group]) - 127
        at = 32 * group + 2 * byte
        out[e, at, row] = math.ldexp(E2M1[code % 16], scale)
        out[e, at + 1, row] = math.ldexp(E2M1[code // 16], scale)
    return rounded(out, dtype)


def quantise_fp8(folder: Path, block: tuple[int, int]) -> dict[str, Tensor]:
    """Rewrites the matrices of a checkpoint but head and embedding; what they stand for."""
    tensors = load_file(folder / "model.safetensors")
    meant, stored = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 2 and "layers" in name:
            codes = (weight * 100).to(torch.float8_e4m3fn)
            grid = [-(-size // part) for size, part in zip(weight.shape, block, strict=True)]
            scales = torch.rand(grid) * 0.01 + 0.005
            stored[name], stored[f"{name}_scale_inv"] = codes, scales
            grown = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            meant[name] = codes.float() * grown[: weight.shape[0], : weight.shape[1]]
    save_file(stored, folder / "model.safetensors")
    return meant


def change_config(folder: Path, **changes: object) -> None:
    """Sets keys of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save_mxfp4(folder: Path) -> dict[str, Tensor]:
    """A random gpt-oss whose experts are kept so; its tensors as they are meant, in fp32."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        layer_types=["sliding_attention"],
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).float().save_pretrained(folder)
    change_config(folder, quantization_config=MXFP4)
    meant = load_file(folder / "model.safetensors")
    stored = dict(meant)
    for name in [name for name in meant if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, rows = stored.pop(name).shape
        blocks = torch.randint(256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, blocks.shape[:-1], dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = plain_mxfp4(blocks, scales, torch.float32)
    save_file(stored, folder / "model.safetensors")
    return meant
