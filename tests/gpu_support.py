"""What tests of the Triton kernels share."""

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Largest relative Frobenius error against float64, by dtype."""


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, in float64 on the CPU; NaN counts as infinite."""
    found, wanted = out.detach().double().cpu(), reference.detach().double().cpu()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float("inf") if error.isnan() else float(error)
