"""Training on several GPUs: torchrun starts a process for each, and each has a number, its rank."""

import gc
import os
import sys
from contextlib import nullcontext

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """Which process this is, and how many there are. Rank 0 speaks and writes."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on

    def connect(self, device):
        """Meets the other processes, and silences all but rank 0."""
        if self.count == 1:
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")

    def wrap(self, model):
        """The model, its gradients averaged over all ranks in each backward pass."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def no_sync(self, model):
        """A context in which the backward pass leaves the gradients on their rank."""
        return nullcontext() if self.count == 1 else model.no_sync()

    def any(self, flag, device):
        """Whether the flag is true on any rank."""
        return self.total({"flag": float(bool(flag))}, device)["flag"] > 0

    def total(self, values, device):
        """{name: number} -> {name: its sum over all ranks}."""
        if self.count == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def leave(self):
        """Parts from the other processes.

        The wrapped model has to be collected first. It holds on to the group, whose threads would
        otherwise still run when the process ends, and now and then abort it.
        """
        if self.count > 1:
            gc.collect()
            dist.destroy_process_group()
