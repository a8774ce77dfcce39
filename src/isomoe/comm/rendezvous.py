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
    """Makes the process group of all ranks.

    Over NCCL where each rank has a GPU of its own, which it insists on; over Gloo elsewhere.
    """
    store = TCPStore("127.0.0.1", port, is_master=False)
    backend = "nccl" if has_own_gpu(device, world_size) else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def local_device(kind: str, rank: int) -> torch.device:
    """The device of a rank on this host; ranks share GPUs if there are too few. Selects it."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def has_own_gpu(device: torch.device, world_size: int) -> bool:
    """Whether every rank of this host has a GPU for itself."""
    return device.type == "cuda" and torch.cuda.device_count() >= world_size


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
