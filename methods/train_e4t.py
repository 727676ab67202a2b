"""Pre-train E4T's encoder and offsets (arXiv 2302.12228, section 4.1) on a domain: faces.

    python -m methods.train_e4t                       # for nano, on people that its renderer draws
    python -m methods.train_e4t --model stable-diffusion-v1-5/stable-diffusion-v1-5 --faces photos/

It trains on the same people and pictures as train.py, so HyperDreamBooth and E4T can be compared: the input
is a photo of a person, and the picture to denoise is another one, with its prompt. The same command resumes a
training. The paper uses a learning rate of 1e-6 and batch 16, and trains all of Stable Diffusion as well.
Here the model stays frozen; encoder and offsets start from nothing and take a higher rate."""
import time
from pathlib import Path

from program import console

import torch
from torch import nn

import hdb
from diffusion import denoising_loss
from files.checkpoints import checksum
from files.encoders import FACE_ENCODER
from files.layouts import model_name
from methods import e4t
from nano import people, seeds
from program.lock import alone
from program.options import (Option, early, folder_of_faces, model_rows, parser_of, refused, run_rows,
                             training_rows, usual_steps)
from training.trainer import Trainer, global_seed, say_start

WATCHED = 8  # people of nano whose pictures are measured during training


class Offset(nn.Module):
    """Δ of one layer, from a learnt vector. Two linear maps make the factors of a rank-one matrix, and two
    more act along its axes. Only the last starts at zero, so Δ = 0 at first, and its gradient is not."""

    def __init__(self, layer, width=4):
        super().__init__()
        size_out, size_in = layer.weight.shape
        self.vector = nn.Parameter(torch.randn(width))
        self.row, self.column = nn.Linear(width, size_out), nn.Linear(width, size_in)
        self.along_rows, self.along_columns = nn.Linear(size_out, size_out), nn.Linear(size_in, size_in)
        for p in self.along_columns.parameters():
            nn.init.zeros_(p)

    def forward(self):
        """rows (out, 3) and columns (in, 3) with rows·columnsᵀ = Δ = (A·row·columnᵀ + a·1ᵀ)·Bᵀ + 1·bᵀ, where
        A, a and B, b belong to the two maps along the axes."""
        row, column = self.row(self.vector), self.column(self.vector)
        first, second = self.along_rows, self.along_columns
        rows = first.weight @ row, first.bias, torch.ones_like(row)
        columns = second.weight @ column, second.weight.sum(1), second.bias
        return torch.stack(rows, 1), torch.stack(columns, 1)


def main(args):
    deadline = time.time() + 60 * args.minutes
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    vit = e4t.load_looker(e4t.NANO_LOOKER if args.model == "nano" else args.encoder, model)
    folder = Path(args.out) / args.name
    data, watched = people.to_train_on(args, model, vit, hdb.PROMPT, folder / "photos", deadline, WATCHED,
                                       others=0, looks=0)
    with global_seed(args.seed):
        domain = e4t.Domain(e4t.EncoderConfig(vit.config.hidden_size), model).to(model.device)
        domain.vit = vit
        deltas = nn.ModuleList(Offset(layer) for layer in e4t.attention(model).values()).to(model.device)

    steps = args.steps or usual_steps(data.count, args.batch)
    of = model.checksums | {"faces": None if watched else data.content, "vit": checksum(vit)}
    of |= {name: getattr(args, name) for name in ("lr", "batch", "seed")}
    trainer = Trainer({"encoder": domain.encoder, "offsets": deltas}, folder, steps, args.lr, warmup=20,
                      deadline=deadline, muon=True, depends_on=of)
    say_start(trainer, model, data, args.batch)
    for step in trainer:
        # the same people as in train.py
        generator = hdb.seeded(seeds.seed(args.seed, step, seeds.HYPERNET))
        who = torch.randint(data.count, (args.batch,), generator=generator)
        features, latents, prompts = data.samples(who, generator)
        adapters = in_training(domain, deltas, model, features.mean(1))
        with model.adapted(adapters):
            denoising = denoising_loss(model, latents, prompts, generator)
            loss, size = e4t.total(denoising, adapters["unet."])
            trainer.update(loss, denoising=denoising.mean(), size=size)
        if watched and (trainer.step % args.every == 0 or trainer.done):
            with torch.no_grad():
                adapters = in_training(domain, deltas, model, domain.look(watched.photos))
            watched.watch(model, [adapters], trainer)

    @torch.no_grad()
    def write(file):
        for rows, columns, delta in zip(domain.rows, domain.columns, deltas):
            rows[:], columns[:] = delta()
        e4t.save_domain(domain, model, vit.source, file)
    trainer.finish(args.save, "e4t.safetensors", write)


def in_training(domain, deltas, model, seen):
    """The adapters of people whose photos have the mean tokens `seen` (P, photo)."""
    factors = zip(*(delta() for delta in deltas))
    return e4t.offsets(model, *factors) | e4t.words(model, seen, domain.encoder)


def arguments():
    model = model_name(early("model").model or "nano")
    nano = model == "nano"
    usual = (3000, 16, 3e-3, seeds.STEPS, seeds.SEEDS) if nano else (None, 16, 3e-3)
    own = refused("--encoder cannot be chosen for nano, which brings its own")
    return parser_of(__doc__, [
        *model_rows(model_name), folder_of_faces(model),
        Option("encoder", own if nano else str, None, FACE_ENCODER, "ViT that encodes photos; nano has one"),
        *training_rows(*usual), *run_rows("e4t", 100)], model).parse_args()


if __name__ == "__main__":
    console.run(alone(main, lambda args: Path(args.out, args.name)), arguments)
