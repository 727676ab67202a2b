"""Train a hypernetwork (HyperDreamBooth, section 4.2, Eq. 2).

    python train.py                          # nano's, on people that its renderer draws
    python train.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --faces photos/

Three stages. Each resumes with the same command; --minutes limits all together:
  1. nano without --start: train the encoder of photos, if runs/ has no finished one
     (nano/training/pretrain.py encoder);
  2. --beta above 0: fit the target θ of Eq. 2 for every person;
  3. train the hypernetwork. runs/<name>/log.jsonl gets the loss and, every --every steps, measurements of
     people kept apart, with pictures beside it. On nano they are the judge's likeness; for photos the
     denoising loss with their own θ, another person's and none. The gap between own and another's shows what
     the hypernetwork knows of identity.

Two things go beyond the paper, which is silent on both. The loss sees each sample's estimate after a random
number of passes (left_after): this trains every estimate of Eq. 3, not the last alone. And some samples show
a stranger, under a prompt without [V] and with the person's weights on: the weights learn to act on [V]
alone. On nano, some other prompts speak of looks.

It encodes photos once, before the first step. On N GPUs, each with --batch people:
torchrun --nproc-per-node=N -- train.py …"""
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from program import console

import torch
from tqdm import tqdm

import hdb
from diffusion import noised
from program import distributed
from program.lock import alone
from files.checkpoints import build, checksum
from files.encoders import FACE_ENCODER, load_vit
from files.hypernetwork import load_hypernet, save_hypernet
from files.layouts import model_name
from training.parts import cached, load_all
from program.options import (Option, early, folder_of_faces, model_rows, number, old_file, parser_of, refused,
                             run_rows, same, training_rows, usual_steps)
from hypernet import HyperConfig, HyperNetwork
from nano import people, seeds
from nano.training import pretrain
from training.trainer import Trainer, say_start, global_seed
from vit import NANO_VIT, ViT, encode_face

WATCHED = 16  # people that nano's training measures and draws


def main(args):
    deadline = time.time() + 60 * args.minutes
    args.device = distributed.join(args.device)
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    hypernet = hypernetwork(args, model, deadline)
    method, nano = hdb.HyperDreamBooth(model, hypernet), args.model == "nano"
    folder = Path(args.out) / args.name
    data, watched = people.to_train_on(args, model, hypernet.vit, hdb.PROMPT, folder / "photos", deadline,
                                       WATCHED, apart=args.watch)

    # What θ and the run depend on
    of = model.checksums | {"basis": method.lidb.checksum, "faces": None if nano else data.content}
    own = {name: getattr(args, name) for name in ("lr", "batch", "seed", "alpha", "beta", "watch")}
    own |= {"iterations": hypernet.config.iterations}
    own |= {"encoder": checksum(hypernet.vit), "start": checksum(hypernet)}
    rank, size = distributed.rank_and_size()
    steps = args.steps or usual_steps(data.count, args.batch * size)
    trainer = Trainer({"hypernet": hypernet}, folder, steps, args.lr, deadline=deadline, muon=True,
                      depends_on=of | own)
    say_start(trainer, model, data, args.batch)
    targets = None
    if args.beta:
        data.count = args.targets if nano else data.count  # people that targets are fitted for
        targets = fit_targets(method, data, args, folder / "targets", of, deadline)

    # Each process takes --batch people of a larger batch
    mine = slice(rank * args.batch, (rank + 1) * args.batch)
    for step in trainer:
        generator = hdb.seeded(seeds.seed(args.seed, step, seeds.HYPERNET))
        who = torch.randint(data.count, (size * args.batch,), generator=generator)
        features, latents, prompts = data.samples(who, generator, mine)
        # the loss sees each sample's estimate after a random number of passes
        after = left_after(len(who), hypernet.config.iterations, step / trainer.steps, generator)[mine]
        theta = hypernet.passes(features)[after, torch.arange(len(after))]
        target = None if targets is None else targets[who[mine]].to(model.device)
        noisy = noised(latents, generator, part=(rank, size))
        with model.adapted(method.lidb.adapters(theta)):
            loss, *terms = hdb.hyper_loss(model, prompts, noisy, theta, target, args.alpha, args.beta)
            trainer.update(loss, **dict(zip(("denoising", "distance"), terms)))
        if watched and distributed.is_main() and (trainer.step % args.every == 0 or trainer.done):
            with trainer.averaged():
                seen = encode_face(hypernet.vit, watched.photos) if nano else watched.features
                estimates = hypernet.passes(seen).detach()
            watched.watch(model, [method.lidb.adapters(theta) for theta in estimates[1:]], trainer)
    trainer.finish(args.save, "hypernet.safetensors", partial(save_hypernet, hypernet, model))


def left_after(count, iterations, progress, generator):
    """For `count` samples the pass, 1 to `iterations`, whose estimate the loss sees: all equally likely in
    the first half of a training (progress below .5), then k passes k times as likely as 1."""
    weights = torch.ones(iterations) if progress < .5 else torch.arange(1., iterations + 1)
    return 1 + torch.multinomial(weights, count, replacement=True, generator=generator)


def hypernetwork(args, model, deadline):
    """The HyperNetwork to train: --start's, or a fresh one with a frozen encoder. An official encoder's
    weights stay in its file until training/photos.py reads them."""
    if args.start:
        hypernet = load_hypernet(args.start, model).requires_grad_()
        if args.iterations:
            hypernet.config = replace(hypernet.config, iterations=args.iterations)
    else:
        encoder = ""
        if args.model == "nano":
            vit = nano_encoder(args, model.device, deadline)
        else:
            vit = load_vit(args.encoder, "meta")
            encoder = vit.source
        shape = hdb.HyperDreamBooth(model).lidb.shape
        config = HyperConfig(*shape, iterations=args.iterations or 4, vit=vit.config, encoder=encoder)
        with global_seed(args.seed):
            hypernet = HyperNetwork(config, torch.nn.Identity()).to(model.device)
        hypernet.vit = vit
    hypernet.vit.requires_grad_(False)
    return hypernet


def nano_encoder(args, device, deadline):
    """nano's ViT in --out, frozen, which it trains if it isn't there."""
    file = Path(args.out) / "encoder/vit.safetensors"
    if not file.exists():
        _, rows = pretrain.PARTS["encoder"]
        where = {"runs": args.out, "device": device, "deadline": deadline}
        pretrain.train_encoder(SimpleNamespace(**{row.name: row.nano for row in rows} | where))
    if not file.exists():
        raise console.Stopped(0, "stopped with the encoder half trained; the same command resumes it")
    print(f"encoder: {file}")
    return build(ViT, NANO_VIT, [file], str, device, torch.float32)


def fit_targets(method, data, args, folder, of, deadline):
    """Target θ (P, layers, size) for all people of `data`, on the CPU, fitted --batch at once. It takes those
    in `folder` from there (LoadError for another run's, as in training.parts)."""
    def fitted(who):
        generator = hdb.seeded(args.seed + who[0].item())

        def pictures():
            """One picture of each of these people."""
            return data.pictures(who, generator)
        with tqdm(total=args.target_steps, desc="steps of a part", leave=False) as bar:
            theta = method.fit_theta(pictures, len(who), args.target_steps, args.target_lr, generator,
                                     lambda *step: console.advance(bar))
        return {"theta": theta}
    groups = torch.arange(data.count).split(args.batch)
    settings = {name: getattr(args, name) for name in ("seed", "batch", "target_steps", "target_lr")}
    shapes = {"theta": method.lidb.shape}
    parts = cached(folder, groups, of | settings, shapes, fitted, "targets", deadline)
    theta = load_all(parts, "theta")
    if len(theta) != data.count:
        raise console.UserError(f"{folder}: damaged, {len(theta)} targets for {data.count} people; remove it")
    return theta


def arguments():
    model = model_name(early("model").model or "nano")
    nano = model == "nano"
    usual = (3000, 24, 6e-4, seeds.STEPS, seeds.SEEDS) if nano else (None, 16, 3e-4)
    own = "--encoder cannot be chosen for nano or with --start, which bring their own"
    parser = parser_of(__doc__, [
        *model_rows(model_name), folder_of_faces(model),
        Option("encoder", refused(own) if nano else str, None, FACE_ENCODER, "ViT that encodes the photos; "
               "nano and --start bring their own"),
        same("start", old_file, None, "hypernetwork to continue, with its encoder; default: a new one",
             metavar="FILE"),
        *training_rows(*usual),
        same("iterations", number(int, 1, 64), None, "s of Eq. 3; default: --start's, or else 4"),
        same("alpha", number(float, 0, 10 ** 6), 1., "weight of Eq. 2's denoising term"),
        same("beta", number(float, 0, 10 ** 6), 0., "weight of Eq. 2's distance to fitted targets"),
        same("targets", number(int, 1, 10 ** 6), 1024, "nano: people to fit targets for"),
        same("target-steps", number(int, 1, 10 ** 6), 150, "steps to fit a target"),
        same("target-lr", number(float, 0, 1), .02, "learning rate to fit a target"),
        Option("watch", refused("--watch is for --faces") if nano else number(int, 0, 64), 0, 8,
               "photos of --faces to keep apart and measure every --every steps, at most a quarter"),
        *run_rows("hypernet", 250)], model)
    args = parser.parse_args()
    if args.start and args.encoder not in (None, FACE_ENCODER):
        parser.error(own)
    if not args.alpha and not args.beta:
        parser.error("--alpha and --beta cannot both be 0")
    return args


if __name__ == "__main__":
    console.run(alone(main, lambda args: Path(args.out, args.name)), arguments)
