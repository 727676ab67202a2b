"""E4T, encoder-based domain tuning (Gal et al., arXiv 2302.12228). An encoder E, trained on a domain, here
faces, predicts the word [V] at every step of sampling. Then 15 steps fine-tune encoder and UNet.

    python personalize.py face.png "a [V] face as a rock star" --method e4t

The word embedding is e = e_face + s·E(photo, z_t, t). It changes with z_t, so the text encoder has to run in
each call of the UNet. One adapter therefore makes the text encoder return word embeddings with a hole at [V]
(Hole); another fills the hole when the UNet is called, and runs the text encoder (Word).

Pre-training (train_e4t.py) also learns offsets W' = W ⊙ (1 + Δ) of the UNet's attention. The UNet of a person
is fine-tuned from W', so its difference from the model's UNet includes both."""
import copy
import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from adapters import Change, merge, shared
from clip import IDENTIFIER
from diffusion import denoising_loss
from files.checkpoints import Tensors, build, checksum, configure, write
from files.disk import refusing
from files.encoders import load_vit, loaded, vit_of
from files.hypernetwork import load_hypernet, warn_of_other_weights
from files.layouts import HERE
from files.person import Person
from hdb import PROMPT, seeded
from methods import dreambooth
from methods.protocol import Method
from methods.textual_inversion import CLASS, only_token
from program.console import UserError
from program.options import Option, number, old_file, same
from training.fit import fit_or_take_back
from vit import encode_face

# s, and λ of ‖E‖² in the loss; the paper has .1 and .01. Word embeddings have a norm of about .2; those of
# people are longer: Textual Inversion's on nano has a likeness of .6 at .9, of .8 at 2.6.
STRENGTH, LAMBDA = 1., 1e-4
NANO_LOOKER = "nano/hypernet.safetensors"  # contains nano's encoder of photos


@dataclass(frozen=True)
class EncoderConfig:
    photo: int = 128   # width of the photo's tokens
    width: int = 384   # width of the hidden layers


class Encoder(nn.Module):
    """E maps the mean of a photo's tokens (B, photo) and u (B, features), the UNet's features of z_t, to the
    difference (B, d) of the word from the class word, in units of s.

    The paper maps every token, [h_i; u], linearly and takes the mean. That equals the map of the mean, so the
    mean of a photo's tokens is enough."""

    def __init__(self, config, model):
        super().__init__()
        self.first = nn.Linear(features(model.unet.config), config.width)
        self.second = nn.Linear(config.width, config.width)
        self.both = nn.Linear(config.photo + config.width, config.width)
        self.word = nn.Linear(config.width, model.text.config.hidden_size)

    def forward(self, photo, u):
        u = F.leaky_relu(self.first(u))
        u = F.leaky_relu(self.second(u))
        both = self.both(torch.cat([photo, u], 1))
        return self.word(F.leaky_relu(both))


class Domain(nn.Module):
    """The result of pre-training, for all people: `encoder`, and the factors of Δ for each attention layer,
    rows (out, 3) and columns (in, 3). `vit` encodes photos and is not saved with it."""

    def __init__(self, config, model):
        super().__init__()
        self.config, self.vit, self.encoder = config, nn.Identity(), Encoder(config, model)
        layers = attention(model).values()
        self.rows = nn.ParameterList(torch.zeros(layer.out_features, 3) for layer in layers)
        self.columns = nn.ParameterList(torch.zeros(layer.in_features, 3) for layer in layers)

    def look(self, photo):
        """Photos (B, 3, H, W) in [-1, 1] -> the mean of their tokens (B, photo)."""
        return encode_face(loaded(self.vit, photo.device), photo).float().mean(1)


def features(config):
    """The width of u: the channels of all skip connections of the UNet."""
    widths, each = config.block_out_channels, config.layers_per_block
    return widths[0] + sum(width * (each + 1) for width in widths) - widths[-1]


def attention(model):
    """The layers with offsets: name -> nn.Linear."""
    return {name: layer for name, layer in model.layers.items()
            if name.startswith("unet.") and name.endswith((".to_q", ".to_k", ".to_v"))}


# ------------------------------------------------------------------------------------------------------------
# As adapters

def offsets(model, rows, columns):
    """W' = W ⊙ (1 + Δ), Δ = rows·columnsᵀ, as an adapter of each attention layer."""
    return {name: Change({"weight": layer.weight * (row @ column.T).to(layer.weight)})
            for (name, layer), row, column in zip(attention(model).items(), rows, columns)}


def words(model, photo, encoder):
    """The adapters that replace [V] by E's word, of P people, by means of tokens `photo` (P, photo)."""
    return {"text.": Hole(only_token(model, IDENTIFIER)), "unet.": Word(model, photo, encoder)}


class Hole:
    """Adapter of the text encoder: word embeddings in place of its features, NaN at [V]."""

    def __init__(self, token):
        self.token = token

    def __call__(self, text, ids, y):
        words = text.text_model.embeddings.token_embedding(ids)
        return words.masked_fill((ids == self.token)[..., None], torch.nan)


class Word:
    """Adapter of the UNet: fills holes, runs the text encoder. `predicted` is E's last output (B, d)."""

    def __init__(self, model, photo, encoder):
        self.text, self.photo, self.encoder = model.text, photo, encoder
        table = model.text.text_model.embeddings.token_embedding
        self.face = table.weight[only_token(model, CLASS)]
        self.empty = model.text.read(table(model.tokenizer([""]).to(model.device)))

    def before(self, unet, inputs):
        x, t, words = inputs
        self.predicted = self.encode(unet, x, t)
        e = self.face + (STRENGTH * self.predicted).to(words.dtype)
        return x, t, self.text.read(torch.where(words.isnan(), e[:, None], words))

    def __call__(self, unet, x, y):
        return y

    def encode(self, unet, x, t):
        """E of each sample (B, d). ValueError for a batch that cannot be shared among the people."""
        photo = shared(self.photo, len(x)).expand(len(x), -1)
        # like the photo, u is an input: no gradient goes through it
        with torch.no_grad():
            skips, _ = unet.down(x, t, self.empty.expand(len(x), -1, -1))
            u = torch.cat([skip.mean((2, 3)) for skip in skips], 1).float()
        return self.encoder(photo, u)


def total(denoising, word):
    """(loss, ‖E‖²): the loss is the mean of denoising (B,), computed while `word` was applied, plus λ‖E‖²."""
    size = word.predicted.pow(2).sum(1).mean()
    return denoising.mean() + LAMBDA * size, size


# ------------------------------------------------------------------------------------------------------------
# One person

def learn(model, photo, domain, steps=15, lr=2e-4, batch=4, generator=None, callback=None):
    """A photo (1, 3, H, W) in [-1, 1] -> tensors for adapters(): the UNet and the encoder of `domain`,
    fine-tuned by `steps` on `batch` noises of the photo. callback(step, loss) after every step. ValueError
    for several people: each has a UNet of its own, so training them side by side would be no faster."""
    if len(photo) > 1:
        raise ValueError("E4T takes one person at a time")
    generator = generator or seeded(0)
    tuned, encoder = dreambooth.trainable_copy(model), copy.deepcopy(domain.encoder).requires_grad_()
    tuned.text.requires_grad_(False)
    merge(tuned.layers, offsets(tuned, domain.rows, domain.columns))
    seen, latent = domain.look(photo), model.encode(photo).float().repeat(batch, 1, 1, 1)
    inside = words(tuned, seen, encoder)

    def loss():
        denoising = denoising_loss(tuned, latent, [PROMPT], generator)
        return total(denoising, inside["unet."])[0]
    fit_or_take_back(loss, [*tuned.unet.parameters(), *encoder.parameters()], steps, lr,
                     lambda: tuned.adapted(inside), callback, replay=generator,
                     states=0)  # a state would be as large as the UNet
    changed = {k: t for k, t in dreambooth.differences(model, tuned).items() if k.startswith("unet.")}
    learnt = {f"encoder.{name}": p.detach()[None] for name, p in encoder.named_parameters()}
    return {"photo": seen} | learnt | changed


def adapters(tensors, engine):
    """The tensors of learn() as adapters: a Change of every UNet layer, Hole and Word."""
    model = engine.model
    changes = {name: t for name, t in tensors.items() if name.startswith("unet.")}
    encoder = empty_encoder(model, tensors)
    learnt = {name: tensors[f"encoder.{name}"][0] for name in encoder.state_dict()}
    encoder.load_state_dict(learnt, assign=True)
    return dreambooth.adapters(changes) | words(model, tensors["photo"], encoder)


def empty_encoder(model, tensors):
    """An Encoder on the meta device, with the widths of a person's."""
    photo, second = (tensors.get(name, torch.empty(1, 1)) for name in ("photo", "encoder.second.bias"))
    with torch.device("meta"):
        return Encoder(EncoderConfig(photo.shape[-1], second.shape[-1]), model)


def shapes(tensors, engine):
    """name -> shape of one person's tensors. The widths of a photo's tokens and of the encoder are free."""
    encoder, unet = empty_encoder(engine.model, tensors), engine.model.unet
    expected = {"photo": (1, encoder.both.in_features - encoder.second.out_features)}
    expected |= {f"encoder.{name}": (1, *p.shape) for name, p in encoder.named_parameters()}
    return expected | {f"unet.{name}": (1, *p.shape) for name, p in unet.named_parameters()}


# ------------------------------------------------------------------------------------------------------------
# What pre-training made, in a file

def save_domain(domain, model, source, path):
    """Write a Domain in fp16 that was pre-trained for `model` with the encoder of photos at `source`."""
    note = {"config": json.dumps(asdict(domain.config)), "vit": source, "model": model.name} | model.checksums
    kept = {key: t.half() for key, t in domain.state_dict().items() if not key.startswith("vit.")}
    write(kept, path, note | {"vit_checksum": checksum(domain.vit)})


def load_domain(path, model):
    """The Domain in a file of save_domain, in float32 on the model's device. LoadError for another or a
    damaged file and for layers that the model lacks; a warning if only the model's weights differ."""
    note = Tensors(path).note
    with refusing(f"{path}: not a file of methods/train_e4t.py"):
        config = configure(EncoderConfig(), json.loads(note["config"]), path)
        source, vit_checksum = note["vit"], note["vit_checksum"]
    domain = build(Domain, config, [path], str, model.device, torch.float32, model)  # str: keys are our names
    warn_of_other_weights(path, note, model)
    own = source == NANO_LOOKER
    domain.vit = load_looker(source, model) if own else vit_of(path, source, vit_checksum)
    return domain


def load_looker(source, model):
    """The encoder of photos: nano's, from its hypernetwork's file, or an official one without weights."""
    if source == NANO_LOOKER:
        vit = load_hypernet(HERE / source, model).vit
        vit.source = source
        return vit
    return load_vit(source, "meta")


# ------------------------------------------------------------------------------------------------------------
# As a method

def make(engine, photos, generators, args, stage):
    """Photos (1, 1, 3, H, W) to the Person. UserError if there is no pre-trained encoder."""
    file = args.encoder or (HERE / "nano/e4t.safetensors" if args.model == "nano" else None)
    if file is None:
        raise UserError(f"no encoder for {args.model}: give --encoder a file of train_e4t.py")
    domain = load_domain(file, engine.model)
    with stage.progress(args.steps) as show:
        tensors = learn(engine.model, photos[:, 0], domain, args.steps, args.lr, args.batch, generators[0],
                        show)
    stage(f"fine-tuned {args.steps} steps, learning rate {args.lr:g}")
    return Person(METHOD, tensors, args.model)


def options(model, hypernet=None):
    return [same("steps", number(int, 0, 100_000), 15, "fine-tuning steps; 0: the encoder alone"),
            Option("lr", number(float, 0, 1), 2e-4, 1.6e-5, "learning rate"),
            Option("batch", number(int, 1, 1024), 4, 16, "noises of the photo in each step"),
            same("encoder", old_file, None, "file of train_e4t.py; default: nano's own", metavar="FILE")]


METHOD = Method("e4t", "an encoder predicts the word [V] at every step, then 15 steps tune all", options,
                make, adapters, shapes, lambda args: [Change, Hole, Word])
