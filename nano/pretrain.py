"""Train the miniature Stable Diffusion from nothing:  for part in vae text unet; do python nano/pretrain.py $part; done

Each part checkpoints to --runs every two minutes and goes on from there when it is called again, on any device; its moving average is
written to nano/ in the hub's layout as fp16.
"""
import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
import clip  # noqa: E402
import console  # noqa: E402
import images  # noqa: E402
import sampling  # noqa: E402
import sd  # noqa: E402
import unet  # noqa: E402
import vae  # noqa: E402
from checkpoints import write  # noqa: E402
from nano import faces  # noqa: E402
from trainer import Ring, Trainer, seeded  # noqa: E402

HERE = Path(__file__).parent


def people(count, generator, device):
    """Random people in random styles: (pictures (count, 3, 128, 128), identity, style)."""
    identity = torch.rand(count, len(faces.IDENTITY), generator=generator)
    style = torch.randint(len(faces.STYLES), (count,), generator=generator)
    nuisance = faces.nuisances(count, generator)
    return faces.render(identity.to(device), nuisance.to(device), style.to(device)), identity, style


def psnr(a, b):
    """Mean over pictures in [-1, 1] of the peak signal-to-noise ratio, dB."""
    return (10 * torch.log10(4 / (a.clamp(-1, 1) - b).pow(2).mean((1, 2, 3)))).mean().item()


def save(module, folder, file):
    write({k: v.half() for k, v in module.state_dict().items()}, HERE / folder / file)
    (HERE / folder / "config.json").write_text(json.dumps(asdict(module.config), indent=1) + "\n")


def train_vae(args):
    """Squared error + a little absolute error and KL. The decoder may go on alone (--decoder) once a UNet lives in the encoder's space."""
    with seeded(args.seed):
        model = vae.VAE(vae.NANO).to(args.device)
        initialise(model)
    modules = {"vae": model}
    if args.decoder or args.warm:
        restore(model, "vae/diffusion_pytorch_model.safetensors")
    if args.decoder:
        modules = {"decoder": model.decoder, "post": model.post_quant_conv}
        model.encoder.requires_grad_(False)
    trainer = Trainer(modules, Path(args.runs) / ("decoder" if args.decoder else "vae"), args.steps, args.lr, minutes=args.minutes, muon=True)
    test, _, _ = people(64, torch.Generator().manual_seed(10_000_000), args.device)
    for step in trainer:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x, _, _ = people(args.batch, generator, args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            mean, logvar = (t.float() for t in model.encode(x))
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(x)
            y = model.decode(z).float()
        mse, mae = (y - x).pow(2).mean(), (y - x).abs().mean()
        kl = .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        trainer.update(mse + .05 * mae + (0 if args.decoder else 3e-5 * kl), mse=mse, kl=kl)
        if trainer.step % 500 == 0:
            with torch.no_grad():
                y = torch.cat([model.decode(model.encode(t)[0]) for t in test.split(8)])
            trainer.log(psnr=psnr(y, test))
            images.save(images.sheet(torch.cat([test[:11], y[:11]]), 11), trainer.out / "reconstructions.png", step=trainer.step)
    if not trainer.done:
        return
    trainer.average()
    with torch.no_grad():
        z = torch.cat([model.encode(people(16, torch.Generator().manual_seed(s), args.device)[0])[0] for s in range(32)])
        if not args.decoder:
            standardise(model, z.mean((0, 2, 3)), z.std((0, 2, 3)))
        y = torch.cat([model.decode(model.encode(t)[0]) for t in test.split(8)])
    print(f"held-out PSNR {psnr(y, test):.2f} dB")
    images.save(images.sheet(torch.cat([test[:11], y[:11]]), 11), trainer.out / "reconstructions.png", step=trainer.step)
    save(model, "vae", "diffusion_pytorch_model.safetensors")


def standardise(model, mean, std):
    """Fold a shift and scale of the latent into the 1×1 convolutions beside it, so that every channel has mean 0 and variance 1."""
    out, back = model.quant_conv, model.post_quant_conv
    c = len(mean)
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]
    out.weight[:c] /= std[:, None, None, None]
    out.bias[:c] = (out.bias[:c] - mean) / std
    out.bias[c:] -= 2 * std.log()


def restore(module, file):
    module.load_state_dict({k: v.float() for k, v in load_file(HERE / file).items()})


def tokenizer():
    """CLIP's tokenizer over a vocabulary in which every word of the captions is one token and any other text is spelt in pieces."""
    words = [*faces.STYLES.values(), *faces.HAIR_STYLES, *faces.HAIR_WORDS, *faces.SKIN_WORDS, *faces.BEARD_WORDS, *faces.GLASSES_WORDS]
    vocab, merges = clip.learn_bpe(sorted({w for text in words for w in text.replace("{}", "").split()} | {"skin", "with", "and", *faces.RARE}))
    return clip.Tokenizer(vocab, merges, clip.NANO.max_position_embeddings)


def train_text(args):
    """Teach the text encoder what its captions say, as CLIP's has learnt it from pictures before Stable Diffusion uses it: from the end of
    the text on, every hidden state must tell the style and, where they are mentioned, the attributes.

    (Trained with the UNet alone it finds the styles, which change the whole picture, and forgets the quieter words.)
    """
    words = tokenizer()
    kinds = {"style": len(faces.STYLES), **{k: n + 1 for k, n in faces.ATTRIBUTES.items()}}  # 0: not said
    with seeded(args.seed):
        text = clip.TextTransformer(clip.NANO).to(args.device)
        initialise(text)
        heads = torch.nn.Linear(clip.NANO.hidden_size, sum(kinds.values())).to(args.device)
    trainer = Trainer({"text": text, "heads": heads}, Path(args.runs) / "text", args.steps, args.lr, minutes=args.minutes)
    for step in trainer:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        identity = torch.rand(args.batch, len(faces.IDENTITY), generator=generator)
        said = torch.rand(args.batch, generator=generator) < .7
        style = torch.randint(len(faces.STYLES), (args.batch,), generator=generator)
        captions = [faces.captions(i[None], s[None], generator, words=w, drop=0.)[0] for i, s, w in zip(identity, style, said.float())]
        ids = words(captions).to(args.device)
        told = faces.attributes(identity)
        truth = {"style": style, **{k: (v + 1) * said for k, v in told.items()}}
        truth["hair_colour"] *= told["hair_style"] > 0  # nobody speaks of a bald person's
        after = (ids == ids.max()).float()  # from the end-of-text token on
        loss = 0
        for logits, target in zip(heads(text(ids)).split(list(kinds.values()), 2), truth.values()):
            error = torch.nn.functional.cross_entropy(logits.mT, target.to(args.device)[:, None].expand_as(ids), reduction="none")
            loss = loss + (after * error).sum() / after.sum() / len(kinds)
        trainer.update(loss)
    if not trainer.done:
        return
    trainer.average()
    save(text, "text_encoder", "model.safetensors")
    (HERE / "tokenizer").mkdir(exist_ok=True)
    words.save(HERE / "tokenizer")


def train_unet(args):
    """The noise-prediction loss, weighted by min(SNR, 5) / SNR (Hang et al., 2303.09556); autoencoder and text encoder stay as they are."""
    text, encoder = clip.TextTransformer(clip.NANO), vae.VAE(vae.NANO)
    with seeded(args.seed):
        model = unet.UNet(unet.NANO)
        initialise(model)
    torch.nn.init.zeros_(model.conv_out.weight)
    restore(text, "text_encoder/model.safetensors")
    restore(encoder, "vae/diffusion_pytorch_model.safetensors")
    if args.warm:
        restore(model, "unet/diffusion_pytorch_model.safetensors")
    for m in (model, text, encoder):
        m.to(args.device)
    words = tokenizer()
    pool = Ring(args.pool)  # latents are seen a few times each: drawing and encoding cost as much as training on them

    @torch.no_grad()
    def add(count, generator):
        pictures, identity, style = people(count, generator, args.device)
        pool.add(torch.cat([encoder.encode(x)[0] for x in pictures.split(128)]), identity, style)

    trainer = Trainer({"unet": model}, Path(args.runs) / "unet", args.steps, args.lr, ema=args.ema, minutes=args.minutes, muon=True)
    add(256 * args.fresh, torch.Generator().manual_seed(args.seed + 500_000_000 + trainer.step))
    snr = sampling.ALPHAS_CUMPROD / (1 - sampling.ALPHAS_CUMPROD)
    weight = (snr.clamp(max=5) / snr).to(args.device)
    for step in trainer:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        add(args.fresh, generator)
        z, identity, style = pool[torch.randint(len(pool), (args.batch,), generator=generator)]
        ids = words(faces.captions(identity, style, generator)).to(args.device)
        t = torch.randint(sampling.STEPS, (args.batch,), generator=generator).to(args.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        with torch.no_grad():
            context = text(ids)
        error = (model(sampling.add_noise(z, noise, t), t, context) - noise).pow(2).mean((1, 2, 3))
        trainer.update((weight[t] * error).mean(), mse=error.mean())
        if trainer.step % 500 == 0:
            preview(model, text, words, encoder, trainer.out / f"samples_{trainer.step:06d}.png")
    if not trainer.done:
        return
    trainer.average()
    preview(model, text, words, encoder, trainer.out / "samples.png")
    save(model, "unet", "diffusion_pytorch_model.safetensors")


def initialise(model):
    """Keep the signal's variance through the network, residual branches starting at zero; PyTorch's default for convolutions shrinks it
    by √3 a layer under biases that don't shrink, and a small model takes thousands of steps to find the colours again. Token embeddings
    are small, so that unseen words stay quiet."""
    for name, m in model.named_modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
            last = name.endswith(("conv2", "proj_out", "to_out.0", "out_proj", "net.2", "fc2"))
            torch.nn.init.normal_(m.weight, std=0 if last else m.weight[0].numel() ** -.5)
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
        elif isinstance(m, torch.nn.Embedding):
            torch.nn.init.normal_(m.weight, std=.02)


@torch.no_grad()
def preview(model, text, words, decoder, path):
    """Two guided samples of every style, one with attribute words."""
    identity, style = faces.identities(range(10_000_000, 10_000_011)).repeat(2, 1), torch.arange(len(faces.STYLES)).repeat(2)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    prompts = faces.captions(identity[:11], style[:11], generator, 0., 0., 0.) + faces.captions(identity[11:], style[11:], generator, 1., 0., 0.)
    denoise = sampling.guided(model, text(words(prompts).to(device)), text(words([""]).to(device)), 3.)
    z = sampling.dpmpp_2m(denoise, sampling.noise((22, 4, 16, 16), list(range(22))).to(device), 20)
    images.save(images.sheet(decoder.decode(z), 11), path, prompts=" | ".join(prompts), seeds="0 to 21", guidance=3, steps=20)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", choices=["vae", "text", "unet"])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long, to be resumed; nano/ is written at the end alone")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder", action="store_true", help="vae: train only the decoder of nano/vae further")
    parser.add_argument("--warm", action="store_true", help="vae, unet: start from the weights in nano/ instead of from nothing")
    parser.add_argument("--bf16", action="store_true", help="vae: compute in bfloat16, on hardware that has it")
    parser.add_argument("--ema", type=float, default=.998)
    parser.add_argument("--pool", type=int, default=50_000, help="unet: latents kept")
    parser.add_argument("--fresh", type=int, default=4, help="unet: new pictures a step")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--device")
    args = parser.parse_args()
    if args.part == "text" and args.warm or args.part != "vae" and (args.decoder or args.bf16):
        parser.error(f"--warm, --decoder and --bf16 are not for {args.part}, but as --help says")
    console.check_ranges(parser, args, steps=(1, 10 ** 6), minutes=(0, float("inf")), batch=(1, 4096), lr=(0, 1), ema=(0, 1), pool=(1, 10 ** 8),
                         fresh=(1, 4096), seed=(0, faces.SEEDS))
    args.device, _ = sd.place(args.device, torch.float32)
    return args


def main(args):
    {"vae": train_vae, "text": train_text, "unet": train_unet}[args.part](args)


if __name__ == "__main__":
    console.run(main, arguments)
