"""Launches that overlap: a kernel starts while the one before it ends.

Programmatic dependent launch. A kernel that takes part says at once that the next may be launched,
and waits for the one before only when it first touches what others write. Before that it may
read weights, and what was written before the step: not what any kernel of the step writes,
since several kernels may be waiting in a row.
"""

from functools import cache

import torch

from isomoe.kernels.gpu.configs import Config


def overlapped() -> Config:
    """Arguments of a launch whose kernel has the parameter PDL, and keeps to the above."""
    if _supported():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _supported() -> bool:
    # The instructions came with Hopper.
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)
