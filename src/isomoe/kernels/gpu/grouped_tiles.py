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


def default_gate_up(pairs: int, experts: int, widths: tuple[int, int] = (2, 2)) -> Config:
    """For bf16 and FP8. widths: bytes of a weight, and of a row's value."""
    each = pairs / experts
    match widths:
        case (1, 1):  # a product of FP8, scaled before it is added
            if each <= 10:
                return _tile(16, 64, 128, 1, 1, 4, 3)
            if each <= 48:
                return _tile(32 if each <= 24 else 64, 64, 128, 1, 0, 4, 3, 1)
            return _tile(64, 64, 128, 8, 0, 4, 4)
        case (1, _):  # of bf16, which weights become on the way: they are the first operand
            if each <= 10:
                return _tile(16, 64, 128, 1, 1, 4, 3, 1)
            if each <= 48:
                return _tile(32 if each <= 24 else 64, 128, 64, 1, 1, 4, 3, 1)
            return _tile(128, 128, 128, 8, 1, 8, 3, 1)
    if each <= 10:
        return _tile(16, 64, 128, 1, 0, 4, 3)
    if each <= 48:
        return _tile(32 if each <= 24 else 64, 64, 64, 1, 1, 4, 4)
    return _tile(128, 128, 64, 8, 0, 8, 3, 1)


def default_down(pairs: int, experts: int, widths: tuple[int, int] = (2, 2)) -> Config:
    """The same. A short product: two programs an SM hide each other's first and last steps."""
    each = pairs / experts
    if widths[0] == 1:
        if each <= 10:
            return _tile(16, 128, 128, 1, 0, 4, 3, 1)
        if each <= 48:
            return _tile(32 if each <= 24 else 64, 128, 128, 1, 1, 4, 3, 1)
        return _tile(128, 128, 64, 8, 1, 4, 3, 1)
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


def gate_up_candidates(pairs: int, experts: int, widths: tuple[int, int]) -> Iterator[Config]:
    """For the tuner. BLOCK_N: of the gate, and as much of the up projection.

    widths: bytes of a weight, and of a row's value.
    """
    yield from _candidates(pairs, experts, widths, widest=128, matrices=2)


def down_candidates(pairs: int, experts: int, widths: tuple[int, int]) -> Iterator[Config]:
    """For the tuner."""
    yield from _candidates(pairs, experts, widths, widest=256, matrices=1)


def _candidates(
    pairs: int, experts: int, widths: tuple[int, int], widest: int, matrices: int
) -> Iterator[Config]:
    each = pairs / experts
    weight, value = widths
    if each <= 48:
        fitting = [m for m in (16, 32, 64) if 0.75 * each <= m <= max(16.0, 3 * each)]
        for m, n, k in product(fitting, (64, 128), (64, 128)):
            stage = (matrices * n * weight + m * value) * k
            for stages, swap, tma in product((3, 4, 6), (0, 1), (0, 1)):
                # Two to four programs an SM, each with 32 KB or more under way.
                if stage * (stages - 1) >= 16_000 * weight and stage * stages <= 112_000:
                    yield _tile(m, n, k, 1, swap, 4, stages, tma)
        return
    if weight == 1:
        yield from _scaled_candidates(widths, matrices)
        return
    tiles = ((64, 128, 4), (64, 256, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for (m, n, warps), (k, stages), tma in product(tiles, ((64, 3), (64, 4), (32, 5)), (0, 1)):
        registers = m * n * matrices // (32 * warps)
        shared = (matrices * n + m) * k * 2 * stages
        if n <= widest and registers <= 128 and shared <= 225_000:
            yield _tile(m, n, k, 8, 0, warps, stages, tma)


def _scaled_candidates(widths: tuple[int, int], matrices: int) -> Iterator[Config]:
    weight, value = widths
    sizes = ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
    for (m, columns), warps, stages, tma in product(sizes, (4, 8), (3, 4), (0, 1)):
        n = columns // matrices
        # What is scaled before it is added is held beside the sum.
        registers = m * columns * (2 if value == 1 else 1) // (32 * warps)
        for k, swap in product((64, 128), (0, 1)):
            shared = (columns * weight + m * value) * k * stages
            if 32 <= registers <= 160 and 60_000 <= shared <= 225_000:
                yield _tile(m, n, k, 8, swap, warps, stages, tma)
