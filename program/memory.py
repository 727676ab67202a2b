"""How much memory there is, and what to do where it would not be enough."""
from pathlib import Path

import torch

# What a sample of 512×512 pixels holds between a full-size UNet's forward and backward pass, in bytes, by the
# size of a number: on top of the model, while nothing is computed twice
KEPT = {4: 2.0e9, 2: .9e9}
LARGE = 1e8    # parameters of a UNet that this is about; a smaller one's activations always fit
SHARE = .8     # of what is free that they may take
COPY = 16      # bytes for each parameter that is trained itself: a copy, its gradient, Adam's two moments


def free_memory(device):
    """Bytes that can still be had on a torch.device; 0 where nobody knows."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")  # Linux's
    lines = meminfo.read_text().splitlines() if device.type == "cpu" and meminfo.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def kept(model, samples, itemsize):
    """Bytes that so many samples side by side hold until a full-size UNet's backward pass."""
    return samples * (model.unet.config.sample_size / 64) ** 2 * KEPT[itemsize]


def fitting(model, samples, most):
    """How many people, with so many samples each, a step takes side by side without computing anything
    twice: from 1 to `most`, which a small model always takes."""
    parameters = [*model.unet.parameters()]
    if sum(p.numel() for p in parameters) < LARGE:
        return most
    free = free_memory(parameters[0].device)
    return min(most, max(1, int(SHARE * free / kept(model, samples, parameters[0].element_size()))))


def plan_memory(model, samples, whole=False):
    """Before a training whose step has so many samples side by side: have the UNet compute its activations
    twice (a third more time) where they would not fit, and only there. whole: a copy of the model's own
    weights is trained, in float32. Returns what is needed and free, in words."""
    parameters = [p for part in (model.unet, model.text) for p in part.parameters()]
    count = sum(p.numel() for p in parameters)
    activations = kept(model, samples, 4 if whole else parameters[0].element_size())
    free, copies = free_memory(parameters[0].device), COPY * count if whole else 0
    model.unet.gradient_checkpointing = count > LARGE and activations > SHARE * (free - copies)
    words = f"{free / 1e9:.1f} GB of memory are free" if free else "how much memory is free is not known"
    if count > LARGE:
        words += f", a step needs about {(activations + copies) / 1e9:.1f} GB beside the model"
    return words + ", so activations are computed twice" * model.unet.gradient_checkpointing
