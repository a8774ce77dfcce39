"""Where the worker processes of one host meet."""

import socket

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore


class Rendezvous:
    """The meeting point: a key-value store on a free port of the loopback interface.

    Hosted by the parent of the workers, so that it leaves no file and goes when the parent goes.
    """

    def __init__(self) -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(socket.SOMAXCONN)
        self.port: int = listener.getsockname()[1]
        self._store = TCPStore(
            "127.0.0.1",
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def join(port: int, rank: int, world_size: int, device: torch.device) -> None:
    """Makes the process group of all ranks, over NCCL on CUDA and over Gloo elsewhere."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
