"""Train nano's Stable Diffusion, and the encoder of its hypernetwork, from nothing.

    python -m nano.training.pretrain vae      then text, unet, encoder; rebuild.sh has the settings

Each part saves a checkpoint to --runs every two minutes, and resumes from it on any device. At the end it
writes the moving average of its weights to nano/, in the hub's layout and fp16; the encoder's goes to --runs,
for train.py.
"""
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from program import console

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import clip
import diffusion
import unet
import vae
from program import distributed
from files import images
from files.checkpoints import build, checksum, write
from files.disk import read_json, whole_files, write_text
from files.layouts import device_and_dtype
from files.tokenizers import write_tokenizer
from nano import faces, seeds, wording
from nano.training.check import preview, psnr, random_pictures
from nano.training.weights import initialise, standardise
from program.options import DEVICE, RUNS, add, number, same, training_rows
from training.trainer import Pool, Trainer, global_seed
from vit import NANO_VIT, ViT

FOLDER = Path(__file__).parents[1]
VAE, UNET = "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
CATEGORIES = {"hair_style": len(faces.HAIR_STYLES), "hair_colour": len(faces.HAIR_WORDS),
              "eye_colour": len(faces.EYES), "beard": len(faces.BEARD_WORDS),
              "glasses": len(faces.GLASSES_WORDS), "glasses_colour": len(faces.FRAMES)}


def save(module, file, trainer):
    """Write a module's weights to `file` in nano/, with a config.json that records the training's last loss.
    UserError if this is well above the recorded one: then nano/ stays unchanged, and the result is in the
    run's folder."""
    loss, there = trainer.mean["loss"], FOLDER / file
    config = there.with_name("config.json")
    before = read_json(config).get("training_loss", math.inf) if config.exists() else math.inf
    worse = not loss <= 1.5 * before + .002  # no two trainings end the same
    if worse:
        there, config = (trainer.out / path.name for path in (there, config))
    with whole_files(there, config) as (weights, settings):
        write({k: v.half() for k, v in module.state_dict().items()}, weights)
        write_text(json.dumps(asdict(module.config) | {"training_loss": loss}, indent=1) + "\n", settings)
    if worse:
        raise console.UserError(f"the loss ended at {loss:.3g}, that of nano/{file} at {before:.3g}: nano/ "
                                f"stays as it is, the result is {there}")


def restore(module, file, prefix=""):
    """Fill a module from the tensors of `file` in nano/ whose names have this prefix."""
    tensors = load_file(FOLDER / file).items()
    module.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors if k.startswith(prefix)})


def begin(name, modules, args, ema=.999, muon=False, **of):
    """Start or resume the training `name`, which depends on `of` and the seed."""
    return Trainer(modules, Path(args.runs) / name, args.steps, args.lr, ema=ema, deadline=args.deadline,
                   muon=muon, depends_on={"seed": args.seed, **of})


def train_vae(args):
    """Train the autoencoder by squared error plus a little absolute error and KL. Once a UNet works in the
    encoder's space, --decoder trains the decoder alone."""
    with global_seed(args.seed):
        model = initialise(vae.VAE(vae.NANO)).to(args.device)
    if args.decoder or args.warm:
        restore(model, VAE)
    name, modules, of = "vae", {"vae": model}, {}
    if args.decoder:
        name, modules = "decoder", {"decoder": model.decoder, "post": model.post_quant_conv}
        fixed = torch.nn.ModuleList([model.encoder, model.quant_conv]).requires_grad_(False)
        of = {"encoder": checksum(fixed)}
    trainer = begin(name, modules, args, muon=True, **of)
    test, _, _ = random_pictures(64, torch.Generator().manual_seed(seeds.MONITOR), args.device)

    @torch.no_grad()
    def try_out():
        y = torch.cat([model.decode(model.encode(x)[0]) for x in test.split(8)])
        sheet = images.sheet(torch.cat([test[:11], y[:11]]), 11)
        images.save(sheet, trainer.out / "reconstructions.png", step=trainer.step)
        return psnr(y, test)

    for step in trainer:
        generator = torch.Generator().manual_seed(seeds.seed(args.seed, step))
        x, _, _ = random_pictures(args.batch, generator, args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            mean, logvar = (t.float() for t in model.encode(x))
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(x)
            y = model.decode(z).float()
        mse, mae = (y - x).pow(2).mean(), (y - x).abs().mean()
        kl = .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        trainer.update(mse + .05 * mae + (0 if args.decoder else 3e-5 * kl), mse=mse, kl=kl)
        if trainer.step % 500 == 0:
            trainer.log(psnr=try_out())
    if trainer.done:
        trainer.average()
        if not args.decoder:
            crowds = (random_pictures(16, torch.Generator().manual_seed(s), args.device) for s in range(32))
            standardise(model, torch.cat([model.encode(x)[0].detach() for x, _, _ in crowds]))
        print(f"held-out PSNR {try_out():.2f} dB")
        save(model, VAE, trainer)


def train_text(args):
    """Teach the text encoder the meaning of captions, which Stable Diffusion's has learnt as CLIP: from the
    end of the text on, every hidden state must tell the style and, if mentioned, the attributes. (Trained
    with the UNet alone, it learns the styles, which change the whole picture, and ignores quieter words.)"""
    words = wording.tokenizer()
    kinds = {"style": len(faces.STYLES), **{k: n + 1 for k, n in faces.ATTRIBUTES.items()}}  # 0: not said
    with global_seed(args.seed):
        text = initialise(clip.TextTransformer(clip.NANO)).to(args.device)
        heads = torch.nn.Linear(clip.NANO.hidden_size, sum(kinds.values())).to(args.device)
    trainer = begin("text", {"text": text, "heads": heads}, args)
    for step in trainer:
        # Captions, with attribute words or without
        generator = torch.Generator().manual_seed(seeds.seed(args.seed, step))
        identity = torch.rand(args.batch, len(faces.IDENTITY), generator=generator)
        said = torch.rand(args.batch, generator=generator) < .7
        style = torch.randint(len(faces.STYLES), (args.batch,), generator=generator)
        captions = [wording.captions(i[None], s[None], generator, words=w, drop=0.)[0]
                    for i, s, w in zip(identity, style, said.float())]
        ids = words(captions).to(args.device)

        # What the hidden states tell
        told = faces.attributes(identity)
        truth = {"style": style, **{k: (v + 1) * said for k, v in told.items()}}
        truth["hair_colour"] *= told["hair_style"] > 0  # captions don't mention a bald person's
        after = (ids == ids.max()).float()  # from the end-of-text token on
        loss = 0
        for logits, target in zip(heads(text(ids)).split(list(kinds.values()), 2), truth.values()):
            target = target.to(args.device)[:, None].expand_as(ids)
            error = F.cross_entropy(logits.mT, target, reduction="none")
            loss = loss + (after * error).sum() / after.sum() / len(kinds)
        trainer.update(loss)
    if trainer.done:
        trainer.average()
        save(text, TEXT, trainer)
        (FOLDER / "tokenizer").mkdir(exist_ok=True)
        write_tokenizer(words, FOLDER / "tokenizer")


def train_unet(args):
    """Train the UNet by the noise-prediction loss, weighted by min(SNR, 5) / SNR (Hang et al., 2303.09556).
    Autoencoder and text encoder are frozen."""
    text = build(clip.TextTransformer, clip.NANO, [FOLDER / TEXT], str, args.device, torch.float32)
    autoencoder = build(vae.VAE, vae.NANO, [FOLDER / VAE], str, args.device, torch.float32)
    with global_seed(args.seed):
        model = initialise(unet.UNet(unet.NANO)).to(args.device)
        torch.nn.init.zeros_(model.conv_out.weight)
    if args.warm:
        restore(model, UNET)
    words = wording.tokenizer()

    @torch.no_grad()
    def portrait(n):
        generator = torch.Generator().manual_seed(seeds.row(args.seed, n))
        picture, identity, style = random_pictures(1, generator, args.device)
        return autoencoder.encode(picture)[0][0], identity[0], style[0]
    # drawing and encoding cost as much as training: use each picture a few times
    pool = Pool(portrait, 256 * args.fresh, args.fresh, args.pool)

    frozen = {"vae": checksum(autoencoder), "text": checksum(text)}
    trainer = begin("unet", {"unet": model}, args, ema=args.ema, muon=True, **frozen)
    snr = diffusion.ALPHAS_CUMPROD / (1 - diffusion.ALPHAS_CUMPROD)
    weight = (snr.clamp(max=5) / snr).to(args.device)
    for step in trainer:
        # Latents from the pool, and their captions
        generator = torch.Generator().manual_seed(seeds.seed(args.seed, step))
        z, identity, style = pool[pool.draw(step, args.batch, generator)]
        ids = words(wording.captions(identity, style, generator)).to(args.device)

        # The noise to predict
        t = torch.randint(diffusion.STEPS, (args.batch,), generator=generator).to(args.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        predicted = model(diffusion.add_noise(z, noise, t), t, text(ids))
        error = (predicted - noise).pow(2).mean((1, 2, 3))
        trainer.update((weight[t] * error).mean(), mse=error.mean())
        if trainer.step % 500 == 0:
            preview(model, text, words, autoencoder, trainer.out / f"samples_{trainer.step:06d}.png")
    if trainer.done:
        trainer.average()
        preview(model, text, words, autoencoder, trainer.out / "samples.png")
        save(model, UNET, trainer)


def traits(identity):
    """What the encoder learns about people (P, 27): numbers, and categories as one-hot vectors, (P, 53)."""
    column = dict(zip(faces.IDENTITY, identity.unbind(1)))
    numbers = [c[:, None] * 3.5 - 1.75 for name, c in column.items() if name not in CATEGORIES]
    kinds = [F.one_hot(faces.choice(column[name], n), n).float() * 2 for name, n in CATEGORIES.items()]
    return torch.cat(numbers + kinds, 1)


def train_encoder(args):
    """Train a ViT to read identities from photos, in place of the paper's ViT-H, which has seen 14 million.
    Of two linear heads one sees every patch in its place, which teaches small, local things (glasses, a
    beard), and one their mean, which teaches patches to share what they see (the face's width)."""
    width, count = NANO_VIT.hidden_size, traits(torch.zeros(1, len(faces.IDENTITY))).shape[1]
    with global_seed(args.seed):
        vit = ViT(NANO_VIT).to(args.device)
        sizes = {"mean": width, "places": width * (vit.embeddings.side ** 2 + 1)}
        heads = torch.nn.ModuleDict({name: torch.nn.Linear(size, count) for name, size in sizes.items()})
    if args.warm:
        restore(vit, "hypernet.safetensors", "vit.")
    trainer = begin("encoder", {"vit": vit, "heads": heads.to(args.device)}, args, muon=True)

    def portrait(n):
        generator = torch.Generator().manual_seed(seeds.row(args.seed, n))
        identity = torch.rand(1, len(faces.IDENTITY), generator=generator)
        photo = faces.photos(identity, generator, args.device)
        return ((photo[0] + 1) * 127.5).round().byte(), traits(identity)[0].to(args.device)
    pool = Pool(portrait, 16 * args.fresh, args.fresh, args.pool)
    for step in trainer:
        generator = torch.Generator().manual_seed(seeds.seed(args.seed, step, seeds.ENCODER))
        pixels, truth = pool[pool.draw(step, args.batch, generator)]
        features = vit(pixels.float() / 127.5 - 1)
        mean = (heads["mean"](features.mean(1)) - truth).pow(2).mean()
        places = (heads["places"](features.flatten(1)) - truth).pow(2).mean()
        trainer.update(mean + places, mean=mean, places=places)
    if trainer.done:
        trainer.average()
        if distributed.is_main():
            write(vit.state_dict(), trainer.out / "vit.safetensors")
    distributed.greatest(0)  # the others read it next


WARM = same("warm", None, False, "start from the weights in nano/, not from nothing", action="store_true")
DECODER = same("decoder", None, False, "continue nano/vae, training its decoder alone", action="store_true")
BF16 = same("bf16", None, False, "compute in bfloat16, not in float32", action="store_true")
EMA = same("ema", number(float, 0, 1), .998, "decay of the weights' moving average")


def usual(steps=6000, batch=16, lr=1e-3):
    return [*training_rows(steps, batch, lr, seeds.STEPS, seeds.SEEDS), RUNS, DEVICE]


def pool(size, fresh):
    return [same("pool", number(int, 1, 10 ** 8), size, "pictures to keep and draw samples from"),
            same("fresh", number(int, 1, 4096), fresh, "new pictures in each step")]


# part -> its training and options
PARTS = {"vae": (train_vae, [*usual(), WARM, DECODER, BF16]), "text": (train_text, usual()),
         "encoder": (train_encoder, [*usual(3000, 64, 1.5e-3), WARM, *pool(32_000, 24)]),
         "unet": (train_unet, [*usual(), WARM, EMA, *pool(50_000, 4)])}


def arguments():
    parser = console.Parser(__doc__, allow_abbrev=False)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, (train, rows) in PARTS.items():
        add(parts.add_parser(name, description=train.__doc__, allow_abbrev=False), rows)
    args = parser.parse_args()
    args.deadline = time.time() + 60 * args.minutes
    args.device, _ = device_and_dtype(args.device, torch.float32)
    return args


def main(args):
    PARTS[args.part][0](args)


if __name__ == "__main__":
    console.run(main, arguments)
