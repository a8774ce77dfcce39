"""Triton's interpreter in place of a GPU, where there is none; import before any kernel.

With three repairs, without which it is wrong (3.6 and 3.7): it cuts off floats that are cast to
bf16, where GPUs round them to the nearest; it multiplies the bits of bf16 matrices as if they were
integers; and it reads the bounds of a loop in a way that numpy 2.4 refuses.
"""

import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import triton.language as tl
from triton.runtime import interpreter

_before = (
    interpreter._convert_float,
    interpreter.InterpreterBuilder.create_dot,
    interpreter._patch_lang_tensor,
)


def _convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if source != tl.float32 or target != tl.bfloat16:
        return _before[0](values, source, target, rounding_mode)
    rounded = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    return _before[1](builder, _widened(a), _widened(b), *others)


def _widened(handle: Any) -> Any:
    """A bf16 matrix as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = handle.data.astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(data.view(np.float32), tl.float32)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _before[2](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


if not torch.cuda.is_available():
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._patch_lang_tensor = _patch_lang_tensor
