"""The kernels in Triton, for GPUs. The plain-torch modules beside this package are the twins."""

from isomoe.kernels.gpu.attention import attend
from isomoe.kernels.gpu.experts import fused_experts
from isomoe.kernels.gpu.ffn import silu_and_mul
from isomoe.kernels.gpu.linear import linear
from isomoe.kernels.gpu.norm import add_rms_norm, rms_norm
from isomoe.kernels.gpu.routing import route
from isomoe.kernels.gpu.sampling import chosen_logprobs, draw, greedy

__all__ = [
    "add_rms_norm",
    "attend",
    "chosen_logprobs",
    "draw",
    "fused_experts",
    "greedy",
    "linear",
    "rms_norm",
    "route",
    "silu_and_mul",
]
