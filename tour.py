"""HyperDreamBooth from end to end on nano, in nine steps: the paper's sections and equations, running.

    python tour.py          # about a minute on two cores; writes docs/tour.md with its pictures
    python tour.py fast     # a few steps of everything, to out/tour/

Every step says what it claims, prints what it measured, asserts it, and draws one picture. docs/tour.md is
this file's own report: the texts below, and the numbers and pictures of the run that wrote it.
"""
import sys
import time

from program import START

import torch
import torch.nn.functional as F

import diffusion
import hdb
from adapters import detach, fresh_lora, join, scale
from clip import TextConfig, TextTransformer
from files.layouts import HERE
from files.person import load_person, save_person
from hypernet import HyperNetwork
from lidb import LiDB, personal_layers, unet_layers
from methods import hyperdreambooth
from methods.table import METHODS
from nano import faces, people, seeds
from nano.page import Tour, to_scale
from unet import UNet, UNetConfig
from vit import encode_face

ROCK = "a [V] face as a rock star"


def step_1(tour):
    """The world

    nano's world is drawn by a renderer (nano/faces.py). A person is 27 numbers, a photo adds 17 of
    circumstances (pose, light, smile, …) and a style. So it is known exactly who is in a picture. What
    measures it is the judge, a small network that was trained apart from everything it judges: *likeness* is
    the cosine of its embeddings of two pictures."""
    held_out = people.HeldOut(tour.count, "cpu", seeds.VALIDATION)  # people whom no training has seen
    tour.photos, tour.judge = held_out.photos, held_out.judge
    others = held_out.more_photos(1)[:, 0]
    same, strangers = (tour.likeness(photos) for photos in (others, others.roll(1, 0)))
    tour.say(f"likeness of two photos of one person {same:.2f}, of two people {strangers:.2f}")
    assert same > .8 and (tour.fast or strangers < .4)

    styles = torch.arange(len(faces.STYLES))
    rows = [faces.photos(person.expand(len(styles), -1), hdb.seeded(1), "cpu", styles)
            for person in held_out.identity[:3]]
    tour.show("three people in every style", torch.cat(rows), list(faces.STYLES))


def step_2(tour):
    """Stable Diffusion (section 3)

    An autoencoder makes a latent x₀ of a picture, eight times smaller a side. Noise is added:
    x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε. A UNet learns to tell ε from x_t, t and the features c of a text, and a
    sampler walks from pure noise back to a picture. nano is the same code as SD 1.5 at a small size."""
    model, photo = tour.model, tour.photos[:1]
    latent = model.encode(photo)
    back = model.decode(latent)
    psnr = 10 * torch.log10(4 / F.mse_loss(back, photo)).item()
    context = model.context(["a face as a king"])
    tour.say(f"picture {tuple(photo.shape)} -> latent {tuple(latent.shape)} -> picture, {psnr:.1f} dB")
    tour.say(f"text -> features {tuple(context.shape)}")
    assert psnr > 25

    noise = diffusion.seeded_noise(latent.shape, [0])
    noisy = diffusion.add_noise(latent.expand(3, -1, -1, -1), noise, torch.tensor([250, 500, 999]))
    king = tour.draw("a face as a king", {})
    tour.show("a photo, its latent's picture, the latent with noise, and a sample of the text",
              torch.cat([photo, back, model.decode(noisy).clamp(-1, 1), king]),
              ["photo", "decoded", "t = 250", "t = 500", "t = 999", "a face as a king"])


def step_3(tour):
    """Lightweight DreamBooth (section 4.1, Eq. 1)

    ΔW = A_aux · A_train · B_train · B_aux for every attention layer. A_aux and B_aux are random and frozen: a
    seed makes them again, so they are neither stored nor predicted, and all people share them, so there is
    one space of people that a network can learn. They are orthonormal: ‖A_aux·a‖ = ‖a‖ in a layer of any
    width, so one scale of numbers and of gradients suits all layers. θ = (A_train, B_train) counts from A₀
    (random, shared) and 0: at θ = 0 the model is untouched, and yet B's gradient is not zero."""
    model, lidb = tour.model, tour.method.lidb
    weights = sum(p.numel() for part in (model.unet, model.text) for p in part.parameters())
    with torch.device("meta"):  # SD 1.5's shapes, without its weights
        large = personal_layers(UNet(UNetConfig()), TextTransformer(TextConfig()))
    for name, layers in (f"nano: {weights:,} weights;", tour.method.layers), ("SD 1.5:", large):
        lora = sum(layer.in_features + layer.out_features for layer in layers.values())
        count, size = LiDB(layers).shape
        tour.say(f"{name} rank-1 LoRA {lora:,}; LiDB {count} layers × {size} = {count * size:,}")
    assert (lora, count * size) == (385_344, 28_800)  # the paper's 386K and 28K

    _, a_aux, b_aux = lidb.basis
    assert all(torch.allclose(a.T @ a, torch.eye(a.shape[1]), atol=1e-5) for a in a_aux)
    theta = torch.zeros(1, *lidb.shape, requires_grad=True)
    given = torch.randn(1, 4, 16, 16, generator=hdb.seeded(0)), 500, model.context(["a face"])
    with model.adapted(lidb.adapters(theta)):
        noise = model.unet(*given)
        noise.pow(2).mean().backward()
    assert torch.allclose(noise, model.unet(*given), atol=1e-5)
    a, b = theta.grad.split([lidb.a, lidb.b], 2)
    tour.say(f"gradient at θ = 0: of A_train {a.norm():.1e}, of B_train {b.norm():.1e}")
    assert not a.any() and b.norm() > 0

    matrices = {"A_aux": a_aux[0], "A_train": lidb.basis[0],
                "B_train": torch.zeros(1, lidb.b), "B_aux": b_aux[0]}
    side = 6 + max(*a_aux[0].shape, *b_aux[0].shape)
    pictures = torch.stack([to_scale(matrix, side) for matrix in matrices.values()])
    heads = [f"{name} {len(matrix)} x {matrix.shape[1]}" for name, matrix in matrices.items()]
    tour.show("the four matrices of one layer at θ = 0, to scale", pictures, heads)


def step_4(tour):
    """DreamBooth in that space (section 4.1)

    DreamBooth's loss ‖D_θ(x + ε, c) − x‖² on one photo, under c = "a [V] face", with θ alone to train: fewer
    numbers than the photo has pixels, and they hold a face."""
    given = tour.model.encode(tour.photos[:1]), [hdb.PROMPT]
    theta = tour.method.fit_theta(lambda: given, 1, 2 if tour.fast else 60, .02, hdb.seeded(0))
    pictures = [tour.draw(hdb.PROMPT, adapters) for adapters in ({}, tour.method.lidb.adapters(theta))]
    low, high = map(tour.likeness, pictures)
    tour.say(f"likeness to the photo: {low:.2f} before, {high:.2f} after the fit")
    assert tour.fast or high > low + .3
    tour.show("θ fitted to one photo", torch.cat([tour.photos[:1], *pictures]), ["photo", "before", "after"])


def step_5(tour):
    """The hypernetwork (section 4.2, Eq. 3)

    A network sees the photo and says θ: `θ̂_k = θ̂_{k−1} + T(f, θ̂_{k−1})`, from `θ̂_0 = 0`. The photo is
    encoded once to f; the decoder, with a token for each layer, then runs s times, and each pass sees the
    estimate that it is to correct."""
    hypernet = tour.method.hypernet
    features = encode_face(hypernet.vit, tour.photos)
    tour.passes = hypernet.passes(features).detach()          # (s + 1, people, layers, size)
    drawn = map(tour.method.lidb.adapters, tour.passes[1:])
    pictures = [tour.draw(hdb.PROMPT, adapters, tour.count) for adapters in drawn]
    scores = [*map(tour.likeness, pictures)]
    tour.say("mean likeness after each pass: " + ", ".join(f"{score:.2f}" for score in scores))
    steps = tour.passes.diff(dim=0).flatten(2)
    cosines = torch.cosine_similarity(steps[1:], steps[:-1], dim=2).mean(1)
    tour.say("cosine between one pass's step and the next: " + ", ".join(f"{c:+.2f}" for c in cosines))
    assert tour.fast or scores[-1] > .8 and all(b > a - .02 for a, b in zip(scores, scores[1:]))
    heads = ["photo", *(f"pass {k}" for k in range(1, len(tour.passes)))]
    tour.show("people after every pass", torch.stack([tour.photos, *pictures], 1)[:4].flatten(0, 1), heads)


def step_6(tour):
    """Whose θ is it? (section 4.2)

    θ is about its person: another's θ draws another, and between two people lies something of both. A person
    also belongs to [V]: a prompt that does not say [V] draws somebody else."""
    theta = tour.passes[-1]
    given = {"own": theta[:1], "another's": theta[1:2], "mean": theta.mean(0, keepdim=True),
             "half of two": theta[:2].mean(0, keepdim=True)}
    pictures = {name: tour.draw(hdb.PROMPT, tour.method.lidb.adapters(t)) for name, t in given.items()}
    scores = {name: tour.likeness(picture) for name, picture in pictures.items()}  # to the first photo
    tour.say("likeness to the first person: " + ", ".join(f"{name} {s:.2f}" for name, s in scores.items()))
    assert tour.fast or scores["own"] > scores["half of two"] > scores["another's"]

    drawn = [tour.draw("a face", adapters, tour.count) for adapters in (tour.method.lidb.adapters(theta), {})]
    leaked, chance = map(tour.likeness, drawn)
    tour.say(f'"a face", without [V]: likeness {leaked:.2f} with the weights, {chance:.2f} without them')
    assert tour.fast or leaked < scores["own"] / 2
    tour.show("θ of the first person, of the second, and mixtures",
              torch.cat([tour.photos[:2], *pictures.values()]), ["person 1", "person 2", *given])


def step_7(tour):
    """Training it (Eq. 2)

    L = α‖D_θ̂(x + ε, c) − x‖² + β‖θ̂ − θ‖². Here α = 1 and β = 0: what the weights draw is what counts, and a
    picture of the person in a style, under that style's prompt, is a better teacher than weights that were
    fitted to one photo. The gradient goes through the frozen UNet into the heads. Some prompts do not say
    [V], and their pictures are of strangers: those the weights must leave alone. This is a fresh network and
    one batch with one noise; train.py takes new ones at every step."""
    hypernet = HyperNetwork(tour.method.hypernet.config, tour.method.hypernet.vit)
    crowd = people.People(tour.model, hypernet.vit)
    trained = [p for name, p in hypernet.named_parameters() if not name.startswith("vit.")]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-3), []
    features, latents, prompts = crowd.samples(torch.arange(tour.count), hdb.seeded(0))
    noisy = diffusion.noised(latents, hdb.seeded(0))
    for _ in range(2 if tour.fast else 20):
        theta = hypernet.refine(features)
        with tour.model.adapted(tour.method.lidb.adapters(theta)):
            loss, _, _ = hdb.hyper_loss(tour.model, prompts, noisy, theta)
            loss.backward()
        reached = hypernet.heads.grad.flatten(1).norm(dim=1) > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tour.say(f"loss of {tour.count} people: {losses[0]:.4f}, after {len(losses)} steps {losses[-1]:.4f}")
    assert losses[-1] < losses[0] and reached.all()
    pictures = tour.model.decode(latents).clamp(-1, 1)
    tour.show("the pictures of that batch, and their prompts", pictures, prompts)


def step_8(tour):
    """Rank-relaxed fast fine-tuning (section 4.3)

    Rank 1 in a random subspace holds a likeness, not its details. So the predicted ΔW stays as it is, and a
    LoRA of a higher rank is trained beside it on the one photo: W' = W + ΔW_θ̂ + A·B. With B = 0 it starts
    exactly at the prediction. The loop below is all of it; hdb.py's fine_tune is the same, made fast."""
    steps, photo, theta = 2 if tour.fast else 40, tour.photos[:1], tour.passes[-1][:1]
    predicted = detach(tour.method.lidb.adapters(theta))
    lora = plain_fine_tune(tour, photo, predicted, steps)
    same = tour.method.fine_tune(photo, theta, steps)
    apart = max((p.a @ p.b - q.a @ q.b).abs().max().item() for p, q in zip(lora.values(), same.values()))
    large = max((p.a @ p.b).abs().max().item() for p in lora.values())
    tour.say(f"the plain loop and fine_tune: ΔW differs by at most {apart:.0e} of {large:.0e}")
    assert apart < .01 * large

    systems = {"only hyper": predicted, "no hyper": tour.method.fine_tune(photo, None, steps),
               "both": join(predicted, lora)}
    rows = []
    for prompt in hdb.PROMPT, ROCK:
        drawn = [tour.draw(prompt, adapters) for adapters in systems.values()]
        scores = [tour.likeness(picture) for picture in drawn]
        tour.say(f"{prompt}: " + ", ".join(f"{name} {s:.2f}" for name, s in zip(systems, scores)))
        rows += [photo, *drawn]
    tour.person = hyperdreambooth.person(theta, lora)
    tour.show("a [V] face, and as a rock star", torch.cat(rows), ["photo", *systems])


def plain_fine_tune(tour, photo, predicted, steps, rank=4, batch=4):
    """Section 4.3 in one loop: the LoRA's adapters."""
    model, generator = tour.model, hdb.seeded(0)
    latent = model.encode(photo)
    with model.adapted(predicted):
        context = model.context([hdb.PROMPT]).detach().repeat(batch, 1, 1)
    lora = fresh_lora(unet_layers(tour.method.layers), rank, generator)
    optimizer = torch.optim.Adam([t for pair in lora.values() for t in pair], lr=3e-3, betas=(.9, .99))
    for _ in range(steps):
        x_t, t, noise, weight = diffusion.noised(latent.repeat(batch, 1, 1, 1), generator)
        with model.adapted(predicted), model.adapted(lora):
            error = (model.unet(x_t, t, context) - noise).pow(2).mean((1, 2, 3))
            (weight * error).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return detach(lora)


def step_9(tour):
    """What a person is (section 5)

    A small file: the seed of the basis, θ and the LoRA, with checksums of the model they belong to. It can be
    scaled, joined, merged into the model, or exported as a LoRA."""
    engine, path = tour.method, tour.folder / "person.safetensors"
    save_person(tour.person, engine, path)
    loaded = load_person(path, engine, METHODS)
    tour.say(f"the file of the person: {path.stat().st_size:,} bytes")
    path.unlink()
    kept = tour.person.map(lambda t: t.half().float())        # as the file keeps it
    first, second = (tour.draw(ROCK, person.adapters(engine)) for person in (kept, loaded))
    assert torch.equal(first, second)

    strengths = 0., .25, .5, .75, 1.
    pictures = [tour.draw(ROCK, scale(loaded.adapters(engine), strength)) for strength in strengths]
    scores = [tour.likeness(picture) for picture in pictures]
    tour.say("likeness as a rock star by strength: "
             + ", ".join(f"{k:g}: {score:.2f}" for k, score in zip(strengths, scores)))
    assert tour.fast or scores[-1] > scores[0] + .2
    tour.show("the same person, stronger and stronger", torch.cat([tour.photos[:1], *pictures]),
              ["photo", *(f"strength {k:g}" for k in strengths)])


STEPS = step_1, step_2, step_3, step_4, step_5, step_6, step_7, step_8, step_9


def main(folder, fast=False):
    """All nine steps; the page and its pictures go to `folder`."""
    tour = Tour(folder, fast)
    for number, step in enumerate(STEPS, 1):
        tour.take(number, step)
    print(f"{folder / 'tour.md'}, {time.time() - START:.0f} s in all")


if __name__ == "__main__":
    fast = "fast" in sys.argv[1:]
    main(HERE / ("out" if fast else "docs"), fast)
