"""Several processes that train as one, started by torchrun; in a process alone nothing here does anything."""
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join(device=None):
    """Join the processes that torchrun has started, if it has; this one's device, on GPUs one of its own."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    cuda = str(device).startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    # one may wait long for another's part; torchrun ends all where one is lost
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return device


def rank_and_size():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this is the process that writes and speaks for all."""
    return rank_and_size()[0] == 0


def average(tensors):
    """Put the mean over all processes in the place of each of these tensors (float32)."""
    if dist.is_initialized():
        together = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(together)
        parts = (together / dist.get_world_size()).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])


def greatest(number):
    """The greatest of the numbers that the processes give here, once all are here."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(float(number), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def lost(error):
    """Whether an error says that another process is gone."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "closed by peer" in str(error) or "gloo" in str(error))
