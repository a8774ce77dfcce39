"""What the device under test can do: its copy bandwidth and its rate of matrix products."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_GPU_COPY_BYTES = 2 << 30
_GPU_MATMUL_SIZE = 8192
_CPU_COPY_BYTES = 256 << 20
_CPU_MATMUL_SIZE = 1024
_CALLS = 20
"""Of one batch of calls on a GPU; a CPU runs fewer."""
_BATCHES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """What was measured on an otherwise idle device.

    Attributes:
        name: the card's, or the processor's.
        copy_bytes_per_s: of a large copy within the device's memory, bytes read and written.
        matmul_flops_per_s: of a large matrix product of random values.
        copy_bytes: what one copy read and wrote.
        matmul_size: rows and columns of the matrices.
        dtype: of the matrices.
    """

    name: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    copy_bytes: int
    matmul_size: int
    dtype: str

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time for work that moves and computes so much, at best overlapped."""
        return max(num_bytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {
            "name": self.name,
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "matmul_flops_per_s": self.matmul_flops_per_s,
            "copy_bytes": self.copy_bytes,
            "matmul_size": self.matmul_size,
            "matmul_dtype": self.dtype,
        }


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
            return next(names).strip()
    except (OSError, StopIteration):
        return "CPU"


@torch.inference_mode()
def measure_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measures the device; takes about a second, and gives its memory back.

    The medians of a few batches of calls, as sustained as the work that is held against them: a
    card that is cold or boosted for an instant would promise what it cannot keep.
    """
    copy_bytes, copy_seconds = _copy(device)
    size, matmul_seconds = _matmul(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return DeviceLimits(
        name=device_name(device),
        copy_bytes_per_s=copy_bytes / copy_seconds,
        matmul_flops_per_s=2 * size**3 / matmul_seconds,
        copy_bytes=copy_bytes,
        matmul_size=size,
        dtype=str(dtype).removeprefix("torch."),
    )


def _copy(device: torch.device) -> tuple[int, float]:
    """Bytes that a large copy reads and writes, and its seconds."""
    size = _CPU_COPY_BYTES
    if device.type == "cuda":
        size = min(_GPU_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size, call_seconds(lambda: target.copy_(source), device)


def _matmul(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """Rows of large square matrices, and the seconds of their product."""
    size = _GPU_MATMUL_SIZE if device.type == "cuda" else _CPU_MATMUL_SIZE
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    return size, call_seconds(lambda: torch.matmul(left, right, out=out), device)


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes when many follow one another: the median over batches of them."""
    if device.type != "cuda":
        call()
        return median(clocked(call) for _ in range(_BATCHES))
    for _ in range(_CALLS):
        call()
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    found: list[float] = []
    for _ in range(_BATCHES):
        begin.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / _CALLS)
    return median(found)


def clocked(call: Callable[[], object]) -> float:
    """Seconds of one call on a CPU."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
