"""The kernels in Triton, for GPUs. The plain-torch modules beside this package are the twins."""

from isomoe.kernels.gpu.attention import attend, paged_attention
from isomoe.kernels.gpu.experts import fused_experts
from isomoe.kernels.gpu.ffn import silu_and_mul
from isomoe.kernels.gpu.lightning import lightning_attention
from isomoe.kernels.gpu.linear import linear
from isomoe.kernels.gpu.mla import latent_attention
from isomoe.kernels.gpu.norm import add_rms_norm, rms_norm
from isomoe.kernels.gpu.packed_rows import pack_fp8, pack_nvfp4, unpack_fp8, unpack_nvfp4
from isomoe.kernels.gpu.routing import route
from isomoe.kernels.gpu.sampling import chosen_logprobs, draw, greedy
from isomoe.kernels.gpu.write_kv import write_kv

__all__ = [
    "add_rms_norm",
    "attend",
    "chosen_logprobs",
    "draw",
    "fused_experts",
    "greedy",
    "latent_attention",
    "lightning_attention",
    "linear",
    "pack_fp8",
    "pack_nvfp4",
    "paged_attention",
    "rms_norm",
    "route",
    "silu_and_mul",
    "unpack_fp8",
    "unpack_nvfp4",
    "write_kv",
]
