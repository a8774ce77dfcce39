"""Rows packed before they travel between ranks: codes of 8 or 4 bits, and scales of short runs.

A row's codes and scales depend on no other row, so that neither the layout nor the batch can
change them. All arithmetic is fp32, rounded to nearest even; values must be finite.

T: rows   H: hidden size
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

FP8_RUN = 128
"""Columns that share a scale in FP8."""
NVFP4_RUN = 16
"""Columns that share a scale in NVFP4."""
E4M3_MAX = 448.0
E2M1_MAX = 6.0

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints between neighbours: on a tie the even code is the lower one, or the upper.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


def pack_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales each run of 128 columns of a row to the range of E4M3, and rounds.

    x: [T, H] fp32 or bf16, finite. Returns codes [T, H] float8_e4m3fn, x / scale, and scales
    [T, ceil(H / 128)] fp32: the run's largest magnitude / 448. The last run may be shorter. A
    run whose scale would be less than fp32's smallest normal number is zero, of scale 1.

    Source: DeepSeek-V3 technical report (2024), section 3.3, whose activations have such tiles.
    """
    rows, hidden = x.shape
    padded = pad(x.float().contiguous(), (0, -hidden % FP8_RUN))
    runs = padded.view(rows, padded.shape[1] // FP8_RUN, FP8_RUN)
    scales = scale_to(runs.abs().amax(-1), E4M3_MAX)
    codes = (runs / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :hidden].contiguous(), scales


def unpack_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack_fp8` made of rows, as [T, H] in dtype: code * scale in fp32, then rounded."""
    spread = scales.repeat_interleave(FP8_RUN, 1)[:, : codes.shape[1]]
    return (codes.float() * spread).to(dtype)


def pack_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales each row, then each of its runs of 16 columns, to the range of E2M1, and rounds.

    x: [T, H] fp32 or bf16, finite. Returns
    - codes [T, H / 2] uint8: x / (run scale * row scale) in E2M1, saturating at 6; a byte holds
      two, the even column in its low nibble;
    - run scales [T, H / 16] float8_e4m3fn: the run's largest magnitude / 6 / row scale. A run
      whose scale rounds to 0 is zero;
    - row scales [T, 1] fp32: the row's largest magnitude / (448 * 6). A row whose scale would be
      less than fp32's smallest normal number is zero, of scale 1.

    Raises:
        ValueError: H is no multiple of 16.

    Source: NVFP4 (NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference",
    2025), but for its fp32 scale: a tensor has one there, a row has its own here.
    """
    rows, hidden = x.shape
    runs = x.float().contiguous().view(rows, nvfp4_runs(hidden), NVFP4_RUN)
    largest = runs.abs().amax(-1)
    row_scales = scale_to(largest.amax(-1, keepdim=True), E4M3_MAX * E2M1_MAX)
    run_scales = (largest / E2M1_MAX / row_scales).to(torch.float8_e4m3fn)
    steps = run_scales.float() * row_scales
    scaled = (runs / steps.masked_fill(steps == 0, torch.inf).unsqueeze(-1)).flatten(1)
    sizes = torch.bucketize(scaled.abs(), scaled.new_tensor(_TIES_DOWN))
    sizes += torch.bucketize(scaled.abs(), scaled.new_tensor(_TIES_UP), right=True)
    codes = (sizes + 8 * scaled.signbit()).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, run_scales, row_scales


def unpack_nvfp4(
    codes: Tensor, run_scales: Tensor, row_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """What `pack_nvfp4` made of rows, as [T, H] in dtype.

    Code * (run scale * row scale) in fp32, then rounded.
    """
    table = row_scales.new_tensor((*_E2M1, *(-size for size in _E2M1)))
    values = table[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()]
    steps = run_scales.float() * row_scales
    return (values * steps.repeat_interleave(NVFP4_RUN, 1)).to(dtype)


def nvfp4_runs(hidden: int) -> int:
    """How many runs a row of NVFP4 has.

    Raises:
        ValueError: hidden is no multiple of 16.
    """
    runs, rest = divmod(hidden, NVFP4_RUN)
    if rest:
        raise ValueError(f"NVFP4 packs rows of a multiple of {NVFP4_RUN} columns, not {hidden}")
    return runs


def scale_to(largest: Tensor, most: float) -> Tensor:
    """What takes `largest` to `most`. A subnormal scale would be too coarse: there it is 1."""
    scale = largest / most
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)
