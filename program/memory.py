"""Estimate memory, and save it where it would not be enough."""
from pathlib import Path

import torch

# Bytes of activations that a full-size UNet keeps for the backward pass, for each sample of 512×512 pixels,
# by the size of a number in bytes; without the model, and without gradient checkpointing
KEPT = {4: 2.0e9, 2: .9e9}
LARGE = 1e8    # parameters of a UNet; activations of a smaller one always fit
SHARE = .8     # of free memory that activations may take
COPY = 16      # bytes for each weight that is trained: a copy, its gradient, Adam's two moments


def free_memory(device):
    """Free bytes of a torch.device; 0 if that is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")  # Linux's
    lines = meminfo.read_text().splitlines() if device.type == "cpu" and meminfo.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def kept(model, samples, itemsize):
    """Bytes of activations that `samples` side by side keep for a full-size UNet's backward pass."""
    return samples * (model.unet.config.sample_size / 64) ** 2 * KEPT[itemsize]


def fitting(model, samples, most):
    """How many people, with `samples` each, fit into a step side by side without gradient checkpointing: from
    1 to `most`; with a small model always `most`."""
    parameters = [*model.unet.parameters()]
    if sum(p.numel() for p in parameters) < LARGE:
        return most
    free = free_memory(parameters[0].device)
    return min(most, max(1, int(SHARE * free / kept(model, samples, parameters[0].element_size()))))


def plan_memory(model, samples, whole=False):
    """Before a training with `samples` in each step: switch gradient checkpointing of the UNet on if
    activations would not fit, else off; it takes a third more time. whole: a float32 copy of all weights is
    trained. Returns the free and the needed memory, in words."""
    parameters = [p for part in (model.unet, model.text) for p in part.parameters()]
    count = sum(p.numel() for p in parameters)
    activations = kept(model, samples, 4 if whole else parameters[0].element_size())
    free, copies = free_memory(parameters[0].device), COPY * count if whole else 0
    model.unet.gradient_checkpointing = count > LARGE and activations > SHARE * (free - copies)
    words = f"{free / 1e9:.1f} GB of memory are free" if free else "how much memory is free is not known"
    if count > LARGE:
        words += f", a step needs about {(activations + copies) / 1e9:.1f} GB without the model"
    return words + ", so activations are computed twice" * model.unet.gradient_checkpointing
