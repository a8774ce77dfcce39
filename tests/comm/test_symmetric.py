"""Sums fused with addition and norm: the kernel's protocol between processes that share memory.

Without GPUs it runs in Triton's interpreter, one process a rank. What only GPUs can show is checked
by `benchmarks/multigpu/fused.py`.
"""

import gpu_interpreter  # noqa: F401 - first of all

# isort: split
import faulthandler
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import triton
import triton.language as tl
from torch import Tensor

from gpu_support import BOUND, ON_GPU, relative_error
from isomoe.comm import symmetric_kernel
from isomoe.comm.symmetric import MAX_HIDDEN, SymmetricSums
from isomoe.errors import CollectiveError
from isomoe.kernels.norm import rms_norm

EPS = 1e-6
PROGRAMS = 3
CALLS: tuple[tuple[int, ...], ...] = (
    (5, 0, 2),
    (0, 1, 0),
    (0, 0, 0),
    (4, 4, 4),
    (0, 0, 1),
    (7, 6, 0),
    (1, 1, 1),
)
"""Rows of each rank, call by call; a smaller group takes the first ones."""


class SharedSums(SymmetricSums):
    """Over host memory that is there already."""

    def __init__(self, windows: Sequence[Tensor], rank: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._rank = rank
        self._half = max_bytes
        self._windows = tuple(windows)
        self._calls = torch.zeros(PROGRAMS, dtype=torch.int64)


def window(ranks: int, max_bytes: int) -> Tensor:
    size = 2 * max_bytes + 8 * PROGRAMS * ranks
    return torch.zeros(size, dtype=torch.uint8).share_memory_()


def twin(
    addends: Sequence[Tensor], residual: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the fused operation gives, from all ranks' addends."""
    total = addends[0].float()
    for addend in addends[1:]:
        total = total + addend.float()
    total = (total + residual.float()).to(residual.dtype)
    return total, rms_norm(total, weight, EPS).to(dtype)


def inputs(ranks: int, call: int, hidden: int, wire: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The addends of all ranks, and the residual of all rows."""
    seed = torch.Generator().manual_seed(call)
    rows = sum(CALLS[call][:ranks])
    addends = [torch.randn(rows, hidden, generator=seed).to(wire) for _ in range(ranks)]
    return addends, torch.randn(rows, hidden, generator=seed)


@triton.jit  # type: ignore[untyped-decorator]
def _acquire(at):  # type: ignore[no-untyped-def]
    """In place of the kernel's, which is assembly: the interpreter knows none."""
    return tl.load(at, volatile=True)


def rank_main(rank: int, windows: list[Tensor], hidden: int, max_bytes: int) -> None:
    """One rank: both forms with every split of the rows, in changing dtypes."""
    faulthandler.dump_traceback_later(100, exit=True)  # it may wait for ever
    symmetric_kernel._acquire = _acquire
    torch.set_num_threads(1)
    delays = random.Random(rank)
    sums = SharedSums(windows, rank, max_bytes)
    ranks = len(windows)
    for call, counts in enumerate(split[:ranks] for split in CALLS):
        wire, wide = (torch.bfloat16, torch.float32)[:: 1 if call % 2 else -1]
        weight = torch.randn(hidden, generator=torch.Generator().manual_seed(9)).to(wide)
        addends, residual = inputs(ranks, call, hidden, wire)
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for scatters in (True, False, True):
            sleep(delays.random() / 50)
            rows = mine if scatters else slice(None)
            wanted = twin([one[rows] for one in addends], residual[rows], weight, wire)
            got = (
                sums.scatter_add_norm(
                    addends[rank], counts, residual[rows].clone(), weight, EPS, wire
                )
                if scatters
                else sums.sum_add_norm(addends[rank], residual.clone(), weight, EPS, wire)
            )
            assert torch.equal(got[0], wanted[0]), (rank, call, scatters)
            assert got[1].dtype == wire
            assert got[1].shape == wanted[1].shape
            assert relative_error(got[1], wanted[1]) < BOUND[wire], (rank, call, scatters)
    sent = 3 * sum(any(split[:ranks]) for split in CALLS)
    assert sums._calls.tolist() == [sent] * PROGRAMS, "programs that disagree about the half"


@pytest.mark.skipif(ON_GPU, reason="the kernel is compiled for a GPU, and two are needed")
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_the_sum_and_its_norm(ranks: int) -> None:
    hidden, max_bytes = 24, 1536
    windows = [window(ranks, max_bytes) for _ in range(ranks)]
    torch.multiprocessing.spawn(rank_main, (windows, hidden, max_bytes), nprocs=ranks, join=True)
    halves = [one[:max_bytes].any() and one[max_bytes : 2 * max_bytes].any() for one in windows]
    assert all(halves), "calls do not take turns between the halves"


def test_what_is_taken_is_told_by_the_shape() -> None:
    sums = SharedSums([window(2, 4096)] * 2, 0, 4096)
    assert sums.takes(0, 64, torch.bfloat16)
    assert sums.takes(32, 64, torch.bfloat16)
    assert not sums.takes(33, 64, torch.bfloat16)
    assert sums.takes(16, 64, torch.float32)
    assert not sums.takes(17, 64, torch.float32)
    assert not sums.takes(1, 64, torch.float16)
    assert not sums.takes(1, 60, torch.bfloat16)
    assert not SharedSums([], 0, 1 << 20).takes(1, MAX_HIDDEN + 8, torch.bfloat16)
    assert not sums.takes(1, 0, torch.bfloat16)


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    sums = SharedSums([window(2, 4096)] * 2, 0, 4096)
    x, weight = torch.ones(4, 64), torch.ones(64)
    with pytest.raises(CollectiveError, match="are due"):
        sums.scatter_add_norm(x, [1, 2], x, weight, EPS)
    with pytest.raises(CollectiveError, match="are due"):
        sums.scatter_add_norm(x, [4], x, weight, EPS)
    with pytest.raises(CollectiveError, match=r"but \[1, 64\]"):
        sums.scatter_add_norm(x, [1, 3], x, weight, EPS)
    with pytest.raises(CollectiveError, match="not taken"):
        sums.sum_add_norm(x.double(), x, weight, EPS)
    assert not sums._calls.any()


def test_there_is_none_without_cuda() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        assert SymmetricSums.open(group, torch.device("cpu"), 4096) is None
    finally:
        dist.destroy_process_group()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from isomoe.comm.symmetric_kernel import _sum_add_norm as kernel

ranks, hidden = 4, 7168
constants = dict(RANK=1, WORLD=ranks, LANES=ranks, H=hidden, BLOCK_H=8192, ROWS=1)
pointers = dict(x_ptr="*bf16", residual_ptr="*bf16", weight_ptr="*bf16", out_ptr="*bf16")
strides = dict(x_stride="i32", residual_stride="i32", half="i32")
signature = dict(rows="i32", start="i32", stop="i32", eps="fp32", calls_ptr="*i64")
signature |= {**pointers, **strides, "windows": ("*u8",) * ranks}
signature |= {name: "constexpr" for name in constants}
place = kernel.arg_names.index
aligned = [(place(name),) for name in (*pointers, *strides)]
aligned += [(place("windows"), rank) for rank in range(ranks)]
source = ASTSource(
    fn=kernel,
    signature={name: signature[name] for name in kernel.arg_names},
    constexprs=constants,
    attrs={at: [["tt.divisibility", 16]] for at in aligned},
)
target = GPUTarget("cuda", 90, 32)
print(triton.compile(source, target=target, options={"num_warps": 16, "maxnreg": 128}).asm["ptx"])
"""


def test_the_kernel_compiles_for_hopper_with_the_order_of_memory_it_needs(tmp_path: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ptx = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=alone | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    places = [
        ptx.index(step)
        for step in (
            "st.global.v4",  # into its window,
            "bar.sync",  # all threads,
            "atom.global.sys.release.max",  # raises its flags,
            "ld.acquire.sys.global",  # waits for the others',
            "ld.global.cg.v4",  # and reads from their windows
        )
    ]
    assert places == sorted(places)
    assert "bar.sync" in ptx[places[3] : places[4]]
    assert ptx.count("ld.global.cg.v4") == ptx.count("ld.global.cg") == 2 * 4, "in wide pieces"
    assert ".nc." not in ptx
