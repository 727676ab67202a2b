"""HyperDreamBooth (Ruiz et al., arXiv 2307.06949) in one place: predict, relax, fine-tune, sample, and the
loss that trains the predictor.

    model = hdb.load("nano")                      # or a Stable Diffusion 1.5
    method = HyperDreamBooth(model, load_hypernet("nano/hypernet.safetensors", model))
    theta = method.predict(photo)                 # section 4.2: 28,800 numbers (nano: 7,584), at once
    lora = method.fine_tune(photo, theta)      # section 4.3: rank-lora fast fine-tuning
    with model.adapted(join(method.lidb.adapters(theta), lora)):
        pictures = model.sample(["a [V] face as a rock star"], seeds=[0])
"""
import itertools
from contextlib import contextmanager
from functools import cached_property

import torch

from training.fit import fit
from diffusion import denoising_error, denoising_loss, noised
from adapters import detach, fresh_lora, in_weights
from files.hypernetwork import load_hypernet
from lidb import LiDB, personal_layers, unet_layers
from sd import load
from vit import encode_face

__all__ = ["HyperDreamBooth", "PROMPT", "load", "load_hypernet"]

PROMPT = "a [V] face"
SMALL = 2 ** 18  # weights in the largest layer up to which a CPU had better change them than what they make


def several(photo):
    """One photo each (P, 3, H, W) as several (P, 1, 3, H, W); several as they are."""
    return photo if photo.dim() == 5 else photo[:, None]


class HyperDreamBooth:
    """The method around one StableDiffusion `model`, which stays as it is: what is personal is in
    adapters."""

    def __init__(self, model, hypernet=None, basis_seed=0):
        """hypernet: a HyperNetwork, which brings its basis; basis_seed: of the LiDB basis without one."""
        self.model, self.hypernet = model, hypernet
        self.layers = personal_layers(model.unet, model.text)
        self.basis_seed = hypernet.config.basis_seed if hypernet else basis_seed

    @cached_property
    def lidb(self):
        """Lightweight DreamBooth over this model's layers: θ to adapters."""
        return LiDB(self.layers, seed=self.basis_seed, device=self.model.device)

    @torch.no_grad()
    def predict(self, photo, iterations=None):
        """A photo (B, 3, H, W) in [-1, 1] -> θ̂ (B, layers, r·(a + b)), by the hypernetwork (Eq. 3); of N
        photos each, (B, N, 3, H, W), the mean.

        iterations: s, the hypernetwork's own if None. ValueError where there is no hypernetwork.
        """
        if self.hypernet is None:
            raise ValueError("this model has no hypernetwork to predict with; see train.py")
        photos = several(photo)
        features = encode_face(self.hypernet.vit, photos.flatten(0, 1)).to(self.hypernet.bias.dtype)
        theta = self.hypernet.refine(features, iterations).float()
        return theta.unflatten(0, photos.shape[:2]).mean(1)

    @contextmanager
    def hyper_loss(self, theta_hat, latent, prompts, generator, theta=None, alpha=1., beta=0., share=(0, 1)):
        """Eq. 2: L = α‖D_θ̂(x + ε, c) − x‖² + β‖θ̂ − θ‖², for a batch in which every sample is another
        person. Both terms are means over elements here, the first weighted as in denoising_loss, so that α
        and β mean the same for every model.

            with method.hyper_loss(theta_hat, latent, prompts, generator) as (loss, denoising, distance):
                loss.backward()                                     # θ̂'s adapters are in force until here

        theta_hat (B, layers, size) from the hypernetwork, latent (B, 4, h, w) of the target pictures, B
        prompts; theta, the same shape as theta_hat: pre-optimised targets, needed if β > 0 (ValueError
        without); share: which of how many parts of a larger batch this is. Gives the loss and its two terms,
        unweighted.
        """
        if beta and theta is None:
            raise ValueError("β > 0 needs target θ; fit them first or set β = 0")
        zero = theta_hat.new_zeros(())
        with self.model.adapted(self.lidb.adapters(theta_hat)):
            denoising = zero
            if alpha:
                denoising = denoising_loss(self.model, latent, prompts, generator, share).mean()
            distance = (theta_hat - theta).pow(2).mean() if beta else zero
            yield alpha * denoising + beta * distance, denoising, distance

    def fit_theta(self, draw, people, steps, lr, generator):
        """Target θ (P, layers, size) of Eq. 2 for P people side by side, all from the one shared start, by
        the denoising loss on their pictures. draw() -> latents (P, 4, h, w) of a picture of each, and P
        prompts."""
        theta = torch.zeros(people, *self.lidb.shape, device=self.model.device, requires_grad=True)
        fit(lambda: denoising_loss(self.model, *draw(), generator).sum(), [theta], steps, lr,
                lambda: self.model.adapted(self.lidb.adapters(theta)))
        return theta.detach()

    def fine_tune(self, photo, theta=None, steps=40, rank=4, lr=3e-3, batch=4, generator=None, callback=None):
        """Rank-lora fast fine-tuning (section 4.3): the predicted ΔW is kept as it is and a LoRA of a
        higher rank is trained beside it, in the UNet, with the denoising loss on the one photo, `batch`
        noises of it a step. Without a prediction the text encoder is trained as well, since nothing else
        tells it that [V] is somebody.

        photo (P, 3, H, W) in [-1, 1], theta (P, layers, size) or None for none; P people are fine-tuned side
        by side, each on their own photo, or on N photos, (P, N, 3, H, W), which take turns. Returns the
        LoRA's adapters alone; join() them with the prediction's. callback(step, loss) after every step.
        """
        generator = generator or torch.Generator().manual_seed(0)
        photos = several(photo)
        people, count = photos.shape[:2]
        latents = self.model.encode(photos.flatten(0, 1)).detach().unflatten(0, (people, count))
        turns = itertools.cycle(range(count))

        def latent():
            """Of everybody, `batch` times in turn: (batch·P, 4, h, w)."""
            which = [next(turns) for _ in range(batch)]
            return latents[:, which].transpose(0, 1).flatten(0, 1)

        predicted = {} if theta is None else detach(self.lidb.adapters(theta))
        # A text encoder that is trained on the one prompt as well forgets what other prompts say: of 16
        # people on nano likeness .95 plain, .86 styled at style .93; without .96, .86 at 1.00
        layers = self.layers if theta is None else unet_layers(self.layers)
        lora = fresh_lora(layers, rank, generator, people)
        largest = max(layer.weight.numel() for layer in layers.values())
        here = self.model.device.type == "cpu" and self.model.dtype == torch.float32
        light = here and people == 1 and largest <= SMALL

        def around():
            """The LoRA is in force, as it is now."""
            return self.model.adapted(in_weights(lora, layers) if light else lora)
        with self.model.adapted(predicted):
            ids = self.model.tokens([PROMPT] * people)
            fixed = None if theta is None else self.model.text(ids).detach()  # encoded once

            def loss(*drawn):
                context = self.model.text(ids) if fixed is None else fixed
                return denoising_error(self.model.unet, context, *drawn).mean()
            factors = [factor for pair in lora.values() for factor in pair]
            fit(loss, factors, steps, lr, around, callback, generator,
                    draw=lambda: noised(latent(), generator))
        return detach(lora)

    def sample(self, prompts, adapters=None, seeds=None, **options):
        """Pictures (B, 3, H, W) in [-1, 1] of B prompts with the adapters of one person or of B; see
        model.sample."""
        return self.model.sample(prompts, seeds, adapters=adapters or {}, **options)
