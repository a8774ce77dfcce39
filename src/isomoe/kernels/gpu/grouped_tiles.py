"""Tiles of the grouped matrix products: defaults, and what is worth trying on a card.

M: pairs of an expert   N: the weights' rows   K: summed
"""

from collections.abc import Iterator
from itertools import product

from isomoe.kernels.gpu.configs import Config

FP32: Config = {
    "BLOCK_M": 16,
    "BLOCK_N": 32,
    "BLOCK_K": 32,
    "GROUP_M": 1,
    "SWAP": 0,
    "TMA": 0,
    "num_warps": 4,
    "num_stages": 2,
}
"""fp32 products run on the plain units: small tiles."""


def default_gate_up(pairs: int, experts: int) -> Config:
    """For bf16."""
    each = pairs / experts
    if each <= 10:
        return _tile(16, 64, 128, 1, 0, 4, 3)
    if each <= 48:
        return _tile(32 if each <= 24 else 64, 64, 64, 1, 1, 4, 4)
    return _tile(128, 128, 64, 8, 0, 8, 3, 1)


def default_down(pairs: int, experts: int) -> Config:
    """For bf16. A short product: two programs an SM hide each other's first and last steps."""
    each = pairs / experts
    if each <= 10:
        return _tile(16, 128, 128, 1, 0, 4, 3)
    if each <= 48:
        return _tile(32 if each <= 24 else 64, 128, 64, 1, 1, 4, 4)
    return _tile(128, 128, 64, 8, 0, 4, 3, 1)


def _tile(
    m: int, n: int, k: int, group: int, swap: int, warps: int, stages: int, tma: int = 0
) -> Config:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": group,
        "SWAP": swap,
        "TMA": tma,
        "num_warps": warps,
        "num_stages": stages,
    }


def gate_up_candidates(pairs: int, experts: int) -> Iterator[Config]:
    """For the tuner, in bf16. BLOCK_N: of the gate, and as much of the up projection."""
    yield from _candidates(pairs, experts, widest=128, matrices=2)


def down_candidates(pairs: int, experts: int) -> Iterator[Config]:
    """For the tuner, in bf16. BLOCK_M is cut to that of the alignment, which gate_up's sets."""
    yield from _candidates(pairs, experts, widest=256, matrices=1)


def _candidates(pairs: int, experts: int, widest: int, matrices: int) -> Iterator[Config]:
    each = pairs / experts
    if each <= 48:
        fitting = [m for m in (16, 32, 64) if 0.75 * each <= m <= max(16.0, 3 * each)]
        for m, n, k in product(fitting, (64, 128), (64, 128)):
            stage = (matrices * n + m) * k * 2
            for stages, swap, tma in product((3, 4, 6), (0, 1), (0, 1)):
                # Two to four programs an SM, each with 32 KB or more under way.
                if stage * (stages - 1) >= 32_000 and stage * stages <= 112_000:
                    yield _tile(m, n, k, 1, swap, 4, stages, tma)
        return
    tiles = ((64, 128, 4), (64, 256, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for (m, n, warps), (k, stages), tma in product(tiles, ((64, 3), (64, 4), (32, 5)), (0, 1)):
        registers = m * n * matrices // (32 * warps)
        shared = (matrices * n + m) * k * 2 * stages
        if n <= widest and registers <= 128 and shared <= 225_000:
            yield _tile(m, n, k, 8, 0, warps, stages, tma)
