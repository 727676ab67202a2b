"""Weights from a rule instead of a file, so that our modules and the reference library's can be given the
same ones."""
import zlib

import torch


def fill(module, seed=0):
    """Overwrite every parameter of `module`, in place, with numbers that depend on its name, its shape and
    `seed` alone.

    Matrices and convolutions are N(0, 1/fan_in), so activations keep their size; norm weights are
    1 + N(0, .1²); biases N(0, .1²).
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator(f"{seed}:{name}"))
            if p.dim() > 1:
                p.copy_(noise / p[0].numel() ** .5)
            else:
                p.copy_(.1 * noise + (1 if name.endswith("weight") else 0))
    return module.eval()


def draw(shape, seed):
    """Standard normal input of this shape from an integer or string seed."""
    return torch.randn(shape, generator=generator(str(seed)))


def generator(text):
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def difference(ours, reference):
    """Greatest |ours − reference| relative to the greatest |reference|."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()
