"""Small tensors between host and device, without either waiting for the other."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` on `device`. A GPU takes it when it comes to it, from pinned memory."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """`x` on the host: complete once the device has done what it was told so far."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class Later(Generic[T]):
    """What can be built on the host once the device has done all that it was told until now.

    Args:
        build: called once, on the first `wait`.
        device: where the work is; a CPU has done it by now.
    """

    def __init__(self, build: Callable[[], T], device: torch.device) -> None:
        self._build: Callable[[], T] | None = build
        self._event: torch.cuda.Event | None = None
        self._value: T
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._build is None or self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> T:
        """The value."""
        if self._build is not None:
            if self._event is not None:
                self._event.synchronize()
            self._value = self._build()
            self._build = None
        return self._value
