"""A person of a small model, and what is asked of files: for all tests of files that hold a person."""
import json
import warnings
from functools import cache

import pytest
import torch
from rule import draw, fill, generator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import MERGES, SMALL, VOCAB
from tiny import UNET, VAE

import clip
import hdb
import sd
import unet
import vae
from adapters import LowRank, fresh_lora
from methods import hyperdreambooth
from program.console import UserError

TEXT = SMALL["text_encoder"]
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def lora_inputs():
    """Latents (2, 4, 8, 8), time steps (2,), token ids (2, 24)."""
    ids = torch.randint(len(VOCAB), (2, 24), generator=generator("lora:ids"))
    return draw((2, 4, 8, 8), "lora:x"), torch.tensor([30, 700]), ids


def small(config=UNET, seed=0):
    denoiser, autoencoder = fill(unet.UNet(config), seed), fill(vae.VAE(VAE), seed)
    text = clip.TextTransformer(TEXT)
    fill(text.text_model, seed)  # transformers 5 has no text_model, and the rule goes by names
    return sd.StableDiffusion("small", denoiser, text, clip.Tokenizer(VOCAB, MERGES, 24), autoencoder)


@cache
def method():
    return hdb.HyperDreamBooth(small())


def output(model, adapters=None):
    """Text features and predicted noise."""
    x, t, ids = lora_inputs()
    with model.adapted(adapters or {}):
        context = model.text(ids)
        return context, model.unet(x, t, context)


def someone(seed=0, rank=4, **more):
    theta = .3 * draw((1, *method().lidb.shape), f"theta {seed}")
    lora = fresh_lora(method().layers, rank, torch.Generator().manual_seed(seed)) if rank else {}
    lora = {k: LowRank(a.detach(), .2 * draw(b.shape, f"{seed} {k}")) for k, (a, b) in lora.items()}
    return hyperdreambooth.person(theta, lora, base="small", **more)


def refused(call, *words):
    with pytest.raises(UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def warned(call):
    """What a call warns of, and that in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    texts = [str(warning.message) for warning in caught]
    assert not any("\n" in text for text in texts)
    return texts


def altered(file, tensors=None, settings=None, **note):
    """Give a file other tensors, metadata, or settings among them; without those that are None."""
    with safe_open(file, "pt") as f:
        found = f.metadata()
    found |= {"config": json.dumps(json.loads(found["config"]) | settings)} if settings else {}
    tensors, found = load_file(file) | (tensors or {}), found | note
    tensors, found = ({k: v for k, v in pairs.items() if v is not None} for pairs in (tensors, found))
    save_file(tensors, file, found)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def equal(ours, theirs):
    pairs = [(x, y) for name in ours for x, y in zip(ours[name], theirs.get(name, ()), strict=True)]
    return ours.keys() == theirs.keys() and all(torch.equal(x, y) for x, y in pairs)


def lora_of(person):
    return hyperdreambooth.adapters({k: t for k, t in person.tensors.items() if k != "theta"}, method())
