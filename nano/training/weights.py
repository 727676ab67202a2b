"""nano's weights before training and after it."""
import torch


def initialise(model):
    """The model with fresh weights that keep the signal's variance; residual branches start at zero.
    PyTorch's default shrinks it by √3 in each convolution, but not the biases, and a small model takes
    thousands of steps to recover the colours. Small token embeddings keep unseen words quiet."""
    last = ("conv2", "proj_out", "to_out.0", "out_proj", "net.2", "fc2")  # of a residual branch
    for name, m in model.named_modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(m.weight, std=0 if name.endswith(last) else m.weight[0].numel() ** -.5)
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
        elif isinstance(m, torch.nn.Embedding):
            torch.nn.init.normal_(m.weight, std=.02)
    return model


@torch.no_grad()
def standardise(model, z):
    """Fold into the 1×1 convolutions at the latent what gives z (B, 4, h, w) mean 0 and variance 1."""
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    out, back = model.quant_conv, model.post_quant_conv
    c = len(mean)
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]
    out.weight[:c] /= std[:, None, None, None]
    out.bias[:c] = (out.bias[:c] - mean) / std
    out.bias[c:] -= 2 * std.log()
