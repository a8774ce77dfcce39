"""Triton kernels run on the GPU if there is one, else on the CPU by Triton's interpreter."""

import gpu_interpreter  # noqa: F401
