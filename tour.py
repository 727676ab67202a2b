"""HyperDreamBooth from end to end on nano, in nine steps: the paper's sections and equations, running.

    python tour.py          # about a minute on two cores; writes docs/tour.md with its pictures
    python tour.py fast     # a few steps of everything, to out/

Each step says what it shows, prints what it measures, asserts it, and makes one picture.
"""
import sys

from nano.page import Page, to_scale  # before torch: it imports program

import torch

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
from training.trainer import global_seed
from unet import UNet, UNetConfig
from vit import encode_face

fast = "fast" in sys.argv
count, sampler_steps = (2, 1) if fast else (8, 15)  # count: of people
page = Page(HERE / "tour.py", fast)
model = hdb.load("nano", "cpu")
hypernet = hdb.load_hypernet(HERE / "nano/hypernet.safetensors", model)
method = hdb.HyperDreamBooth(model, hypernet)
lidb = method.lidb


def draw(prompt, adapters, copies=1):
    """Pictures (copies, 3, 128, 128) of the prompt, always from the same noise."""
    return model.sample([prompt] * copies, steps=sampler_steps, adapters=adapters)


def likeness(pictures):
    """The mean likeness of pictures of the first people, one each, to their photos."""
    return judge.likeness(pictures, photos[:len(pictures)]).mean().item()


# %% 1. The world
# A renderer draws everybody in nano's world (nano/faces.py), so we know exactly who is in a picture: a person
# is 27 numbers. The judge, a small network trained separately, measures *likeness*: the cosine similarity of
# its embeddings of two pictures.
held_out = people.HeldOut(count, "cpu", seeds.VALIDATION)  # people whom no training has seen
photos, judge = held_out.photos, held_out.judge
again = held_out.more_photos(1)[:, 0]
same, strangers = likeness(again), likeness(again.roll(1, 0))
page.say("likeness of two photos", {"one person": same, "two people": strangers})
assert same > .8 and (fast or strangers < .4)
page.show("two people in every style", {
    style: faces.photos(held_out.identity[:2], hdb.seeded(1), "cpu", torch.tensor([i, i]))
    for i, style in enumerate(faces.STYLES)})

# %% 2. Stable Diffusion (section 3)
# An autoencoder turns a picture into a latent x₀ and back. Noise ε is added, x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, and
# a UNet learns to predict ε from x_t, the time step t and the features c of a text. A sampler uses the UNet
# to go from pure noise to a picture. nano runs the code of SD 1.5 at a small size.
photo, prompt = photos[:1], "a face as a king"
latent, context = model.encode(photo), model.context([prompt])
page.say(f"picture {[*photo.shape]} -> latent {[*latent.shape]}; text -> features {[*context.shape]}")
decoded = model.decode(latent)
assert (decoded - photo).abs().mean() < .05
noisy = diffusion.add_noise(latent, diffusion.seeded_noise(latent.shape, [0]), torch.tensor([500]))
page.show("a photo, its latent, the latent with noise, and a sample", {
    "photo": photo, "latent, decoded": decoded, "x_t at t = 500": model.decode(noisy).clamp(-1, 1),
    prompt: draw(prompt, {})})

# %% 3. Lightweight DreamBooth (section 4.1, Eq. 1)
# ΔW = A_aux · A_train · B_train · B_aux in each attention and GEGLU projection. A_aux and B_aux are random
# and frozen: a seed remakes them, so they are neither stored nor predicted, and all people share one space
# that a network can learn. They are orthonormal, ‖A_aux·a‖ = ‖a‖ in a layer of any width, so one scale suits
# all layers. θ, what is trained, holds A_train − A₀, for a random A₀, and B_train. At θ = 0, ΔW is 0, but
# the gradient of B_train is not.
with torch.device("meta"):  # SD 1.5's shapes, without its weights
    sd15 = personal_layers(UNet(UNetConfig()), TextTransformer(TextConfig()))
for name, layers in ("nano", method.layers), ("SD 1.5", sd15):
    rank_1 = sum(layer.in_features + layer.out_features for layer in layers.values())
    rows, size = LiDB(layers).shape
    page.say(f"{name}: rank-1 LoRA {rank_1:,} numbers; θ {rows} layers × {size} = {rows * size:,}")
assert (rank_1, rows * size) == (385_344, 28_800)  # the paper's 386K and 28K

a_0, [a_aux, *_], [b_aux, *_] = lidb.basis  # A_aux and B_aux of the first layer
theta = torch.randn(1, *lidb.shape, generator=hdb.seeded(0))
a_train, b_train = a_0 + theta[0, 0, :lidb.a, None], theta[0, 0, None, lidb.a:]
adapter = lidb.adapters(theta)[lidb.names[0]]
assert torch.allclose(adapter.a @ adapter.b, a_aux @ a_train @ b_train @ b_aux, atol=1e-5)  # Eq. 1
assert torch.allclose(a_aux.T @ a_aux, torch.eye(lidb.a), atol=1e-5)
theta = torch.zeros(1, *lidb.shape, requires_grad=True)
change = torch.matmul(*lidb.adapters(theta)[lidb.names[0]])
(gradient,) = torch.autograd.grad(change.sum(), theta)
assert not change.any() and not gradient[:, :, :lidb.a].any() and gradient[:, :, lidb.a:].any()
page.show("the four matrices of one layer, to scale",
          to_scale({"A_aux": a_aux, "A_train": a_train, "B_train": b_train, "B_aux": b_aux}))

# %% 4. DreamBooth in that space (section 4.1)
# DreamBooth's loss ‖D_θ(x + ε, c) − x‖² on one photo, under c = "a [V] face", trains θ alone: D_θ is the
# model with the weights W + ΔW, which removes the noise ε from x. θ has fewer numbers than the photo has
# pixels, but they hold a face.
fitted = method.fit_theta(lambda: (latent, [hdb.PROMPT]), 1, 2 if fast else 60, .02, hdb.seeded(0))
before, after = draw(hdb.PROMPT, {}), draw(hdb.PROMPT, lidb.adapters(fitted))
page.say("likeness to the photo", {"before": likeness(before), "after": likeness(after)})
assert fast or likeness(after) > likeness(before) + .3
page.show("θ fitted to one photo", {"photo": photo, "before": before, "after": after})

# %% 5. The hypernetwork (section 4.2, Eq. 3)
# A network predicts θ from the photo: θ̂_k = θ̂_{k−1} + T(f, θ̂_{k−1}), from θ̂_0 = 0. A ViT encodes the
# photo once, to features f. The decoder T, with a token for each layer, runs s times.
face = hypernet.face(encode_face(hypernet.vit, photos))
theta, columns, scores = torch.zeros(count, *lidb.shape), {"photo": photos[:4]}, {}
for k in range(1, hypernet.config.iterations + 1):
    theta = theta + hypernet.correction(face, theta)  # Eq. 3
    pictures = draw(hdb.PROMPT, lidb.adapters(theta), count)
    columns[f"pass {k}"], scores[f"pass {k}"] = pictures[:4], likeness(pictures)
assert torch.allclose(theta, method.predict(photos), atol=1e-5)
page.say("mean likeness", scores)
assert fast or scores["pass 4"] > max(.8, scores["pass 1"] - .02)
page.show("people after every pass", columns)

# %% 6. Whose θ is it? (section 4.2)
# Another person's θ draws another person; the mean of two draws something of both. The person also belongs to
# [V]: a prompt without it draws a stranger.
mixtures = {"own": theta[:1], "another's": theta[1:2], "the mean of both": theta[:2].mean(0, keepdim=True)}
columns = {name: draw(hdb.PROMPT, lidb.adapters(mixture)) for name, mixture in mixtures.items()}
own, another, both = map(likeness, columns.values())
page.say("likeness to person 1 by θ", {"own": own, "another's": another, "the mean of both": both})
assert fast or own > both > another
leaked, chance = likeness(draw("a face", lidb.adapters(theta), count)), likeness(draw("a face", {}, count))
page.say('likeness of "a face"', {"with θ": leaked, "without": chance})
assert fast or leaked < own / 2
page.show("whose θ", {"person 1": photo, "person 2": photos[1:2]} | columns)

# %% 7. Training it (Eq. 2)
# L = α‖D_θ̂(x + ε, c) − x‖² + β‖θ̂ − θ‖². We set α = 1 and β = 0, because a picture of the person in a style,
# under that style's prompt, teaches more than a θ fitted to one photo. Some samples show a stranger under a
# prompt without [V], so the weights learn to act on [V] alone. Here a fresh network learns one batch.
with global_seed(0):
    fresh = HyperNetwork(hypernet.config, hypernet.vit)
features, latents, prompts = people.People(model, hypernet.vit).samples(torch.arange(count), hdb.seeded(0))
x_t, t, noise, weight = diffusion.noised(latents, hdb.seeded(0))
optimizer, losses = torch.optim.Adam(fresh.parameters(), lr=1e-3), []  # the encoder has no gradient
for _ in range(2 if fast else 20):
    optimizer.zero_grad()
    with model.adapted(lidb.adapters(fresh.refine(features))):
        error = (model.unet(x_t, t, model.context(prompts)) - noise).pow(2).mean((1, 2, 3))
        loss = (weight * error).mean()  # Eq. 2
        loss.backward()
    optimizer.step()
    losses.append(loss.item())
page.say(f"loss of {count} people: {losses[0]:.4f}, after {len(losses)} steps {losses[-1]:.4f}")
assert losses[-1] < losses[0] and fresh.heads.grad.flatten(1).any(1).all()
page.show("pictures and prompts of that batch", dict(zip(prompts, model.decode(latents).split(1))))

# %% 8. Rank-relaxed fast fine-tuning (section 4.3)
# Rank 1 in a random subspace holds a likeness, not its details. So the predicted ΔW stays as it is, and a
# LoRA of a higher rank is trained beside it: W' = W + ΔW_θ̂ + A·B. B starts at 0, so training starts exactly
# at the prediction. tour.py has the whole loop; fine_tune in hdb.py does the same, faster.
steps, rank, batch, generator = 2 if fast else 40, 4, 4, hdb.seeded(0)
predicted = detach(lidb.adapters(theta[:1]))
with model.adapted(predicted):
    context = model.context([hdb.PROMPT]).repeat(batch, 1, 1)
lora = fresh_lora(unet_layers(method.layers), rank, generator)
optimizer = torch.optim.Adam([factor for pair in lora.values() for factor in pair], lr=3e-3, betas=(.9, .99))
for _ in range(steps):
    x_t, t, noise, weight = diffusion.noised(latent.repeat(batch, 1, 1, 1), generator)
    optimizer.zero_grad()
    with model.adapted(predicted), model.adapted(lora):
        error = (model.unet(x_t, t, context) - noise).pow(2).mean((1, 2, 3))
        (weight * error).mean().backward()
    optimizer.step()
for name, pair in method.fine_tune(photo, theta[:1], steps).items():
    assert torch.allclose(pair.a @ pair.b, lora[name].a @ lora[name].b, atol=1e-4)

lora, rock_star = detach(lora), "a [V] face as a rock star"
systems = {"only hyper": predicted, "no hyper": method.fine_tune(photo, None, steps),
           "both": join(predicted, lora)}
columns = {"photo": photo.repeat(2, 1, 1, 1)}
for name, adapters in systems.items():
    plain, styled = draw(hdb.PROMPT, adapters), draw(rock_star, adapters)
    page.say(name, {"plain": likeness(plain), "as a rock star": likeness(styled)})
    columns[name] = torch.cat([plain, styled])
page.show("a [V] face, and as a rock star", columns)

# %% 9. What a person is (section 5)
# A small file: the seed of the basis, θ, the LoRA, and checksums of the model that they belong to.
person, file = hyperdreambooth.person(theta[:1], lora), page.folder / "person.safetensors"
save_person(person, method, file)
loaded = load_person(file, method, METHODS)
page.say(f"the file of the person: {file.stat().st_size:,} bytes")
file.unlink()
assert all(torch.equal(loaded.tensors[name], t.half().float()) for name, t in person.tensors.items())
columns, scores = {"photo": photo}, {}
for strength in 0, .25, .5, .75, 1:
    picture = draw(rock_star, scale(loaded.adapters(method), strength))
    columns[f"strength {strength}"], scores[f"{strength}"] = picture, likeness(picture)
page.say("likeness as a rock star, by strength", scores)
assert fast or scores["1"] > scores["0"] + .2
page.show("the same person, stronger and stronger", columns)
