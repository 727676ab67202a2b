"""Textual Inversion (Gal et al., arXiv 2208.01618): a person is the embedding of a new word.

    python personalize.py nano/example.png "a [V] face as a rock star" --method textual_inversion

The paper's Eq. 2 is v* = argmin over v of the denoising loss, where v is the row of the token embedding for
the identifier: a vector of d numbers, 768 on SD 1.5, or N vectors if the prompt repeats the identifier N
times. Settings published for Stable Diffusion: 5,000 steps, learning rate 5e-3, batch 2."""
import math
from typing import NamedTuple

import torch

from adapters import shared
from clip import IDENTIFIER, with_identifier
from diffusion import denoising_loss
from files.checkpoints import Tensors, check_numbers, write
from files.person import Person
from hdb import PROMPT, seeded
from methods.protocol import Method
from program.console import UserError
from program.options import Option, number, same
from training.fit import fit_or_take_back

LAYER = "text.text_model.embeddings.token_embedding"
CLASS = "face"   # the class word in PROMPT
SPREAD = .1      # of the other initial vectors around the first, in standard deviations of its numbers
TOKEN = "<sks>"  # the identifier in exports; other programs have a token "sks"


class Rows(NamedTuple):
    """Each person's N vectors (P, N, d) in place of the embedding of `token`. The k-th occurrence of the
    token in a prompt gets vector k, modulo N."""
    vectors: torch.Tensor
    token: int

    def __call__(self, layer, x, y):
        """x: token ids (B, n); y: their embeddings (B, n, d); B = k·P samples, see shared()."""
        vectors = shared(self.vectors, len(x)).to(y.dtype).expand(len(x), -1, -1)
        here = x == self.token
        which = (here.cumsum(1) - 1) % vectors.shape[1]
        rows = vectors.gather(1, which[..., None].expand_as(y))
        return torch.where(here[..., None], rows, y)


def identifier(tokens):
    """The words that [V] stands for, if a person has this many vectors."""
    return " ".join([IDENTIFIER] * tokens)


def only_token(model, word):
    """The id of a word's only token. UserError, which is a ValueError, if it has none or several."""
    tokens = model.tokenizer.tokens(word)
    if len(tokens) != 1:
        raise UserError(f'"{word}" is not one token of {model.name}; give a word that is')
    return model.tokenizer.vocab[tokens[0]]


def room(model, prompt=""):
    """How many vectors fit into a prompt beside its other words."""
    others = len(model.tokenizer.tokens(with_identifier(prompt, "")))
    return model.tokenizer.max_length - 2 - others  # 2: start and end


def learn(model, photo, steps=300, lr=2e-2, batch=2, tokens=1, generator=None, callback=None):
    """A photo (P, 3, H, W) in [-1, 1] of each of P people, side by side -> {"vectors": (P, tokens, d)}.

    batch: noises of each photo in a step. All vectors start at the embedding of the class word, those after
    the first with noise. generator: one, or a list with one for each person, whose vectors then do not depend
    on the others. callback(step, loss) after every step. UserError, a ValueError, if identifier or class word
    are not one token, or the prompt has no room for the vectors."""
    token, word = only_token(model, IDENTIFIER), only_token(model, CLASS)
    if not 1 <= tokens <= room(model, PROMPT):
        raise UserError(f"{tokens} vectors: {model.name}'s prompts have room for 1 to {room(model, PROMPT)}")
    generator = generator or seeded(0)
    latent = model.encode(photo).detach().repeat(batch, 1, 1, 1)
    start = model.layers[LAYER].weight[word].detach().float().repeat(tokens, 1)
    each = generator if isinstance(generator, list) else [generator]
    noise = [torch.randn(tokens - 1, start.shape[1], generator=one, device="cpu") for one in each]
    vectors = start.repeat(len(each), 1, 1)
    vectors[:, 1:] += SPREAD * start[0].std() * torch.stack(noise).to(start)
    vectors = vectors.repeat(len(photo) // len(each), 1, 1).requires_grad_()

    # [V] is written out here: the model would replace it by one word
    prompts = [with_identifier(PROMPT, identifier(tokens))] * len(photo)
    fit_or_take_back(lambda: denoising_loss(model, latent, prompts, generator).mean(), [vectors], steps, lr,
                     lambda: model.adapted({LAYER: Rows(vectors, token)}), callback, replay=generator)
    return {"vectors": vectors.detach()}


def adapters(tensors, engine):
    """The adapter of P people's {"vectors": (P, N, d)}. UserError as in only_token()."""
    return {LAYER: Rows(tensors["vectors"], only_token(engine.model, IDENTIFIER))}


def shapes(tensors, engine):
    """name -> shape of one person's tensors: as many vectors as there are, if a prompt has room for them."""
    found = tensors["vectors"].shape if "vectors" in tensors else ()
    count = found[1] if len(found) == 3 else 1
    width = engine.model.layers[LAYER].embedding_dim
    return {"vectors": (1, min(max(count, 1), room(engine.model)), width)}


def person(tensors, base):
    """The Person of {"vectors": (1, N, d)}, for the model with the name `base`."""
    return Person(METHOD, tensors, base, identifier(tensors["vectors"].shape[1]))


def make(engine, photos, generators, args, stage):
    """Photos (1, 1, 3, H, W) to the Person."""
    with stage.progress(args.steps) as show:
        tensors = learn(engine.model, photos[:, 0], args.steps, args.lr, args.batch, args.tokens,
                        generators[0], show)
    stage(f"learnt a word in {args.steps} steps, learning rate {args.lr:g}, {args.tokens} vectors")
    return person(tensors, args.model)


def options(model, hypernet=None):
    """On nano, the mean likeness of four people as rock stars and Pixar characters is .46, .56, .60 and .59
    after 300 steps at 5e-3, 1e-2, 2e-2 and 5e-2; at 2e-2 it is .46 after 100 steps and .57 after 600."""
    return [Option("steps", number(int, 1, 100_000), 300, 5000, "training steps"),
            Option("lr", number(float, 0, 1), 2e-2, 5e-3, "learning rate"),
            same("batch", number(int, 1, 1024), 2, "noises of the photo in each step"),
            same("tokens", number(int, 1, 75), 1, "number of vectors")]


METHOD = Method("textual_inversion", "the embedding of one new word, and nothing else", options, make,
                adapters, shapes, lambda args: [Rows])


# ------------------------------------------------------------------------------------------------------------
# The embedding in a file for other programs: one tensor (N, d), whose name is the word in prompts

def save_embedding(tensors, path, photos=""):
    """Write one person's vectors in float32 for diffusers' load_textual_inversion, ComfyUI and A1111. The
    word in prompts is TOKEN for diffusers, the file's name for the others. photos: checksums, as in a
    personal file. ValueError for several people, UserError for NaN or infinity."""
    if len(tensors["vectors"]) != 1:
        raise ValueError(f"one person's vectors are needed, not {len(tensors['vectors'])} people's")
    embedding = tensors["vectors"][0].float()
    check_numbers({"the embedding": embedding}, path)
    write({TOKEN: embedding}, path, {"format": "pt", "photos": photos})


def load_embedding(path, model):
    """The Person in a file of diffusers or A1111 with one tensor (d,) or (N, d). UserError for any other."""
    file, width = Tensors(path), model.layers[LAYER].embedding_dim
    if len(file.shapes) != 1:
        names, count = ", ".join(file.shapes)[:100], len(file.shapes)
        what = "an embedding for SDXL" if "clip_g" in file.shapes else f"{count} tensors"
        raise UserError(f"{path}: not a personal file, nor an embedding of one word: {what} ({names}); give "
                        "a LoRA with --lora and a model with --model")
    ((key, shape),) = file.shapes.items()
    *several, theirs = shape or (0,)
    count = math.prod(several)
    for wrong, what in (
            (len(shape) not in (1, 2), f"a tensor of shape {shape}, not the vectors of a word"),
            (theirs != width, f"for a text encoder of width {theirs}, {model.name}'s has width {width}"),
            (not 1 <= count <= room(model), f"{count} vectors, {model.name}'s prompts have room for 1 to "
             f"{room(model)}")):
        if wrong:
            raise UserError(f"{path}: {what}")
    vectors = file[key].reshape(1, count, width)
    check_numbers({"the embedding": vectors}, path)
    return person({"vectors": vectors.float().to(model.device)}, model.name)
