"""Perfusion (Tewel et al., arXiv 2305.01644): a person is one gated rank-one change of every cross-attention.

    python personalize.py face.png "a [V] face as a rock star" --method perfusion
    python personalize.py out/person.safetensors "a [V] face as a king" --method perfusion --beta .6
    python personalize.py you.png "a [V] face" --method perfusion --identifier zwx --out you  # another
    python personalize.py out/person.safetensors "a [V] face" --method perfusion --with you/person.safetensors

A layer W of keys or values gets encodings e of the prompt's tokens. The part of e along i*, the encoding of
the person's word, would become W·i*. It is replaced by o*, as far as a gate opens:

    h = W·e⊥ + o*·σ((s − β)/τ),      s = sim/‖i*‖²,   sim = eᵀC⁻¹i*,   ‖i*‖² = i*ᵀC⁻¹i*,   e⊥ = e − i*·s

C is the uncentred covariance of encodings, so s is 1 at i* and about 0 at all other words. Keys are locked:
o* is W times the encoding of "face", so the person gets the attention of any face. Training changes o* of the
values and the embedding of the person's word. β and τ can be changed afterwards.

Where s = 0, h is W·e plus the gate's tail σ(−β/τ)·o*. At β → ∞ the gate is 0, and h = W·e⊥ still lacks the
part along i*: the person's own word says nothing, while words with s = 0 give W·e, as in the model itself.

A person is o* of every value layer, i*, C⁻¹i*/‖i*‖², the embedding, and the token's id: on SD 1.5 12,480 +
3·768 + 2 numbers, 30 KB in float16 (the paper's 100 KB include keys); on nano 544 + 3·128 + 2, 1.9 KB."""
from typing import NamedTuple

import torch
import torch.nn.functional as F

import clip
from adapters import outside, shared
from clip import IDENTIFIER, with_identifier
from diffusion import denoising_loss
from files.person import Person, load_person
from hdb import PROMPT, seeded
from methods.protocol import Method
from methods.textual_inversion import CLASS, LAYER, Rows, only_token
from nano import faces, seeds, wording
from program.console import UserError
from program.options import Option, number, old_file, same
from training.fit import fit_or_take_back

TRAINING, SAMPLING = (.75, .1), (.7, .15)  # β and τ
KEPT = .99    # decay of the moving average i*
RIDGE = 1e-4  # share of C's mean eigenvalue that is added to all, since C may be singular
# i* is a mean over these prompts. An encoding depends on its position: with the i* of one prompt, nano's gate
# stays shut where the word has another position
TEMPLATES = ("a {}", "a photo of a {}", "an instagram selfie of a {}", "a pixar character of a {}",
             "a professional photo of a {}")
# C of models other than nano: every form of every thing, in place of the paper's 100,000 captions
FORMS = ("{}", "a photo of a {}", "the {} at the beach", "a painting of a {} in the style of Van Gogh",
         "two happy people with a {}", "a close-up photograph of an old {}", "a {} in winter, snow, trees",
         "portrait of a man with a red {}", "a woman next to a {} in New York", "my new {} is on sale",
         "black and white drawing of a {}", "beautiful {}, highly detailed, digital art, 4k")
THINGS = ("face person man woman child king astronaut dog cat horse bird bear house castle kitchen city "
          "street car bicycle train boat mountain forest flower garden river sky table chair lamp book "
          "guitar shirt dress hat shoe cake pizza apple coffee").split()


class Gated(NamedTuple):
    """The formula above, for J concepts at once, of one person or of P people side by side.

    inputs (P, J, d): i*; duals (P, J, d): C⁻¹i*/‖i*‖²; outputs (P, J, n): o*."""
    inputs: torch.Tensor
    duals: torch.Tensor
    outputs: torch.Tensor
    beta: float
    tau: float

    def __call__(self, layer, x, y):
        """x: encodings e (B, m, d); y: W·e (B, m, n); B = k·P samples, by shared(), else ValueError."""
        # W·i*, where a LoRA outside may belong to W
        replaced = outside(self, layer, self.inputs.to(layer.weight.dtype)).float()
        duals, outputs, replaced = (shared(t, len(x)) for t in (self.duals, self.outputs, replaced))
        similarity = x.float() @ duals.mT  # s of every token and concept
        gate = torch.sigmoid((similarity - self.beta) / self.tau)
        return y + (gate @ outputs - similarity @ replaced).to(y.dtype)


def projections(model, kind):
    """name -> layer, for all layers of the UNet that make keys ("k") or values ("v") of the prompt."""
    return {name: layer for name, layer in model.layers.items() if name.endswith(f"attn2.to_{kind}")}


# ------------------------------------------------------------------------------------------------------------
# Encodings

def captions(model):
    """Prompts to measure C: nano's own captions, or else everyday things in everyday prompts."""
    if model.text.config != clip.NANO:
        return [form.format(thing) for form in FORMS for thing in THINGS]
    generator = seeded(seeds.PRETRAINING)
    identity = torch.rand(1024, len(faces.IDENTITY), generator=generator)
    style = torch.randint(len(faces.STYLES), (1024,), generator=generator)
    return wording.captions(identity, style, generator)


@torch.no_grad()
def covariance(model, captions):
    """C (d, d), in float64 on the CPU: the mean of e·eᵀ over all tokens of the captions.

    Padding is included, because the layers get it too: for nano's "a sks face", s of padding is then at most
    .20 (standard deviation .04). Without padding in C it is .36 (.07), and without start and end tokens as
    well 1.3 (.22), so the gate opens."""
    total, count = 0., 0
    for ids in model.tokenizer(captions).split(64):
        e = model.text(ids.to(model.device)).flatten(0, 1).cpu().double()
        total, count = total + e.T @ e, count + len(e)
    return total / count


def inverse(c):
    """C⁻¹ (d, d), float32, after adding a ridge to C."""
    ridge = RIDGE * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    return torch.linalg.inv(c + ridge).float()


def dual(i, c_inverse):
    """i* (P, d) -> C⁻¹i*/‖i*‖² (P, d), whose product with e is s. The scale of C cancels."""
    product = i @ c_inverse
    return product / (product * i).sum(-1, keepdim=True)


@torch.no_grad()
def encoding(model, phrase, token, people=1):
    """The encoding of `token` in the phrase, the mean over TEMPLATES, under adapters of P people: (P, d)."""
    prompts = [template.format(phrase) for template in TEMPLATES for _ in range(people)]
    ids = model.tokenizer(prompts).to(model.device)
    place = (ids == token).int().argmax(1)
    found = model.text(ids)[torch.arange(len(ids), device=ids.device), place].float()
    return found.unflatten(0, (-1, people)).mean(0)


def super_category(model):
    """The encoding of "face" (1, d), the start of i* and the input that keys are locked to."""
    return encoding(model, CLASS, only_token(model, CLASS))


# ------------------------------------------------------------------------------------------------------------
# The method

def learn(model, photo, steps=400, lr=.1, embedding_lr=.02, batch=4, identifier=IDENTIFIER, generator=None,
        callback=None):
    """Photos (P, 3, H, W) in [-1, 1] of P people, side by side -> tensors (P, …) for adapters(), float32.

    lr: of the values; embedding_lr: of the word's embedding; batch: noises of each photo in a step.
    callback(step, loss) after every step. UserError, a ValueError, if the identifier is not one token."""
    people, token, prompt = len(photo), only_token(model, identifier), with_identifier(PROMPT, identifier)
    generator = generator or seeded(0)
    latent = model.encode(photo).detach().repeat(batch, 1, 1, 1)
    face = super_category(model)
    c_inverse = inverse(covariance(model, captions(model))).to(model.device)

    # Everybody starts as "face"
    i = face.repeat(people, 1)
    word = model.layers[LAYER].weight[only_token(model, CLASS)].float()
    embedding = word.repeat(people, 1).requires_grad_()
    values = {name: F.linear(face, layer.weight.float()).repeat(people, 1).requires_grad_()
              for name, layer in projections(model, "v").items()}

    def tensors():
        # the token's id in two digits, which float16 holds exactly
        digits = embedding.new_tensor([divmod(token, 256)]).repeat(people, 1)
        return {"token": digits, "embedding": embedding, "input": i, "dual": dual(i, c_inverse)} | values

    def context():
        # In every step i* follows its word; no gradient goes through it
        if torch.is_grad_enabled():
            with model.adapted({LAYER: Rows(embedding[:, None], token)}):
                i.lerp_(encoding(model, with_identifier("[V] face", identifier), token, people), 1 - KEPT)
        return model.adapted(gated(tensors(), model, face, *TRAINING))

    rates = [{"params": [*values.values()], "lr": lr}, {"params": [embedding], "lr": embedding_lr}]
    fit_or_take_back(lambda: denoising_loss(model, latent, [prompt] * people, generator).mean(), rates, steps,
                     lr, context, callback, replay=generator)
    return {name: t.detach() for name, t in tensors().items()}


def gated(tensors, model, face, beta, tau):
    """The adapters of P people's tensors; face (1, d): super_category(model)."""
    (token,) = {int(high * 256 + low) for high, low in tensors["token"].tolist()}
    found = {LAYER: Rows(tensors["embedding"][:, None], token)}
    i, duals = (tensors[name][:, None] for name in ("input", "dual"))
    for name, layer in projections(model, "k").items():
        locked = F.linear(face, layer.weight.float()).expand(len(i), -1)
        found[name] = Gated(i, duals, locked[:, None], beta, tau)
    for name in projections(model, "v"):
        found[name] = Gated(i, duals, tensors[name][:, None], beta, tau)
    return found


def adapters(tensors, engine):
    """The adapters of P people's tensors, at the default β and τ of sampling."""
    return gated(tensors, engine.model, super_category(engine.model), *SAMPLING)


def shapes(tensors, engine):
    """name -> shape of one person's tensors for this model."""
    model = engine.model
    width = model.layers[LAYER].embedding_dim
    values = {name: (1, layer.out_features) for name, layer in projections(model, "v").items()}
    return {"token": (1, 2), "embedding": (1, width), "input": (1, width), "dual": (1, width)} | values


# ------------------------------------------------------------------------------------------------------------
# After training: two people in one picture, β and τ

def together(first, second):
    """The adapters of two people, each with a word of its own, as one: h = W·e⊥ + Σ o*_j·σ((s_j − β)/τ). The
    paper makes e⊥ by Gram-Schmidt over U·i*_j, where C⁻¹ = UᵀU: it has no part in the span of all i*.

    U is not needed: e⊥ = e − Σ i'_j·s_j, with the vectors i'_k of that span for which s_j is 1 if j = k, else
    0. β and τ are those of the first."""
    joined = {LAYER: lambda layer, x, y: second[LAYER](layer, x, first[LAYER](layer, x, y))}  # both words
    for name in [name for name in first if name != LAYER]:
        one, other = first[name], second[name]
        people = max(len(one.inputs), len(other.inputs))
        pairs = [[t.expand(people, -1, -1) for t in pair] for pair in zip(one[:3], other[:3])]
        inputs, duals, outputs = (torch.cat(pair, 1) for pair in pairs)
        inputs = torch.linalg.solve((duals @ inputs.mT).mT, inputs)
        joined[name] = Gated(inputs, duals, outputs, *one[3:])
    return joined


def at(adapters, beta, tau=SAMPLING[1]):
    """The same adapters with another β and τ."""
    return {name: adapter._replace(beta=beta, tau=tau) if isinstance(adapter, Gated) else adapter
            for name, adapter in adapters.items()}


def at_sampling(adapters, args, engine):
    """The adapters at --beta and --tau, together with those of the person --with (args.beside), if given.
    UserError if the two cannot be told apart."""
    if args.beside:
        if not any(isinstance(adapter, Gated) for adapter in adapters.values()):
            raise UserError("--with is for a person that perfusion made; this one was made by another method")
        person = load_person(args.beside, engine, {METHOD.name: METHOD})
        other = person.adapters(engine)
        if other[LAYER].token == adapters[LAYER].token:
            raise UserError(f"{args.beside}: both people are called {person.identifier}; make one of them "
                            "with another --identifier")
        try:
            adapters = together(adapters, other)
        except torch.linalg.LinAlgError:  # an i* is 0, or they are parallel
            raise UserError(f"{args.beside}: its word cannot be told from {args.identifier}") from None
    return at(adapters, args.beta, args.tau)


def make(engine, photos, generators, args, stage):
    """Photos (1, 1, 3, H, W) to the Person."""
    with stage.progress(args.steps) as show:
        tensors = learn(engine.model, photos[:, 0], args.steps, args.lr, args.embedding_lr, args.batch,
                        args.identifier, generators[0], show)
    stage(f"trained {args.steps} steps, learning rates {args.lr:g} (values), {args.embedding_lr:g} (word)")
    return Person(METHOD, tensors, args.model, args.identifier)


def options(model, hypernet=None):
    return [same("steps", number(int, 1, 100_000), 400, "training steps"),
            Option("lr", number(float, 0, 1), .1, .03, "learning rate of the values"),
            Option("embedding_lr", number(float, 0, 1), .02, .006, "learning rate of the word's embedding"),
            Option("batch", number(int, 1, 1024), 4, 16, "noises of the photo in each step"),
            same("beta", number(float, -100, 100), SAMPLING[0], "bias of the gate in sampling; a higher one "
                 "shows less of the person"),
            same("tau", number(float, .001, 100), SAMPLING[1], "temperature of the gate in sampling"),
            same("identifier", str, IDENTIFIER, "a rare token as the person's name", metavar="WORD"),
            same("with", old_file, None, "a second person, whom the prompt calls by the --identifier that "
                 "they were trained with", metavar="FILE", dest="beside")]


METHOD = Method("perfusion", "one gated rank-one change of every cross-attention", options, make, adapters,
                shapes, lambda args: [Rows, Gated], at_sampling)
