"""Matrix products of few rows, where reading the weight is the cost; cuBLAS does the others.

T: rows   N: outputs   K: inputs

*vector*, up to four rows: a multiply and a sum, a tile of whole weight rows a program, all of
its loads under way at once. *tile*, up to 64: the tensor cores take the weight from the
left, so that its rows, not the few of x, fill their 64, through a ring of shared memory.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from isomoe.kernels.gpu.configs import Config, find
from isomoe.kernels.gpu.launch import overlapped

LINEAR = "linear"

CUBLAS, VECTOR, TILE = 0, 1, 2
"""Values of a configuration's PATH."""
VECTOR_ROWS = 4
TILE_ROWS = 64
_LONGEST = 16384
"""A weight row longer than this does not fit a program's registers at once."""
_COUNTERS = 4096
_FEW_OUTPUTS = 1024
"""A product of so few fills no processors; cuBLAS takes its time all the same."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, accumulated in fp32, in x's dtype. x: [T, K]; weight: [N, K]."""
    rows = x.shape[0]
    if rows > TILE_ROWS or weight.stride(1) != 1:
        return F.linear(x, weight)
    outputs, inputs = weight.shape
    default = _default(rows, outputs, inputs, x.dtype.itemsize)
    config = find(LINEAR, (outputs, inputs), rows, default)
    if not _fits(config, rows, inputs, x.dtype.itemsize):
        config = default  # tuned for another number of rows, or another dtype
    if rows == 0 or config["PATH"] == CUBLAS:
        return F.linear(x, weight)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if config["PATH"] == VECTOR:
        _launch_vector(x, weight, out, config)
    else:
        _launch_tile(x, weight, out, config)
    return out


def _fits(config: Config, rows: int, inputs: int, itemsize: int) -> bool:
    if config["PATH"] == VECTOR:
        return rows == 1 or (rows <= VECTOR_ROWS and config["BLOCK_K"] >= inputs)
    return config["PATH"] == CUBLAS or itemsize == 2


def _launch_vector(x: Tensor, weight: Tensor, out: Tensor, config: Config) -> None:
    rows, inputs = x.shape
    outputs = out.shape[1]
    _vector[(triton.cdiv(outputs, config["BLOCK_N"]),)](
        x,
        weight,
        out,
        x.stride(0),
        weight.stride(0),
        N=outputs,
        K=inputs,
        ROWS=rows,
        **config,
        **overlapped(),
    )


def _launch_tile(x: Tensor, weight: Tensor, out: Tensor, config: Config) -> None:
    rows, inputs = x.shape
    outputs = out.shape[1]
    tiles = triton.cdiv(outputs, config["BLOCK_N"])
    splits = config["SPLITS"] if tiles <= _COUNTERS else 1
    partial, arrived = out, out
    if splits > 1:
        partial = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
        arrived = counters(x.device, _COUNTERS)
    _tile[(tiles, splits)](
        x,
        weight,
        out,
        partial,
        arrived,
        rows,
        x.stride(0),
        weight.stride(0),
        N=outputs,
        K=inputs,
        BLOCK_T=max(16, triton.next_power_of_2(rows)),
        **{**config, "SPLITS": splits},
        **overlapped(),
    )


@cache
def counters(device: torch.device, count: int) -> Tensor:
    """int32 zeros that programs of one launch count their arrivals in, and leave zero.

    They are a device's, not a stream's: launches that use them must not run at the same time.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run the step once before it is captured: its counters must be zero")
    return torch.zeros(count, dtype=torch.int32, device=device)


@cache
def _processors() -> int:
    """Streaming multiprocessors of this process's GPU; an H100's, where there is none."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@cache
def _default(rows: int, outputs: int, inputs: int, itemsize: int) -> Config:
    if rows <= VECTOR_ROWS and inputs <= _LONGEST:
        return _vector_default(outputs, inputs, itemsize)
    if rows > TILE_ROWS or itemsize > 2 or (rows > 16 and outputs > _FEW_OUTPUTS):
        return {"PATH": CUBLAS}
    return _tile_default(outputs, inputs)


def _vector_default(outputs: int, inputs: int, itemsize: int) -> Config:
    block_k = max(32, triton.next_power_of_2(inputs))
    # A tile of 32 KB, but at least a program for every processor.
    block_n = max(1, 32768 // (block_k * itemsize))
    while block_n > 1 and triton.cdiv(outputs, block_n) < 3 * _processors():
        block_n //= 2
    return {
        "PATH": VECTOR,
        "BLOCK_N": min(16, block_n),
        "BLOCK_K": block_k,
        "STAGES": 1,
        "AHEAD": 1,
        # Eight 16-byte loads a thread.
        "num_warps": min(8, max(1, block_n * block_k * itemsize // 4096)),
    }


def _tile_default(outputs: int, inputs: int) -> Config:
    block_n = 64
    block_k = min(128, max(16, triton.next_power_of_2(inputs)))
    steps = triton.cdiv(inputs, block_k)
    most = 2 * _processors() // triton.cdiv(outputs, block_n)
    splits = max(count for count in range(1, max(1, most) + 1) if steps % count == 0)
    return _tile_config(block_n, block_k, splits, 4, 4)


def _tile_config(block_n: int, block_k: int, splits: int, stages: int, warps: int) -> Config:
    return {
        "PATH": TILE,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLITS": splits,
        "STAGES": stages,
        "num_warps": warps,
    }


def candidates(rows: int, outputs: int, inputs: int, itemsize: int = 2) -> Iterator[Config]:
    """For the tuner: cuBLAS, and both kernels where they apply."""
    yield {"PATH": CUBLAS}
    if rows <= VECTOR_ROWS and inputs <= _LONGEST:
        yield from _vector_candidates(rows, outputs, inputs, itemsize)
    if 1 < rows <= TILE_ROWS:
        yield from _tile_candidates(rows, outputs, inputs)


def _vector_candidates(rows: int, outputs: int, inputs: int, itemsize: int) -> Iterator[Config]:
    whole = max(32, triton.next_power_of_2(inputs))
    for block_k, stages in ((whole, 1), (1024, 3), (512, 4)):
        if block_k < whole and rows > 1:
            continue  # more than one row is summed over the whole of K
        for block_n in (1, 2, 4, 8, 16):
            for warps in (1, 2, 4, 8, 16):
                loads = block_n * block_k * itemsize // (16 * 32 * warps)
                if block_n <= outputs and 1 <= loads <= 16 and loads * stages >= 4:
                    yield {
                        "PATH": VECTOR,
                        "BLOCK_N": block_n,
                        "BLOCK_K": block_k,
                        "STAGES": stages,
                        "AHEAD": int(stages == 1),
                        "num_warps": warps,
                    }


def _tile_candidates(rows: int, outputs: int, inputs: int) -> Iterator[Config]:
    for block_n, warps in ((16, 1), (32, 2), (64, 4), (128, 8)):
        tiles = triton.cdiv(outputs, block_n)
        for block_k in (128, 256):
            steps = triton.cdiv(inputs, block_k)
            for splits in (1, 2, 4, 8, 16):
                programs = tiles * splits
                if steps % splits or (splits > 1 and programs > 4 * _processors()):
                    continue
                if programs < _processors() // 2 and splits < min(steps, 16):
                    continue  # too few to read at full speed, and more are possible
                bytes_a_stage = (block_n + max(16, rows)) * block_k * 2
                stages = min(steps // splits + 1, 8, max(3, 65536 // bytes_a_stage))
                if stages * bytes_a_stage <= 200 * 1024:
                    yield _tile_config(block_n, block_k, splits, stages, warps)


@triton.jit  # type: ignore[untyped-decorator]
def _vector(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    weight_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [ROWS, BLOCK_N]. AHEAD: all loads start before any value is used.

    PDL (with launch_pdl): reads its weights while the kernel ahead is still running.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    output = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last output, the last again: a load without a mask.
    output_read = output if N % BLOCK_N == 0 else tl.minimum(output, N - 1)
    weight_rows = weight_ptr + (output_read * weight_stride)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK_K)
    if K <= BLOCK_K:
        within = at < K
        # The weights first, which take longest: what x waits for must not hold them up.
        if K == BLOCK_K:
            weights = tl.load(weight_rows + at[None, :], eviction_policy="evict_first")
        else:
            weights = tl.load(
                weight_rows + at[None, :],
                mask=within[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        if PDL:
            tl.extra.cuda.gdc_wait()
        elif AHEAD:
            # The assembler puts loads off to save registers, but not beyond a barrier.
            tl.debug_barrier()
        for row in tl.static_range(ROWS):
            x = tl.load(x_ptr + row * x_stride + at, mask=within, other=0.0).to(tl.float32)
            sums = tl.sum(weights.to(tl.float32) * x[None, :], axis=1)
            tl.store(out_ptr + row * N + output, sums.to(dtype), mask=output < N)
    else:
        tl.static_assert(ROWS == 1, "several rows need BLOCK_K >= K")
        if PDL:
            tl.extra.cuda.gdc_wait()
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if K % BLOCK_K == 0:
                x = tl.load(x_ptr + start + at)
                weights = tl.load(
                    weight_rows + (start + at)[None, :], eviction_policy="evict_first"
                )
            else:
                within = start + at < K
                x = tl.load(x_ptr + start + at, mask=within, other=0.0)
                weights = tl.load(
                    weight_rows + (start + at)[None, :],
                    mask=within[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                )
            total += weights.to(tl.float32) * x.to(tl.float32)[None, :]
        sums = tl.sum(total, axis=1)
        tl.store(out_ptr + output, sums.to(dtype), mask=output < N)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    rows,
    x_stride,
    weight_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [T, BLOCK_N], by a share of K; the last of a tile's programs adds up the shares."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    output = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    output_read = output if N % BLOCK_N == 0 else tl.minimum(output, N - 1)
    row = tl.arange(0, BLOCK_T)
    here = row < rows
    weight_rows = weight_ptr + (output_read * weight_stride)[:, None]
    x_rows = x_ptr + (row * x_stride)[None, :]
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for step in tl.range(split * SHARE, tl.minimum((split + 1) * SHARE, STEPS), num_stages=STAGES):
        at = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            weights = tl.load(weight_rows + at[None, :], eviction_policy="evict_first")
            x = tl.load(x_rows + at[:, None], mask=here[None, :], other=0.0)
        else:
            within = at < K
            weights = tl.load(
                weight_rows + at[None, :],
                mask=within[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_rows + at[:, None], mask=here[None, :] & within[:, None], other=0.0)
        total = tl.dot(weights, x, total, input_precision="ieee")

    place = row.to(tl.int64)[None, :] * N + output[:, None]
    inside = here[None, :] & (output < N)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if SPLITS == 1:
        tl.store(out_ptr + place, total.to(dtype), mask=inside)
    else:
        size = rows.to(tl.int64) * N
        tl.store(partial_ptr + split * size + place, total, mask=inside, cache_modifier=".cg")
        # Every thread's share must be out before one of them counts the program.
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for share in tl.static_range(SPLITS):
                total += tl.load(
                    partial_ptr + share * size + place,
                    mask=inside,
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(out_ptr + place, total.to(dtype), mask=inside)
            tl.store(arrived_ptr + tile, 0)
