"""Communicators: the same interface between processes and between simulated ranks."""

from isomoe.comm.base import Communicator
from isomoe.comm.local import LocalComm
from isomoe.comm.sim import SimWorld
from isomoe.comm.torch_comm import torch_communicator

__all__ = ["Communicator", "LocalComm", "SimWorld", "torch_communicator"]
