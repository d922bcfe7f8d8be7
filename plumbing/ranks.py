"""Work on several GPUs: torchrun starts a process for each, and each has a number, its rank."""

import gc
import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


A_DAY = timedelta(days=1)


class Ranks:
    """Which process this is, and how many there are. Rank 0 speaks and writes."""

    def __init__(self, device):
        """device: the flag --device. ValueError if the processes cannot have a GPU each."""
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")
        on_gpus = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
        if self.count == 1 or not on_gpus:
            return

        if device not in (None, "cuda"):
            raise ValueError(f"--device {device}: all processes of torchrun would use this GPU; "
                             "without the flag each takes its own")
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("RANK and WORLD_SIZE are set, but not LOCAL_RANK: start several "
                             "processes with torchrun")
        number = int(os.environ["LOCAL_RANK"])  # of the process on this machine
        gpus = torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(f"torchrun has started more processes than there are GPUs, {gpus}")
        torch.cuda.set_device(number)  # what "cuda" means from here on

    def connect(self, device):
        """Meets the other processes.

        A process may wait for another one as long as it takes, which can be hours where each has
        many rows to explain. If one ends, torchrun ends the others.
        """
        if self.count == 1:
            return
        if device.type == "cuda":
            own = torch.device("cuda", torch.cuda.current_device())  # NCCL asks for its number
            dist.init_process_group("nccl", device_id=own, timeout=A_DAY)
        else:
            dist.init_process_group("gloo", timeout=A_DAY)

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

    def gather(self, value):
        """The value of each rank, as a list in their order: all ranks get the same one."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo's and NCCL's; the first line says what they saw
            raise ValueError("another process has ended, see its error "
                             f"({str(error).splitlines()[0]})") from None
        return values

    def share(self, work, units=()):
        """Yields work(unit) for each unit of rank 0, in order. All ranks work, a unit at a time.

        The other ranks pass no units, but must loop over all results as well.
        """
        units = self.gather(units)[0]
        for first in range(0, len(units), self.count):
            mine = units[first + self.rank : first + self.rank + 1]  # none, at the end perhaps
            for results in self.gather([work(unit) for unit in mine]):
                yield from results

    def leave(self):
        """Parts from the other processes.

        The wrapped model has to be collected first. It holds on to the group, whose threads would
        otherwise still run when the process ends, and now and then abort it.
        """
        if self.count > 1:
            gc.collect()
            dist.destroy_process_group()
