"""Sums over NVLink that are fused with what follows them: GPUs read each other's memory."""

import ctypes
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from isomoe.errors import CollectiveError

MAX_HIDDEN = 8192
_T = TypeVar("_T")
_DTYPES = (torch.bfloat16, torch.float32)
_MOST_BYTES = 1 << 30
_NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: there over NVLink, not over PCIe."""


class SymmetricSums:
    """One-shot sums over ranks, each one kernel with the addition to the residual and its norm.

    Every rank reads the addends of all others, so that many bytes arrive at each: this is for
    few rows, where latency rules. Sums are made in rank order in fp32, and rounded once, when the
    residual has been added, into the residual's dtype: all ranks get the same bits, which may
    differ from those of a sum that was rounded to the addends' dtype first.

    All calls must be made by all ranks of the group in the same order, on one stream or on
    streams that wait for one another. They may be captured in CUDA graphs, which may be replayed in
    any order, mixed with other calls, as long as it is the same on all ranks. A rank that stays
    away lets the others wait for ever, as with NCCL.

    The memory is torch's symmetric memory, without NVLink multicast.

    Args:
        group: its ranks, each with a GPU of its own on one host.
        device: this rank's GPU.
        max_bytes: of the addends of one call; twice as much is allocated.

    Raises:
        CollectiveError: if the memory is not what the kernel needs.
        RuntimeError: what torch says where GPUs cannot share memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, max_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        if not 0 < max_bytes <= _MOST_BYTES:
            raise CollectiveError(f"{max_bytes} bytes of addends: 1 to {_MOST_BYTES} can be held")
        # Else torch makes a multicast object for the memory, needed or not.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self.max_bytes = max_bytes
        self._device = device
        self._rank = group.rank()
        self._half = -(-max_bytes // 128) * 128
        # One for each multiprocessor, so that all of them run at once.
        programs = min(_gathered(group, _multiprocessors(device)))
        size = 2 * self._half + 8 * programs * group.size()
        self._calls = torch.zeros(programs, dtype=torch.int64, device=device)
        window = symmetric.empty(size, dtype=torch.uint8, device=device)
        window.zero_()
        torch.cuda.synchronize(device)  # Zero before the others know where it is.
        self._handle = symmetric.rendezvous(window, group.group_name)
        self._windows = tuple(
            self._handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())
        )
        if self._windows[self._rank].data_ptr() != window.data_ptr():
            raise CollectiveError("symmetric memory inside a larger block: not supported")
        self._window = window

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, device: torch.device, max_bytes: int
    ) -> "SymmetricSums | None":
        """As the constructor; None on all ranks where one has no such memory.

        That is without CUDA, without Triton, or where two ranks share a GPU, are on different
        hosts or are linked by no NVLink.

        Called by all ranks of the group. Torch counts a process's rendezvous, and the counts must
        agree within a group (pytorch issue 196082): all ranks of the world open as many before.
        """
        cards = _gathered(group, _card(device))
        within_reach = len(set(cards)) == len(cards) > 1 and None not in cards
        if not within_reach or not all(_gathered(group, _reaches_all(device, cards))):
            return None
        try:
            opened = cls(group, device, max_bytes)
        except RuntimeError:
            opened = None
        return opened if all(_gathered(group, opened is not None)) else None

    def takes(self, rows: int, hidden: int, dtype: torch.dtype) -> bool:
        """Whether addends [rows, hidden] can be summed; the same on all ranks.

        rows: of all ranks together where each gets its own alone.
        """
        return takes_rows(hidden, dtype) and rows * hidden * dtype.itemsize <= self.max_bytes

    def sum_add_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds the sum of all ranks' x to the residual, and norms that.

        Args:
            x: [rows, hidden], the same shape and dtype on all ranks; see `takes`.
            residual: [rows, hidden], bf16 or fp32; may be overwritten.
            weight: [hidden]; the scaled rows are rounded to its dtype before the product.
            eps: added to the mean square.
            dtype: of the normed rows; by default weight's.

        Returns:
            The new residual and the normed rows, [rows, hidden] each.

        Raises:
            CollectiveError: if shapes differ, or x is not taken.
        """
        return self._run(x, 0, x.shape[0], residual, weight, eps, dtype)

    def scatter_add_norm(
        self,
        x: Tensor,
        counts: Sequence[int],
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `sum_add_norm`, for this rank's rows of the sum alone.

        Args:
            x: [sum(counts), hidden].
            counts: rows of each rank in rank order; they may differ, and may be zero.
            residual: [counts[me], hidden].

        Returns:
            [counts[me], hidden] each.
        """
        if len(counts) != len(self._windows) or sum(counts) != x.shape[0]:
            raise CollectiveError(f"{x.shape[0]} rows of addends, but {list(counts)} are due")
        start = sum(counts[: self._rank])
        return self._run(x, start, counts[self._rank], residual, weight, eps, dtype)

    def _run(
        self,
        x: Tensor,
        start: int,
        count: int,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        rows, hidden = x.shape
        if not self.takes(rows, hidden, x.dtype):
            raise CollectiveError(f"addends [{rows}, {hidden}] of {x.dtype} are not taken")
        if residual.shape != (count, hidden) or weight.shape != (hidden,):
            raise CollectiveError(
                f"residual {list(residual.shape)} and weight {list(weight.shape)}, "
                f"but [{count}, {hidden}] and [{hidden}] are due"
            )
        dtype = dtype or weight.dtype
        if rows == 0:
            return residual, torch.empty(residual.shape, dtype=dtype, device=x.device)
        from isomoe.comm.symmetric_kernel import sum_add_norm

        residual = residual if residual.stride(1) == 1 else residual.contiguous()
        normed = sum_add_norm(
            x if x.stride(1) == 1 else x.contiguous(),
            start,
            residual,
            weight.contiguous(),
            eps,
            dtype,
            windows=self._windows,
            calls=self._calls,
            rank=self._rank,
            half=self._half,
        )
        return residual, normed


def takes_rows(hidden: int, dtype: torch.dtype) -> bool:
    """Whether addends of so many values a row can be summed, if they are few enough."""
    return dtype in _DTYPES and hidden % 8 == 0 and 0 < hidden <= MAX_HIDDEN


def _gathered(group: dist.ProcessGroup, mine: _T) -> list[_T]:
    """What all ranks of the group have, in rank order."""
    found: list[_T] = [mine] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _card(device: torch.device) -> str | None:
    """Names a GPU on all hosts; None for what the kernel does not run on."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _reaches_all(device: torch.device, cards: Sequence[str | None]) -> bool:
    """Whether this rank's GPU can raise flags in the memory of all others."""
    here = {_card(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    mine = here[_card(device)]
    others = [here.get(card) for card in cards if card != _card(device)]
    return all(other is not None and _has_atomics(mine, other) for other in others)


def _has_atomics(device: int, other: int) -> bool:
    driver = ctypes.CDLL("libcuda.so.1")
    handles = ctypes.c_int(), ctypes.c_int()
    for handle, ordinal in zip(handles, (device, other), strict=True):
        if driver.cuDeviceGet(ctypes.byref(handle), ordinal):
            return False
    value = ctypes.c_int()
    failed = driver.cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMICS, *handles)
    return not failed and value.value == 1
