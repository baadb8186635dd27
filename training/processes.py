"""Several processes that train together (torchrun): rank, world size, averages. A single process is a group of one."""

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The group of processes of a run, as seen by one of them."""

    rank: int = 0
    world_size: int = 1

    def broadcast(self, value: Any) -> Any:
        """Return the value of process 0."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one type by their means over all processes."""
        if self.world_size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            self.all_reduce(flat)
            parts = flat.div_(self.world_size).split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def join_processes(device: torch.device) -> Processes:
    """Join the processes that torchrun started, of which the first alone prints; without it, a group of one."""
    if not dist.is_torchelastic_launched():
        return Processes()
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # one machine: a restart would find the addresses of the dead
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
    return Processes(rank, world_size)


def end_with_parent(parent: int) -> None:
    """End this process when its parent, torchrun, has died: it would keep training unnoticed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
