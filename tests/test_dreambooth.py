"""DreamBooth by numbers: the prior's term and its gradient, whose weights move, and by how much."""
import pytest
import torch
from tiny import generator, photo, shared_model, times_and_noise, tiny_model
from torch.func import functional_call

import hdb
from methods import dreambooth
from diffusion import ALPHAS_CUMPROD, denoising_loss
from adapters import Change, LowRank, fresh_lora
from program.console import UserError
from methods.table import METHODS
from files.person import Person, load_person, save_person
from lidb import personal_layers

PRIOR = torch.randn(5, 4, 8, 8, generator=generator(8))


def written_out(model, weights, latent, prompts, g):
    """The denoising loss of each sample, by functional_call with other weights."""
    t, noise = times_and_noise(latent.shape, g)
    abar = ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    parts = [{name.removeprefix(f"{part}."): p for name, p in weights.items() if name.startswith(part)}
             for part in ("text", "unet")]
    context = functional_call(model.text, parts[0], (model.tokenizer(prompts),))
    noisy = abar.sqrt() * latent + (1 - abar).sqrt() * noise
    predicted = functional_call(model.unet, parts[1], (noisy, t, context))
    weight = ((1 - abar) / abar).clamp(max=5).flatten()
    return weight * (predicted - noise).pow(2).mean((1, 2, 3))


def by_hand(model, latent, weight, g):
    """One step's loss with prior preservation, and its gradient in every weight."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in dreambooth.parameters(model).items()}
    which = torch.randint(5, (len(latent),), generator=g)
    prompts = ["a sks face"] * len(latent) + ["a face"] * len(latent)
    each = written_out(model, weights, torch.cat([latent, PRIOR[which]]), prompts, g)
    own, kept = each.chunk(2)
    loss = own.mean() + weight * kept.mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in weights.items()}


@pytest.mark.parametrize("weight", [1., .25])
def test_the_loss_and_the_priors_gradient(weight):
    trained = dreambooth.trainable_copy(shared_model())
    latent = torch.randn(2, 4, 8, 8, generator=generator(1))
    loss = dreambooth.prior_preserving_loss(trained, latent, PRIOR, weight, generator(2))
    loss.backward()
    expected, gradients = by_hand(shared_model(), latent, weight, generator(2))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for name, p in dreambooth.parameters(trained).items():
        error = (p.grad - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-9)
        assert error < 1e-3 or gradients[name].norm() < 1e-7, name


def test_without_a_prior_it_is_the_photos_loss_alone():
    latent = torch.randn(2, 4, 8, 8, generator=generator(1))
    loss = dreambooth.prior_preserving_loss(shared_model(), latent, None, 0, generator(2))
    expected = denoising_loss(shared_model(), latent, [hdb.PROMPT], generator(2)).mean()
    torch.testing.assert_close(loss, expected)


def test_a_step_is_adams_of_every_weight():
    model, face = tiny_model(), photo()
    before = {name: p.clone() for name, p in dreambooth.parameters(model).items()}
    tensors = dreambooth.learn(model, face, steps=1, lr=1e-3, batch=2, prior=PRIOR, generator=generator(4))
    latent = model.encode(face).repeat(2, 1, 1, 1)
    _, gradients = by_hand(model, latent, 1., generator(4))
    assert tensors.keys() == before.keys()
    for name, change in tensors.items():
        # Adam's first step is the rate in the direction of the sign, where there is a gradient to speak of
        clear = gradients[name].abs() > 1e-4
        expected = -1e-3 * gradients[name].sign()
        assert change.shape == (1, *before[name].shape)
        torch.testing.assert_close(change[0][clear], expected[clear], rtol=1e-2, atol=1e-6)
        assert torch.equal(dreambooth.parameters(model)[name], before[name])  # the model stays as it is


def test_edits_are_the_trained_model():
    model, face = tiny_model(), photo()
    tensors = dreambooth.learn(model, face, steps=3, lr=1e-3, prior=PRIOR, generator=generator(4))
    person = dreambooth.adapters(tensors, hdb.HyperDreamBooth(model))
    assert {type(adapter) for adapter in person.values()} == {Change}
    weights = {name: p + tensors[name][0] for name, p in dreambooth.parameters(model).items()}
    latent, prompts = torch.randn(2, 4, 8, 8, generator=generator(3)), ["a sks face"] * 2
    with torch.no_grad(), model.adapted(person):
        found = denoising_loss(model, latent, prompts, generator(5))
    expected = written_out(model, weights, latent, prompts, generator(5))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    plain = denoising_loss(model, latent, prompts, generator(5))
    assert ((found - plain).abs() / plain).max() > .01


def test_every_setting_is_heard():
    model, face = shared_model(), photo()
    usual = {"steps": 2, "lr": 1e-3, "batch": 1, "prior": PRIOR, "prior_weight": 1.}
    others = {"steps": 3}, {"lr": 2e-3}, {"batch": 2}, {"prior": PRIOR + 1}, {"prior_weight": .5}, {"rank": 2}
    seen = []
    for other in {}, *others:
        losses = []
        tensors = dreambooth.learn(model, face, **usual | other, generator=generator(4),
                                 callback=lambda step, loss: losses.append((step, loss)))  # noqa: B023
        assert [step for step, _ in losses] == list(range((usual | other)["steps"]))
        seen.append(sum(t.double().abs().sum().item() for t in tensors.values()))
    assert len(set(seen)) == len(seen)
    again = dreambooth.learn(model, face, **usual, generator=generator(4))
    assert sum(t.double().abs().sum().item() for t in again.values()) == seen[0]


def test_a_lora_takes_people_side_by_side():
    model, faces = shared_model(), photo(2)
    tensors = dreambooth.learn(model, faces, steps=2, lr=1e-2, rank=3, prior=PRIOR, generator=generator(4))
    person = dreambooth.adapters(tensors, hdb.HyperDreamBooth(model))
    layers = personal_layers(model.unet, model.text)
    assert person.keys() == layers.keys() and all(isinstance(adapter, LowRank) for adapter in person.values())
    start = fresh_lora(layers, 3, generator(4), 2)
    for name, (a, b) in person.items():
        assert a.shape == start[name].a.shape and 0 < (a - start[name].a).abs().max() < .05
        assert b.shape == start[name].b.shape
    assert sum(b.abs().sum() for _, b in person.values()) > 0
    assert all(not torch.equal(b[0], b[1]) for _, b in person.values() if b.abs().sum() > 0)
    with pytest.raises(ValueError, match="one person at a time"):
        dreambooth.learn(model, faces, steps=1, prior=PRIOR)


def test_class_pictures_are_the_models_own():
    model = shared_model()
    latents = dreambooth.class_pictures(model, 3, 6)
    seeds = torch.randint(2 ** 31, (3,), generator=generator(6)).tolist()
    pictures = model.sample(["a face"] * 3, seeds, steps=25, guidance=3.)
    assert torch.equal(latents, model.encode(pictures))
    assert dreambooth.class_pictures(model, 3, 6) is latents  # of all people of a run


@pytest.mark.parametrize("rank", [0, 2])
def test_a_person_in_a_file(tmp_path, rank):
    method = hdb.HyperDreamBooth(shared_model())
    tensors = dreambooth.learn(method.model, photo(), steps=1, lr=1e-3, rank=rank, prior=PRIOR)
    person = Person(dreambooth.METHOD, tensors)
    save_person(person, method, tmp_path / "me.safetensors")
    back = load_person(tmp_path / "me.safetensors", method, METHODS)
    assert back.method.name == "dreambooth" and back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], t.half().float()) for name, t in tensors.items())
    name = next(iter(tensors))
    for broken in {name: tensors[name][..., :1]}, {"unet.nowhere": torch.zeros(1)}, {name: tensors[name] / 0}:
        with pytest.raises(UserError):
            save_person(Person(dreambooth.METHOD, tensors | broken), method, tmp_path / "x")
    del tensors[name]
    with pytest.raises(UserError, match=f"{name} is missing"):
        save_person(Person(dreambooth.METHOD, tensors), method, tmp_path / "x")
