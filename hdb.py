"""HyperDreamBooth (Ruiz et al., arXiv 2307.06949) in one place: predict, relax, fine-tune, sample, and the loss that trains the predictor.

    model = hdb.load("nano")                                        # or a Stable Diffusion 1.5
    method = HyperDreamBooth(model, load_hypernet("nano/hypernet.safetensors", model))
    theta = method.predict(photo)                                   # section 4.2: a few thousand numbers, at once
    relaxed = method.fine_tune(photo, theta)                        # section 4.3: rank-relaxed fast fine-tuning
    person = join(method.lidb.factors(theta), relaxed)
    pictures = method.sample(["a [V] face as a rock star"], person, seeds=[0])
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch

import checkpoints
import sampling
import sd
from checkpoints import LoadError, write
from hypernet import HyperConfig, HyperNetwork, ViT, ViTConfig
from lidb import LiDB, Personal, adaptable_layers, join, lora, personal_layers
from sd import StableDiffusion, load, model_name  # noqa: F401  (hdb.load is where users look for it)
from trainer import backward

IDENTIFIER = "sks"  # what [V] becomes: a token that text-to-image models know nothing of
PROMPT = "a [V] face"


class HyperDreamBooth:
    """The method around one StableDiffusion `model`, whose weights stay as they are. What is personal is in *factors* (see lidb.py)."""

    def __init__(self, model, hypernet=None, basis_seed=0):
        """basis_seed: of the LiDB basis; a hypernetwork from load_hypernet brings the basis it was trained with. The model's layers get hooks
        (see lidb.Personal), one set for all methods around it, which do nothing while no factors are in force."""
        self.model, self.hypernet = model, hypernet
        self.layers = personal_layers(model.unet, model.text)
        self.lidb = getattr(hypernet, "lidb", None) or LiDB(self.layers, seed=basis_seed, device=model.device)
        if model.personal is None:
            model.personal = Personal(adaptable_layers(model.unet, model.text))
        self.personal = model.personal

    @torch.no_grad()
    def predict(self, photo, iterations=None):
        """A photo (B, 3, H, W) in [-1, 1] -> θ̂ (B, layers, r·(a + b)), by the hypernetwork (Eq. 3), without gradients.

        iterations: s, the hypernetwork's own if None. ValueError where there is no hypernetwork.
        """
        if self.hypernet is None:
            raise ValueError("this model has no hypernetwork to predict with; see train.py")
        return self.hypernet.refine(encode_face(self.hypernet.vit, photo).to(self.hypernet.bias.dtype), iterations).float()

    def context(self, prompts):
        """Text features (B, n, d) of B prompts, [V] being the rare identifier, under the factors in force."""
        return self.model.context([named(p) for p in prompts])

    def denoising_loss(self, latent, prompts, generator):
        """‖D(x + ε, c) − x‖² of Eq. 2, per sample (B,), under the factors in force. latent (B, 4, h, w), B prompts, a CPU generator.

        D is the model's estimate of the clean latent, so its error is the noise's times 1/SNR; that is cut at 5, where almost pure noise
        would otherwise drown everything else. Time steps are spread evenly over the batch, which makes the average less noisy.
        """
        count = len(latent)
        with torch.device("cpu"):
            spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count  # one in each of `count` equal parts of [0, 1]
            t = (spread * sampling.STEPS).long().clamp(max=sampling.STEPS - 1)[torch.randperm(count, generator=generator)]
            noise = torch.randn(latent.shape, generator=generator).to(latent)
        context = self.context(prompts)
        predicted = self.model.unet(sampling.add_noise(latent, noise, t), t.to(latent.device), context)
        snr = sampling.ALPHAS_CUMPROD[t] / (1 - sampling.ALPHAS_CUMPROD[t])
        return (1 / snr).clamp(max=5).to(latent.device) * (predicted - noise).float().pow(2).mean((1, 2, 3))

    def hyper_loss(self, theta_hat, latent, prompts, generator, theta=None, alpha=1., beta=0.):
        """Eq. 2: L = α‖D_θ̂(x + ε, c) − x‖² + β‖θ̂ − θ‖², for a batch in which every sample is another person. Both terms are means over
        elements here, the first weighted as in denoising_loss, so that α and β mean the same for every model.

        theta_hat (B, layers, size) from the hypernetwork, latent (B, 4, h, w) of the target pictures, B prompts; theta, the same shape as
        theta_hat: pre-optimised targets, needed if β > 0 (ValueError without). Returns the loss and its two terms, unweighted. θ̂'s
        factors stay in force for the backward pass.
        """
        if beta and theta is None:
            raise ValueError("β > 0 needs target θ; fit them first or set β = 0")
        zero = theta_hat.new_zeros(())
        self.personal.factors = self.lidb.factors(theta_hat)
        try:
            denoising = self.denoising_loss(latent, prompts, generator).mean() if alpha else zero
        except BaseException:
            self.personal.factors = {}
            raise
        distance = (theta_hat - theta).pow(2).mean() if beta else zero
        return alpha * denoising + beta * distance, denoising, distance

    def fine_tune(self, photo, theta=None, steps=40, rank=4, lr=3e-3, batch=4, generator=None, callback=None):
        """Rank-relaxed fast fine-tuning (section 4.3): the predicted ΔW is kept as it is and LoRA factors of a higher rank are trained
        beside it with the denoising loss on the one photo, `batch` noises of it a step. photo (P, 3, H, W) in [-1, 1], theta (P, layers,
        size) or None for none; P people are fine-tuned side by side, each on their own photo.

        Returns the LoRA factors alone; join() them with the prediction's. callback(step, loss) after every step.
        """
        generator = generator or torch.Generator().manual_seed(0)
        latent = self.model.encode(photo).detach().repeat(batch, 1, 1, 1)
        predicted = {} if theta is None else {k: (a.detach(), b.detach()) for k, (a, b) in self.lidb.factors(theta).items()}
        relaxed = lora(self.layers, rank, generator, people=len(photo))
        parameters = [p for pair in relaxed.values() for p in pair]
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(.9, .99), weight_decay=0.)
        try:
            with torch.enable_grad():
                for step in range(steps):
                    self.personal.factors = join(predicted, relaxed)
                    loss = self.denoising_loss(latent, [PROMPT] * len(latent), generator).mean()
                    backward(loss, parameters)
                    optimizer.step()
                    optimizer.zero_grad()
                    if callback:
                        callback(step, loss.item())
        finally:
            self.personal.factors = {}
        return {k: (a.detach(), b.detach()) for k, (a, b) in relaxed.items()}

    @torch.no_grad()
    def sample(self, prompts, factors=None, seeds=None, steps=25, guidance=3., negative="", size=None, sampler=sampling.dpmpp_2m, callback=None):
        """Pictures (B, 3, H, W) in [-1, 1] of B prompts, with the factors of one person or of B, one seed per picture.

        size: (height, width) in pixels, divisible by 8; the model's own if None. sampler: dpmpp_2m, ddim, or for eta > 0
        functools.partial(sampling.ddim, eta=1., generator=g) with `g` generators that are the `seeds` as well. The factors are in force
        only while this runs. ValueError for another size.
        """
        side = 8 * self.model.unet.config.sample_size
        height, width = size or (side, side)
        sd.check_sides(height, width)
        start = sampling.noise((len(prompts), 4, height // 8, width // 8), list(seeds if seeds is not None else range(len(prompts))))
        self.personal.factors = factors or {}
        try:
            context = self.context(prompts)
            negatives = self.model.context([negative] * len(prompts))
            z = sampler(sampling.guided(self.model.unet, context, negatives, guidance), start.to(self.model.device), steps, callback=callback)
        finally:
            self.personal.factors = {}
        return self.model.decode(z).float().clamp(-1, 1)


def canonical(prompt):
    """The prompt with its [V] in capitals."""
    return prompt.replace("[v]", "[V]")


def named(prompt, identifier=IDENTIFIER):
    """The prompt as the text encoder gets it, with the identifier, a word of its own, for [V]."""
    return canonical(prompt).replace("[V]", f" {identifier} ")


def load_vit(source, device=None):
    """The ViT at `source`, a hub id (google/vit-huge-patch14-224-in21k, facebook/dino-vits16) or a folder with its config.json and
    model.safetensors, in float32. Its config says how the pictures it was trained on were normalised, from preprocessor_config.json if
    that is there. Raises LoadError, as load() does."""
    folder = sd.encoder_folder(source, "preprocessor_config.json")

    def rename(key):  # classifiers keep the ViT under a prefix; their head, and the pooler, look at one token and are not needed
        key = key.removeprefix("vit.")
        return None if key.startswith(("pooler.", "classifier.")) else key
    config = checkpoints.read_settings(ViTConfig, folder / "config.json")
    checkpoints.refuse(checkpoints.read_json(folder / "config.json"), {"hidden_act": "gelu"}, folder / "config.json")
    if (folder / "preprocessor_config.json").is_file():
        found = checkpoints.read_json(folder / "preprocessor_config.json")
        checkpoints.refuse(found, {"do_normalize": True, "do_rescale": True}, folder / "preprocessor_config.json")
        config = checkpoints.configure(config, {k: found[k] for k in ("image_mean", "image_std") if k in found}, folder)
    return checkpoints.module(ViT, config, [folder / "model.safetensors"], rename, *sd.place(device, torch.float32)).eval().requires_grad_(False)


@torch.no_grad()
def encode_face(vit, photo):
    """ViT features (B, n, d) of photos (B, 3, H, W) in [-1, 1], at the size and normalisation that the ViT was trained with."""
    side, weight, photo = vit.config.image_size, vit.layernorm.weight, photo.float()
    if photo.shape[2:] != (side, side):
        photo = torch.nn.functional.interpolate(photo, (side, side), mode="bicubic", antialias=True)
    mean, std = (2 * photo.new_tensor(t).view(3, 1, 1) for t in (vit.config.image_mean, vit.config.image_std))
    return vit(((photo - (mean - 1)) / std).to(weight.device, weight.dtype))


def save_hypernet(hypernet, method, path, encoder=None):
    """Write the hypernetwork in fp16, with its configuration and the basis that its θ belong to. encoder: what load_vit was given, if the
    ViT is an official one; it is then named instead of written."""
    note = {"config": json.dumps(asdict(hypernet.config)), "basis_seed": str(method.lidb.seed), "basis_checksum": str(method.lidb.checksum)}
    tensors = {k: v.half() for k, v in hypernet.state_dict().items() if not encoder or not k.startswith("vit.")}
    write(tensors, path, note | ({"encoder": encoder} if encoder else {}))


def load_hypernet(path, model):
    """The HyperNetwork in a file of save_hypernet, in float32 on the model's device. LoadError if it is none, or made for other layers
    than this model's. Its `encoder` says where its ViT came from, None if from the same file; its `lidb` is the basis it was trained with."""
    try:
        with checkpoints.read(Path(path)) as f:
            note = f.metadata() or {}
        config, seed, checksum = json.loads(note["config"]), int(note["basis_seed"]), int(note["basis_checksum"])
        HyperConfig(**config)  # a field that isn't known here would mean something else
        vit = checkpoints.configure(ViTConfig(), config.pop("vit"), path)
        config = checkpoints.configure(HyperConfig(1, 1, vit=vit), config, path)
        basis = LiDB(personal_layers(model.unet, model.text), seed=seed, device=model.device)
    except LoadError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise LoadError(f"{path}: not a hypernetwork that train.py wrote ({error!r})") from None
    if (config.layers, config.size) != basis.shape or checksum != basis.checksum:
        raise LoadError(f"{path}: trained for other layers or another basis than {model.name}'s")

    def hypernet(config):
        return HyperNetwork(config, torch.nn.Identity() if "encoder" in note else None)
    built = checkpoints.module(hypernet, config, [Path(path)], lambda key: key, model.device, torch.float32)
    built.encoder = note.get("encoder")
    if built.encoder:
        built.vit = load_vit(built.encoder, model.device)
        if built.vit.config != config.vit:
            raise LoadError(f"{path}: trained with another encoder than the one that is now {built.encoder}")
    if not all(t.isfinite().all() for t in built.state_dict().values()):
        raise LoadError(f"{path}: holds numbers that are infinite or NaN")
    built.lidb = basis
    return built.eval().requires_grad_(False)
