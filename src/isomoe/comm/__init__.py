"""Communicators: the same interface between processes and between simulated ranks."""

from isomoe.comm.base import AddNorm, Communicator
from isomoe.comm.bundle import join, parts_of, split
from isomoe.comm.expert_exchange import CommExchange, ExpertExchange, RoutedRows
from isomoe.comm.local import LocalComm
from isomoe.comm.sim import SimWorld
from isomoe.comm.torch_comm import torch_communicator

__all__ = [
    "AddNorm",
    "CommExchange",
    "Communicator",
    "ExpertExchange",
    "LocalComm",
    "RoutedRows",
    "SimWorld",
    "join",
    "parts_of",
    "split",
    "torch_communicator",
]
