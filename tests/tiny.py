"""A randomly filled Stable Diffusion so small that tests take milliseconds, and one changed by hand."""
from contextlib import contextmanager
from functools import cache

import torch
from rule import fill
from torch.func import functional_call

import clip
import unet
import vae
from hypernet import HyperConfig, HyperNetwork
from sd import StableDiffusion
from training.trainer import global_seed
from vit import ViTConfig

UNET = unet.UNetConfig(block_out_channels=(16, 24), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                       cross_attention_dim=32, layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
                       sample_size=8)
VAE = vae.VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
VOCAB, MERGES = clip.learn_bpe(["a", "face", "as", "rock", "star", "sks", "blurry"])
TEXT = clip.TextConfig(vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=12)
VIT = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                image_size=16, patch_size=8, layer_norm_eps=1e-6)


def tiny_model(to=torch.float32):
    """On another device, or of another dtype."""
    text, tokenizer = fill(clip.TextTransformer(TEXT)), clip.Tokenizer(VOCAB, MERGES, 12)
    parts = fill(unet.UNet(UNET)).to(to), text.to(to), tokenizer, fill(vae.VAE(VAE)).to(to)
    return StableDiffusion("tiny", *parts)


@cache
def shared_model():
    """One for all tests that leave it as it is, which all should."""
    return tiny_model()


def tiny_hypernet(layers, size, **options):
    """A hypernetwork that predicts somebody, as its heads are not zero."""
    with global_seed(0):
        net = HyperNetwork(HyperConfig(layers, size, width=16, heads=2, vit=VIT, **options))
        torch.nn.init.normal_(net.heads, std=.3)
    return net.eval().requires_grad_(False)


def untouched(model):
    """Whether nothing is in force, the weights are as they were made, and none has a gradient."""
    fresh = tiny_model()
    for part in "unet", "text", "vae":
        ours, theirs = (getattr(m, part).state_dict() for m in (model, fresh))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        assert all(p.grad is None and not p.requires_grad for p in getattr(model, part).parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.layers.values())
    return True


class Changed:
    """`model` with other weights, as functional_call computes it: the reference for what adapters do.

    deltas: name -> (in, out), added to the weight of that layer."""

    def __init__(self, model, deltas):
        self.model, self.weights = model, {"unet": {}, "text": {}}
        for name, delta in deltas.items():
            part, layer = name.split(".", 1)
            weight = model.layers[name].weight
            self.weights[part][f"{layer}.weight"] = weight + delta.T.reshape(weight.shape)

    def context(self, texts):
        return functional_call(self.model.text, self.weights["text"], (self.model.tokenizer(texts),))

    def unet(self, x, t, context):
        return functional_call(self.model.unet, self.weights["unet"], (x, t, context))


def deltas(adapters, person=0):
    """name -> A·B (in, out) of one of the people."""
    return {name: a[person] @ b[person] for name, (a, b) in adapters.items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(people=1, seed=1):
    """(people, 3, 64, 64) in [-1, 1]."""
    return torch.rand(people, 3, 64, 64, generator=generator(seed)) * 2 - 1


def some_latent(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=generator(seed))


def times_and_noise(shape, g):
    """Of denoising_loss: time steps (B,), one in each B-th part of all of them, and noise of this shape."""
    u = (torch.arange(shape[0]) + torch.rand(shape[0], generator=g)) / shape[0]
    t = (u * 1000).long()[torch.randperm(shape[0], generator=g)]
    return t, torch.randn(shape, generator=g)


class Stage:
    """Stands for console.Stages: what a command line would show."""

    def __init__(self):
        self.said, self.steps, self.losses = [], None, []

    def __call__(self, what):
        self.said.append(what)

    @contextmanager
    def progress(self, steps):
        self.steps = steps
        yield lambda step, loss: self.losses.append(loss)


def adam_by_hand(p, gradients, lr, decay=0.):
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, lr), 1):
        m, v = .9 * m + .1 * g, .99 * v + .01 * g ** 2
        ahead = m / (1 - .9 ** t) / ((v / (1 - .99 ** t)).sqrt() + 1e-8)
        p = p - rate * decay * p - rate * ahead
    return p
