"""Train a hypernetwork (HyperDreamBooth, section 4.2, Eq. 2).

    python train.py                                      # the miniature's, on people that its renderer draws
    python train.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --faces photos/

Progress, the loss and, for the miniature, the likeness and style of held-out people go to runs/<name>/log.jsonl, with pictures beside it.
The same command resumes what was stopped.
"""
import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import console
import hdb
import images
from checkpoints import read, write
from hypernet import HyperConfig, HyperNetwork
from trainer import Trainer, backward, seeded

ENCODER = "google/vit-huge-patch14-224-in21k"


class Photos:
    """A folder of face photos as pairs for Eq. 2: the features of a photo, and its own latent with "a [V] face"."""

    def __init__(self, folder, model, vit, device):
        side = 8 * model.unet.config.sample_size
        if not Path(folder).is_dir():
            raise images.ImageError(f"{folder}: no such folder")
        files = sorted(p for p in Path(folder).iterdir() if p.name[0] != "." and p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp"))
        if not files:
            raise images.ImageError(f"{folder}: holds no photos (.jpg, .png, .webp, .bmp)")
        features, latents = [], []
        for file in tqdm(files, desc="photos"):
            photo = images.read(file, side).to(device)
            for view in (photo, photo.flip(3)):
                features.append(hdb.encode_face(vit, view).half().cpu())  # of 15,000 people they would fill a GPU
                latents.append(model.encode(view))
        self.features, self.latents = torch.cat(features), torch.stack(latents)  # (2·P, n, d), (2·P, 1, 4, h, w)

    def fix(self, count, generator):
        """The people that targets are fitted for: all of them."""

    def prompts(self, who, view):
        return [hdb.PROMPT] * len(who)

    def draw(self, count, generator):
        """Indices (count,) of people and of their views."""
        return torch.randint(len(self.latents), (count,), generator=generator), torch.zeros(count, dtype=torch.long)


def fit_targets(method, data, steps, lr, batch, generator):
    """Target θ (P, layers, size) of Eq. 2 for all people of `data`, `batch` at once, all from the one shared start, by the denoising loss
    on their pictures."""
    people, views = data.latents.shape[:2]
    fitted = []
    for who in tqdm(torch.arange(people).split(batch), desc="targets"):
        theta = torch.zeros(len(who), *method.lidb.shape, device=data.latents.device, requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=lr, betas=(.9, .99))
        for _ in range(steps):
            view = torch.randint(views, (len(who),), generator=generator)
            method.personal.factors = method.lidb.factors(theta)
            backward(method.denoising_loss(data.latents[who, view], data.prompts(who, view), generator).sum(), [theta])
            optimizer.step()
            optimizer.zero_grad()
        fitted.append(theta.detach())
    return torch.cat(fitted)


def train(args):
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    device, out, faces = model.device, Path(args.out), args.faces and os.path.abspath(args.faces)
    start = hdb.load_hypernet(args.start, model) if args.start else None
    method = hdb.HyperDreamBooth(model, start)
    model.unet.gradient_checkpointing = args.model != "nano"
    if args.model == "nano":
        from nano import people  # the one place where the miniature brings its own data
        vit, encoder = people.encoder(out, device, start=start and start.vit.state_dict()), None
        data, held_out = people.People(model, vit, device), people.HeldOut(16, device)
    else:
        encoder = start.encoder if start else os.path.abspath(args.encoder) if os.path.isdir(args.encoder) else args.encoder
        vit = start.vit if start else hdb.load_vit(encoder, device)
        data, held_out = Photos(args.faces, model, vit, device), None
    iterations = args.iterations or (start.config.iterations if start else 4)
    if start:
        start.config, start.vit = replace(start.config, iterations=iterations), vit
        start.requires_grad_()
    else:
        with seeded(args.seed):
            method.hypernet = HyperNetwork(HyperConfig(*method.lidb.shape, iterations=iterations, vit=vit.config), vit).to(device)
    vit.requires_grad_(False)
    trainer = Trainer({"hypernet": method.hypernet}, out / args.name, args.steps, args.lr, minutes=args.minutes, muon=True,
                      of=f"start {args.start and os.path.abspath(args.start)}, basis {method.lidb.checksum}, faces {faces}")
    targets = None
    if args.beta:
        data.fix(args.targets, torch.Generator().manual_seed(args.seed + 600_000_000))
        file = out / args.name / "targets.safetensors"
        whose = {"people": str(len(data.latents)), "of": faces or f"seed {args.seed}", "basis": str(method.lidb.checksum)}
        if not file.exists():
            theta = fit_targets(method, data, args.target_steps, args.target_lr, args.batch, torch.Generator().manual_seed(args.seed))
            write({"theta": theta}, file, whose)
        with read(file) as f:
            found, targets = f.metadata() or {}, f.get_tensor("theta").to(device)
        if differ := [f"{key} {found.get(key)}, not {value}" for key, value in whose.items() if found.get(key) != value]:
            raise hdb.LoadError(f"{file}: fitted for {'; '.join(differ)}; remove it, or go on as before")
    for step in trainer:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 400_000_000)
        who, view = data.draw(args.batch, generator)
        # s grows to its full value by half-time; what has learnt to iterate goes on with all of it
        s = iterations if start else max(1, min(iterations, 1 + (iterations * 2 * step) // args.steps))
        theta = method.hypernet.refine(data.features[who].to(device).float(), s)
        loss, denoising, distance = method.hyper_loss(theta, data.latents[who, view], data.prompts(who, view), generator,
                                                      None if targets is None else targets[who], args.alpha, args.beta)
        trainer.update(loss, denoising=denoising, distance=distance)
        if held_out and (trainer.step % args.every == 0 or trainer.step == args.steps):
            show(method, held_out, trainer)
    trainer.average()
    hdb.save_hypernet(method.hypernet, method, args.save or out / args.name / "hypernet.safetensors", encoder)


def show(method, held_out, trainer):
    """Log the held-out likeness and style accuracy of predictions and draw them: photo, plain, styled."""
    method.hypernet.eval()
    factors = method.lidb.factors(method.predict(held_out.photos))
    seeds, columns, numbers = list(range(len(held_out.photos))), [held_out.photos], {}
    for style in ("photo", "rock star", "pixar"):
        pictures, likeness, right = held_out.measure(method, factors, style, seeds, steps=12)
        columns.append(pictures)
        numbers |= {f"likeness {style}": likeness.mean().item(), f"style {style}": right.mean().item()}
    method.hypernet.train()
    trainer.log(**numbers)
    tqdm.write(", ".join(f"{k} {v:.2f}" for k, v in numbers.items()))
    images.save(images.sheet(torch.stack(columns, 1).flatten(0, 1), 16), trainer.out / f"step_{trainer.step:06d}.png", **numbers)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=hdb.model_name, default="nano", help="nano, a hub id, a folder or a .safetensors file")
    parser.add_argument("--faces", help="folder of photos, one person each (nano draws its own)")
    parser.add_argument("--encoder", default=ENCODER, help="ViT to encode photos with; nano and --start bring their own")
    parser.add_argument("--start", metavar="FILE", help="hypernetwork to go on from; nano's encoder goes on as well")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long, to be resumed by the same command")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--iterations", type=int, help="s of Eq. 3; if not given, that of --start, or else 4")
    parser.add_argument("--alpha", type=float, default=1., help="weight of Eq. 2's denoising term")
    parser.add_argument("--beta", type=float, default=0., help="weight of Eq. 2's distance to fitted targets")
    parser.add_argument("--targets", type=int, default=1024, help="nano: people that targets are fitted for, if beta > 0")
    parser.add_argument("--target-steps", type=int, default=150)
    parser.add_argument("--target-lr", type=float, default=.02)
    parser.add_argument("--every", type=int, default=250, help="steps between pictures of held-out people")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="hypernet", help="of this run's folder in --out")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--save", help="where the result goes, if not into the run's folder")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    if (args.model == "nano") == bool(args.faces):
        parser.error("--faces is for a model other than nano, and needed there")
    console.check_ranges(parser, args, steps=(1, 10 ** 9), minutes=(0, math.inf), batch=(1, 4096), lr=(0, 1), iterations=(1, 64), alpha=(0, 10 ** 6),
                         beta=(0, 10 ** 6), targets=(1, 10 ** 6), target_steps=(1, 10 ** 6), target_lr=(0, 1), every=(1, 10 ** 9), seed=(0, 2 ** 40))
    if args.encoder != ENCODER and (args.start or args.model == "nano"):
        parser.error("--encoder cannot be chosen for nano or with --start, which bring their own")
    if not args.alpha and not args.beta:
        parser.error("--alpha and --beta cannot both be 0")
    console.check_folder(parser, "--out", args.out)
    if args.save:
        console.check_folder(parser, "--save", Path(args.save).parent)
        if Path(args.save).is_dir():
            parser.error(f"--save {args.save} is a folder, not a file")
    return args


if __name__ == "__main__":
    console.run(train, arguments)
