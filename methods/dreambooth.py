"""DreamBooth (Ruiz et al., arXiv 2208.12242): train all weights of UNet and text encoder on one photo.
Pictures of the class, which the model draws beforehand, keep it from forgetting what a face is.

    python personalize.py face.png "a [V] face as a king" --method dreambooth
    python personalize.py … --method dreambooth --steps 400 --lr 2e-5               # Agg-1
    python personalize.py … --method dreambooth --steps 400 --lr 5e-4 --rank 4      # a LoRA

Unlike hdb.py, it predicts nothing. It trains every weight or, with --rank, a LoRA on HyperDreamBooth's
layers, and half of every batch is prior preservation. Without --rank, a person is as large as the model."""
import copy
from functools import lru_cache

import torch
from tqdm import tqdm

from adapters import Change, LowRank, fresh_lora
from diffusion import denoising_loss
from files.person import Person, lora_shapes
from hdb import PROMPT, seeded
from lidb import personal_layers
from methods.protocol import Method
from program.console import advance
from program.options import Option, number, same
from sd import StableDiffusion
from training.fit import fit_or_take_back

CLASS_PROMPT = "a face"


@lru_cache(1)
@torch.no_grad()
def class_pictures(model, count, seed):
    """Latents (count, 4, h, w) of pictures of the class that the model draws, once for all people."""
    seeds, latents = torch.randint(2 ** 31, (count,), generator=seeded(seed)).split(8), []
    with tqdm(total=25 * len(seeds), desc="class pictures", leave=False) as bar:
        for batch in seeds:
            pictures = model.sample([CLASS_PROMPT] * len(batch), batch.tolist(), steps=25, guidance=3.,
                                    callback=lambda *step: advance(bar))
            latents.append(model.encode(pictures))
    return torch.cat(latents).float()


def prior_preserving_loss(model, latent, prior, weight, generator):
    """Eq. 2: the denoising loss of the person's latents (n, 4, h, w) under "a [V] face", plus `weight` times
    that of n random latents of `prior` (N, 4, h, w) under "a face". generator: as in diffusion.noised."""
    own = len(latent)
    prompts = [PROMPT] * own
    if weight:
        each = generator if isinstance(generator, list) else [generator]
        counts = own // len(each), 1
        which = torch.cat([torch.randint(len(prior), counts, generator=one) for one in each], 1).flatten()
        latent = torch.cat([latent, prior[which]])
        prompts = prompts + [CLASS_PROMPT] * own
    loss = denoising_loss(model, latent, prompts, generator)
    return loss[:own].mean() + (weight * loss[own:].mean() if weight else 0)


def learn(model, photo, steps=1200, lr=1e-5, batch=1, rank=0, prior=None, prior_weight=1., generator=None,
        callback=None):
    """A photo (P, 3, H, W) in [-1, 1] -> tensors (P, …) for adapters().

    rank 0: train all weights, and return their differences; ValueError for several people, since each needs a
    model of its own. Otherwise: train a LoRA of this rank, P people side by side. prior: class_pictures(), if
    prior_weight > 0. batch: noises of the photo in each step, and as many class pictures."""
    generator = generator or seeded(0)
    latent = model.encode(photo).detach().float().repeat(batch, 1, 1, 1)

    def loss(trained):
        return prior_preserving_loss(trained, latent, prior, prior_weight, generator)

    if rank:
        lora = fresh_lora(personal_layers(model.unet, model.text), rank, generator, len(photo))
        factors = {f"{name}.{ab}": t for name, adapter in lora.items() for ab, t in zip("AB", adapter)}
        fit_or_take_back(lambda: loss(model), [*factors.values()], steps, lr, lambda: model.adapted(lora),
                         callback, replay=generator)
        return {name: t.detach() for name, t in factors.items()}
    if len(photo) > 1:
        raise ValueError("DreamBooth of all weights takes one person at a time; a LoRA takes several")
    trained = trainable_copy(model)
    fit_or_take_back(lambda: loss(trained), [*parameters(trained).values()], steps, lr, callback=callback,
                     replay=generator, states=0)  # a state would be as large as the model
    return differences(model, trained)


def trainable_copy(model):
    """The same model with copies of UNet and text encoder, in float32, that require gradients."""
    unet, text = (copy.deepcopy(part).float() for part in (model.unet, model.text))
    trained = StableDiffusion(model.name, unet, text, model.tokenizer, model.vae)
    for p in parameters(trained).values():
        p.requires_grad_()
    return trained


def parameters(model):
    """"unet.…" or "text.…" -> parameter."""
    parts = ("unet", model.unet), ("text", model.text)
    return {f"{part}.{name}": p for part, network in parts for name, p in network.named_parameters()}


@torch.no_grad()
def differences(model, trained):
    """What training changed: parameter name -> difference (1, …), float32."""
    before = parameters(model)
    return {name: (p - before[name].float())[None] for name, p in parameters(trained).items()}


def adapters(tensors, engine=None):
    """The tensors of learn() as adapters: for each layer a Change, or LowRank."""
    found = {}
    for name, t in tensors.items():
        layer, kind = name.rsplit(".", 1)
        found.setdefault(layer, {})[kind] = t
    if all(part.keys() == {"A", "B"} for part in found.values()):
        return {layer: LowRank(part["A"], part["B"]) for layer, part in found.items()}
    return {layer: Change({kind: t[0] for kind, t in part.items()}) for layer, part in found.items()}


def shapes(tensors, engine):
    """name -> shape of one person's tensors: of a LoRA, if the first is a factor, or of all weights."""
    if next(iter(tensors), "").endswith((".A", ".B")):
        return lora_shapes(engine.layers, tensors)
    return {name: (1, *p.shape) for name, p in parameters(engine.model).items()}


def make(engine, photos, generators, args, stage):
    """Photos (1, 1, 3, H, W) to the Person: draw the class pictures, then train."""
    model, prior = engine.model, None
    if args.prior_weight:
        prior = class_pictures(model, args.prior_pictures, args.seed)
        stage(f'drew {len(prior)} pictures of "{CLASS_PROMPT}"')
    with stage.progress(args.steps) as show:
        tensors = learn(model, photos[:, 0], args.steps, args.lr, args.batch, args.rank, prior,
                        args.prior_weight, generators[0], show)
    stage(f"trained {args.steps} steps, learning rate {args.lr:g}")
    return Person(METHOD, tensors, base=args.model)


def options(model, hypernet=None):
    return [same("steps", number(int, 1, 100_000), 1200, "training steps"),
            Option("lr", number(float, 0, 1), 1e-5, 1e-6, "learning rate"),
            same("batch", number(int, 1, 1024), 1, "noises of the photo in each step"),
            same("rank", number(int, 0, 320), 0, "train a LoRA of this rank; 0: all weights"),
            same("prior_weight", number(float, 0, 1000), 1., "weight of prior preservation; 0: none"),
            Option("prior_pictures", number(int, 1, 10_000), 64, 200, "pictures of the class, drawn first")]


METHOD = Method("dreambooth", "all weights, or a LoRA (--rank), with prior preservation", options, make,
                adapters, shapes, lambda args: [LowRank if args.rank else Change])
