"""Training in several processes, started by torchrun. In a single process these functions do nothing."""
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join(device=None):
    """Join the processes of torchrun, if it started this one. Returns the device, on GPUs one each."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    cuda = str(device).startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    # A process may wait long for another's part. If one is lost, torchrun ends all
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return device


def rank_and_size():
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this is the process that writes files and prints."""
    return rank_and_size()[0] == 0


def average(tensors):
    """Replace each of these float32 tensors by its mean over all processes."""
    if dist.is_initialized():
        together = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(together)
        parts = (together / dist.get_world_size()).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])


def greatest(number):
    """The greatest `number` of all processes; waits until all have called it."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(float(number), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def lost(error):
    """Whether an error means that another process has ended."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "closed by peer" in str(error) or "gloo" in str(error))
