"""Stable Diffusion 1.x: text, latents and pictures, with or without a person's adapters.

    model = load("nano")                             # or a hub id, a folder, a .safetensors file
    pictures = model.sample(["a face at the beach"], seeds=[0])
    with model.adapted(adapters):                        # see adapters.py
        pictures = model.sample(["a [V] face at the beach"], seeds=[0])"""
import warnings

import torch

import diffusion
from clip import with_identifier
from adapters import adapted
from files import layouts
from files.checkpoints import checksum
from files.layouts import HUB


class StableDiffusion:
    """The parts `unet(x, t, context)`, `text(ids)`, `tokenizer(list_of_str)` and `vae` of `name`, frozen
    (requires_grad False), in eval mode, on one device and in one dtype."""

    def __init__(self, name, unet, text, tokenizer, vae):
        self.name, self.unet, self.text, self.tokenizer, self.vae = name, unet, text, tokenizer, vae
        for part in (unet, text, vae):
            part.eval().requires_grad_(False)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def layers(self):
        """The modules that adapters can change: "unet.…" and "text.…" -> module."""
        parts = ("unet", self.unet), ("text", self.text)
        return {f"{part}.{name}": layer for part, network in parts for name, layer in network.named_modules()}

    @property
    def checksums(self):
        """Part -> checksum of its weights: equal for equal models, whatever their names."""
        return {part: checksum(getattr(self, part)) for part in ("unet", "text", "vae")}

    def adapted(self, adapters):
        """`with model.adapted({"unet.…": adapter}):` applies adapters inside; see adapters.adapted."""
        return adapted(self.layers, adapters)

    def encode(self, image):
        """Image (B, 3, H, W) in [-1, 1] to the UNet's latent (B, 4, H/8, W/8), the mean of the encoder's
        distribution. ValueError for sides not divisible by 8, other channels, or bytes."""
        if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(f"pictures are (B, 3, H, W) in [-1, 1], not {image.dtype} {tuple(image.shape)}")
        check_sides(*image.shape[-2:])
        mean, _ = self.vae.encode(image.to(self.device, self.dtype))
        return mean * self.vae.config.scaling_factor

    def decode(self, latent):
        """Latent (B, 4, h, w) to image (B, 3, 8h, 8w), about [-1, 1] and not clamped."""
        return self.vae.decode(latent.to(self.device, self.dtype) / self.vae.config.scaling_factor)

    def context(self, texts):
        """B strings to the text features (B, n, d) that the UNet attends to; the identifier replaces [V]."""
        return self.text(self.tokens(texts))

    def tokens(self, texts):
        """The same strings as the text encoder's token ids (B, n)."""
        return self.tokenizer([with_identifier(text) for text in texts]).to(self.device)

    @torch.no_grad()
    def sample(self, prompts, seeds=None, steps=15, guidance=2., negative="", size=None,
               sampler=diffusion.dpmpp_2m, callback=None, adapters=None, person_guidance=1.):
        """Pictures (B, 3, H, W) in [-1, 1] of B prompts, one seed for each (0, 1, … if None).

        adapters: applied while sampling, like `with model.adapted(adapters)` around the call.
        person_guidance: w_person of diffusion.guided_to_person. Any value but 1 takes 1.5 times as long and
        also needs the model without the person, so give `adapters` here (ValueError).
        size: (height, width) in pixels, divisible by 8 (ValueError); None: the model's own.
        sampler: diffusion.dpmpp_2m, lcm, ddim or functools.partial(ddim, eta=1.); callback: the sampler's."""
        side = 8 * self.unet.config.sample_size
        height, width = size or (side, side)
        check_sides(height, width)
        if person_guidance != 1 and adapters is None:
            raise ValueError("person_guidance needs the adapters of a person")
        generators = diffusion.generators(range(len(prompts)) if seeds is None else seeds)
        noise = diffusion.seeded_noise((len(prompts), 4, height // 8, width // 8), generators)

        # guidance to the person also needs the model without them: it applies adapters call by call
        always, by_call = (adapters or {}, {}) if person_guidance == 1 else ({}, adapters)

        def person(x, t, context):
            with self.adapted(by_call):
                return self.unet(x, t, context)
        with self.adapted(always):
            with self.adapted(by_call):
                context, negatives = self.context(prompts), self.context([negative] * len(prompts))
            if person_guidance == 1:
                denoise = diffusion.guided(person, context, negatives, guidance)
            else:
                nobody = self.context([negative] * len(prompts))
                denoise = diffusion.guided_to_person(person, self.unet, context, negatives, nobody, guidance,
                                                     person_guidance)
            latent = sampler(denoise, noise.to(self.device), steps, generator=generators, callback=callback)
        return self.decode(latent).float().clamp(-1, 1)


def check_sides(height, width):
    """ValueError unless both sides, in pixels, are divisible by 8."""
    if height % 8 or width % 8:
        raise ValueError(f"a picture's sides must be divisible by 8, not {height}×{width}")


def load(source=HUB, device=None, dtype=None):
    """The StableDiffusion at `source`, one of

    * "nano": the miniature in nano/;
    * a hub id "owner/name": downloads what it needs once, in half precision if dtype is half;
    * a folder in the hub's layout (unet/, vae/, text_encoder/, tokenizer/), plain or .fp16, or in shards;
    * a .safetensors file in the original (CompVis) layout, vocab.json and merges.txt beside it or on the hub.

    device None: cuda, else mps, else cpu. dtype None: bfloat16 on a GPU that has it, else float16; on a CPU
    float32, or bfloat16 if a large model is clearly faster in it. The weights are copies, so the files may
    change afterwards. LoadError (of files.disk) says in one line what is wrong."""
    model = StableDiffusion(str(source), *layouts.load_parts(source, device, dtype))
    if model.device.type == "cpu" and model.dtype == torch.float16:
        warnings.warn("float16 is many times slower than float32 on a CPU; give --dtype bfloat16 or float32",
                      stacklevel=2)
    return model
