"""HyperDreamBooth (Ruiz et al., arXiv 2307.06949): from one photo of a face to a person that a text-to-image
model can draw.

    model = hdb.load("nano")                      # or a Stable Diffusion 1.5
    method = HyperDreamBooth(model, load_hypernet("nano/hypernet.safetensors", model))
    theta = method.predict(photo)                 # section 4.2: 28,800 numbers (nano: 7,584), at once
    lora = method.fine_tune(photo, theta)         # section 4.3: rank-relaxed fast fine-tuning
    with model.adapted(join(method.lidb.adapters(theta), lora)):
        pictures = model.sample(["a [V] face as a rock star"], seeds=[0])

Idea. DreamBooth takes a thousand steps to teach a model one face, and stores more than a gigabyte of weights.
HyperDreamBooth searches a far smaller space and starts near the answer:

    ΔW = A_aux · A_train · B_train · B_aux       Eq. 1 (lidb.py): 28,800 numbers in a random subspace
    θ̂_k = θ̂_{k−1} + T(f, θ̂_{k−1})               Eq. 3 (hypernet.py): a network predicts them from a photo
    L = α‖D_θ̂(x + ε, c) − x‖² + β‖θ̂ − θ‖²       Eq. 2 (train.py): what trains the network
    W' = W + ΔW_θ̂ + A·B                          section 4.3 (here): a LoRA of rank r > 1 on top, 40 steps

θ is (A_train, B_train) of every layer, θ̂ a prediction of it; f are the photo's features, T is the decoder;
D_θ̂ is the model with the weights θ̂, x the latent of a picture, ε noise, c the features of a prompt.

Why relax the rank. Rank one in so small a subspace holds a likeness, not its details. The prediction stays as
it is, and a LoRA with B = 0 starts exactly there. Training θ̂ further would stay in the subspace and overfit
the one prompt.

Cost. One pass of the encoder and s of the decoder, then 40 steps of the UNet, forward and back. A person is
the seed of the basis, θ̂, A and B: on SD 1.5 58 KB for θ̂ and 2.5 MB for A and B, in fp16.

Where the paper is silent, we chose (docs/choices.md has the evidence) the rank (4), the learning rate and the
batch of fine-tuning, and the layers that it trains. After a prediction these are the UNet's alone, because a
text encoder trained on one prompt forgets what others mean."""
import itertools
from functools import cached_property

import torch

from adapters import detach, fresh_lora
from diffusion import denoising_error, denoising_loss, noised
from files.encoders import loaded
from files.hypernetwork import load_hypernet
from lidb import LiDB, personal_layers, unet_layers
from sd import load
from training.fit import fastest, fit, fit_or_take_back
from vit import encode_face

__all__ = ["PROMPT", "HyperDreamBooth", "load", "load_hypernet"]

PROMPT = "a [V] face"


class HyperDreamBooth:
    """The method for a StableDiffusion `model`, which it never changes: a person is a dict of adapters."""

    def __init__(self, model, hypernet=None, basis_seed=0):
        """hypernet: a HyperNetwork, which names its basis; basis_seed: the basis to use without one."""
        self.model, self.hypernet = model, hypernet
        self.layers = personal_layers(model.unet, model.text)
        self.basis_seed = hypernet.config.basis_seed if hypernet else basis_seed

    @cached_property
    def lidb(self):
        """Lightweight DreamBooth (Eq. 1) on this model's layers: θ to adapters."""
        return LiDB(self.layers, seed=self.basis_seed, device=self.model.device)

    @torch.no_grad()
    def predict(self, photo, iterations=None):
        """Section 4.2: one photo of each of P people, (P, 3, H, W) in [-1, 1] -> θ̂ (P, layers, r·(a + b)),
        by the hypernetwork (Eq. 3). For N photos of each, (P, N, 3, H, W), the mean of N predictions.

        iterations: s; None: the hypernetwork's own. ValueError without a hypernetwork."""
        if self.hypernet is None:
            raise ValueError("this model has no hypernetwork to predict with; see train.py")
        photos = photo if photo.dim() == 5 else photo[:, None]
        encoder = loaded(self.hypernet.vit, self.model.device)
        features = encode_face(encoder, photos.flatten(0, 1)).to(self.hypernet.bias.dtype)
        del encoder  # 2.5 GB, if it is a ViT-H
        theta = self.hypernet.refine(features, iterations).float()
        return theta.unflatten(0, photos.shape[:2]).mean(1)

    def fine_tune(self, photo, theta=None, steps=40, rank=4, lr=3e-3, batch=4, generator=None, callback=None,
                  places=1.):
        """Section 4.3, rank-relaxed fast fine-tuning: photo (P, 3, H, W) in [-1, 1] and the prediction θ̂ (P,
        layers, size) -> the LoRA's adapters alone; join() them with the prediction's.

        The predicted ΔW stays as it is. The denoising loss on the photo, with `batch` noises in each step,
        trains a LoRA of a higher rank beside it. N photos of a person, (P, N, 3, H, W), take turns. If the
        loss has risen at the end, the last steps are undone, with a warning (training/fit.py).
        theta None: without a prediction it trains the text encoder too, which must learn who [V] is.
        generator: a CPU generator, or a list of P: then each person gets the same LoRA as if alone.
        callback(step, loss), after every step, ends the training by returning True.
        places: weights (h, w) of the latent's pixels in the loss (training/views.py)."""
        photos = photo if photo.dim() == 5 else photo[:, None]
        people, count = photos.shape[:2]
        generator = generator or seeded(0)

        # What stays fixed: the latents (P, N, 4, h, w), the predicted weights, the prompt
        latents = self.model.encode(photos.flatten(0, 1)).detach().unflatten(0, (people, count))
        predicted = {} if theta is None else detach(self.lidb.adapters(theta))
        ids = self.model.tokens([PROMPT] * people)

        # What is trained: a LoRA that changes nothing yet
        layers = self.layers if theta is None else unet_layers(self.layers)
        lora = fresh_lora(layers, rank, generator, people)
        factors = [factor for pair in lora.values() for factor in pair]
        turns = itertools.cycle(range(count))

        def inputs():
            """`batch` noisy latents of every person; the first axis of each tensor is batch·P long."""
            which = [next(turns) for _ in range(batch)]
            return noised(latents[:, which].transpose(0, 1).flatten(0, 1), generator)

        with self.model.adapted(predicted):
            fixed = None if theta is None else self.model.text(ids).detach()  # the text, encoded once

            def loss(*noisy):
                text = self.model.text(ids) if fixed is None else fixed
                return denoising_error(self.model.unet, text, *noisy, places).mean()
            fit_or_take_back(loss, factors, steps, lr, lambda: self.model.adapted(fastest(lora, layers)),
                             callback, inputs, replay=generator)
        return detach(lora)

    def fit_theta(self, draw, people, steps, lr, generator, callback=None):
        """Target θ (P, layers, size) of Eq. 2 for P people side by side: the denoising loss on their pictures
        fits each from θ = 0. draw() -> latents (P, 4, h, w) of one picture of each, and P prompts."""
        theta = torch.zeros(people, *self.lidb.shape, device=self.model.device, requires_grad=True)
        fit(lambda: denoising_loss(self.model, *draw(), generator).sum(), [theta], steps, lr,
            lambda: self.model.adapted(self.lidb.adapters(theta)), callback)
        return theta.detach()

    def sample(self, prompts, adapters=None, seeds=None, **options):
        """model.sample with the adapters of one person, or of one person for each prompt."""
        return self.model.sample(prompts, seeds, adapters=adapters or {}, **options)


def hyper_loss(model, prompts, noisy, theta_hat, theta=None, alpha=1., beta=0.):
    """Eq. 2, L = α‖D_θ̂(x + ε, c) − x‖² + β‖θ̂ − θ‖², for a batch with a different person in each sample.

        with model.adapted(method.lidb.adapters(theta_hat)):
            loss, denoising, distance = hyper_loss(model, prompts, noised(latents, generator), theta_hat)
            loss.backward()

    prompts: c, B texts; noisy: diffusion.noised of the latents x (B, 4, h, w); theta_hat: (B, layers, size);
    theta: fitted targets of the same shape, needed if β > 0 (ValueError without). Both terms are means over
    elements, so α and β mean the same for every model; denoising_error weights the first. Returns the loss
    and its two terms before α and β."""
    if beta and theta is None:
        raise ValueError("β > 0 needs target θ: fit it first, or set β = 0")
    denoising = denoising_error(model.unet, model.context(prompts), *noisy).mean()
    distance = (theta_hat - theta).pow(2).mean() if beta else theta_hat.new_zeros(())
    return alpha * denoising + beta * distance, denoising, distance


def seeded(seed):
    """A CPU generator that starts at this seed."""
    return torch.Generator().manual_seed(seed)
