"""Hidden states in the form in which they travel to routed experts.  T rows, H hidden size."""

from typing import Any

from torch import Tensor

from isomoe.blocks.leaf import Leaf
from isomoe.kernels import pack_fp8, pack_nvfp4, unpack_fp8, unpack_nvfp4
from isomoe.layout import WireFormat


class Pack(Leaf):
    """Into the wire format, row by row, so that no row depends on which others are there."""

    def __init__(self, form: WireFormat) -> None:
        self.form = form

    def forward(self, *args: Any) -> Any:
        """x: [T, H] -> codes and scales, each [T, ...]."""
        (x,) = args
        match self.form:
            case WireFormat.FP8:
                return pack_fp8(x)
            case WireFormat.NVFP4:
                return pack_nvfp4(x)
        return (x,)


class Unpack(Leaf):
    """Back from the wire format."""

    def __init__(self, form: WireFormat) -> None:
        self.form = form

    def forward(self, *args: Any) -> Tensor:
        """What `Pack` gave, and the dtype that is wanted -> [T, H]."""
        (first, *scales), dtype = args
        x: Tensor = first
        match self.form:
            case WireFormat.FP8:
                x = unpack_fp8(first, scales[0], dtype)
            case WireFormat.NVFP4:
                x = unpack_nvfp4(first, scales[0], scales[1], dtype)
        return x
