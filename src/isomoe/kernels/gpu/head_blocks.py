"""How the attention kernels hold a head's dims."""

import triton

from isomoe.kernels.attention import Heads
from isomoe.kernels.gpu.configs import Config

WIDE = 512
"""Values of a block from which a tile of results takes most of a program's registers."""


def head_blocks(heads: Heads) -> Config:
    """Compile-time numbers of `heads` for the kernels.

    A key is held as its first MAIN dims and its others, each in a block of a power of two; the
    others have none, BLOCK_R 0, where that saves nothing. A latent's first part is its value.
    """
    whole = _block(heads.qk_dim)
    main = heads.qk_dim
    if heads.latent:
        main = heads.v_dim
    elif heads.qk_dim > whole // 2 >= 16 and whole // 2 + _block(main - whole // 2) < whole:
        main = whole // 2
    span = heads.span
    return {
        "GROUP": heads.query // heads.kv,
        "KV_HEADS": heads.kv,
        "D": heads.qk_dim,
        "DV": heads.v_dim,
        "WIDTH": heads.token_width,
        "LATENT": int(heads.latent),
        "MAIN": main,
        "BLOCK_D": _block(main),
        "BLOCK_R": _block(heads.qk_dim - main) if main < heads.qk_dim else 0,
        "BLOCK_V": _block(heads.v_dim),
        "WINDOW": span.window or 0,
        "CHUNK": span.chunk or 0,
    }


def head_shape(heads: Heads) -> tuple[int, ...]:
    """By which tuned configurations are found."""
    shape = (heads.query, heads.kv, heads.qk_dim)
    plain = heads.qk_dim == heads.v_dim and not heads.latent
    return shape if plain else (*shape, heads.v_dim)


def _block(dims: int) -> int:
    return max(16, int(triton.next_power_of_2(dims)))
