"""The method by numbers, on a tiny model: each step against the same written out with changed weights."""
import copy
import weakref

import pytest
import torch
from tiny import (
    Changed, deltas, generator, photo, shared_model, some_latent, times_and_noise, tiny_hypernet,
    tiny_model, untouched)

import diffusion
import hdb
import lidb
from diffusion import denoising_loss, noised
from adapters import Change, LowRank, adapted, fresh_lora, join, merge
from files import encoders
from files.checkpoints import checksum
from training.fit import fastest, fit
from vit import encode_face


@pytest.fixture(scope="module")
def method():
    model = shared_model()
    lidb = hdb.HyperDreamBooth(model).lidb
    return hdb.HyperDreamBooth(model, tiny_hypernet(*lidb.shape))


def some_theta(method, people=1, seed=3, size=.3):
    return size * torch.randn(people, *method.lidb.shape, generator=generator(seed))


# ------------------------------------------------------------------------------------------------------------
# The parts of the method

def test_what_belongs_to_the_method(method):
    assert hdb.PROMPT == "a [V] face"
    assert method.layers.keys() == method.lidb.adapters(some_theta(method)).keys()
    assert hdb.HyperDreamBooth(method.model, basis_seed=3).lidb.seed == 3
    assert hdb.HyperDreamBooth(method.model).lidb.seed == 0 and method.lidb is method.lidb
    brings = tiny_hypernet(*method.lidb.shape, basis_seed=5)
    assert hdb.HyperDreamBooth(method.model, brings, basis_seed=3).lidb.seed == 5
    assert method.lidb.device == method.model.device


def test_the_prediction_is_eq_3_on_the_features_of_the_photo(method):
    net, photos = method.hypernet, photo(2)
    theta = method.predict(photos)
    small = torch.nn.functional.interpolate(photos, (16, 16), mode="bicubic", antialias=True)
    features = net.vit(small)  # normalised for mean and deviation .5: as it is
    assert torch.allclose(theta, net.refine(features, 4), atol=1e-5)
    assert theta.shape == (2, *method.lidb.shape)
    assert torch.allclose(method.predict(photos, 2), net.refine(features, 2), atol=1e-5)
    assert not torch.allclose(method.predict(photos, 2), theta, atol=1e-2) and not theta.requires_grad
    few = tiny_hypernet(*method.lidb.shape, iterations=2)  # s of the configuration, in use as in training
    predicted = hdb.HyperDreamBooth(method.model, few.requires_grad_()).predict(photos)
    assert torch.allclose(predicted, net.refine(features, 2), atol=1e-5) and not predicted.requires_grad
    both = method.predict(photo(6).unflatten(0, (2, 3)))  # of three photos each, the mean
    assert torch.allclose(both, method.predict(photo(6)).unflatten(0, (2, 3)).mean(1), atol=1e-5)
    half = copy.deepcopy(net)
    for name, p in half.named_parameters():
        p.data = p.data if name.startswith("vit.") else p.data.bfloat16()
    assert hdb.HyperDreamBooth(method.model, half).predict(photos).dtype == torch.float32
    with pytest.raises(ValueError, match="no hypernetwork"):
        hdb.HyperDreamBooth(method.model).predict(photos)


# ------------------------------------------------------------------------------------------------------------
# Eq. 2

def written_out_loss(model, thetas, latent, prompts, seed):
    """The denoising term person by person, each with their own weights W + ΔW: Eq. 1 without LiDB.factors."""
    a0, a_aux, b_aux = hdb.HyperDreamBooth(model).lidb.basis
    a, layers = len(a0), hdb.HyperDreamBooth(model).layers
    g = generator(seed)
    (t, noise), losses = times_and_noise(latent.shape, g), []
    for i, theta in enumerate(thetas):
        changed = {name: a_aux[j] @ (a0 + theta[j, :a, None]) @ theta[j, None, a:] @ b_aux[j]
                   for j, name in enumerate(layers)}
        person, abar = Changed(model, changed), diffusion.ALPHAS_CUMPROD[t[i]]
        noisy = abar.sqrt() * latent[i:i + 1] + (1 - abar).sqrt() * noise[i:i + 1]
        context = person.context([prompts[i].replace("[V]", "sks")])
        error = (person.unet(noisy, t[i:i + 1], context) - noise[i:i + 1]).square().mean()
        losses.append(error * min((1 - abar) / abar, 5))
    return torch.stack(losses)


def test_eq_2_of_a_part_of_a_batch(method):
    """What several processes have is together what one has: the noise is of the whole batch."""
    latent, prompts, theta = some_latent(4), ["a", "a face", "a [V] face", "[V]"], some_theta(method, 4)

    def loss(rows, part):
        with method.model.adapted(method.lidb.adapters(theta[rows])):
            noisy = noised(latent[rows], generator(3), part)
            return hdb.hyper_loss(method.model, prompts[rows], noisy, theta[rows])[0].item()
    halves = [loss(slice(2 * i, 2 * i + 2), (i, 2)) for i in range(2)]
    assert sum(halves) / 2 == pytest.approx(loss(slice(4), (0, 1)), rel=1e-4)


def test_eq_2_and_its_gradient(method):
    latent, prompts = some_latent(2), ["a [V] face", "a [V] face as a rock star"]
    target = some_theta(method, 2, seed=9)
    theta_hat, theta_ref = (some_theta(method, 2).requires_grad_() for _ in range(2))
    with method.model.adapted(method.lidb.adapters(theta_hat)):
        noisy = noised(latent, generator(3))
        loss, denoising, distance = hdb.hyper_loss(method.model, prompts, noisy, theta_hat, target, 2., 3.)
        loss.backward()
    first = written_out_loss(method.model, theta_ref, latent, prompts, 3).mean()
    second = (theta_ref - target).square().mean()
    (2 * first + 3 * second).backward()
    assert denoising.item() == pytest.approx(first.item(), rel=1e-4)
    assert distance.item() == pytest.approx(second.item(), rel=1e-5)
    assert loss.item() == pytest.approx(2 * first.item() + 3 * second.item(), rel=1e-4)
    assert (theta_hat.grad - theta_ref.grad).norm() < 1e-3 * theta_ref.grad.norm()
    assert (theta_ref.grad.abs().amax((0, 2)) > 0).all() and untouched(method.model)


def test_the_terms_of_eq_2_can_be_left_out(method):
    latent, prompts, theta = some_latent(2), ["a [V] face"] * 2, some_theta(method, 2)
    target = some_theta(method, 2, seed=9)

    def terms(**more):
        with method.model.adapted(method.lidb.adapters(theta)):
            noisy = noised(latent, generator(3))
            return [t.item() for t in hdb.hyper_loss(method.model, prompts, noisy, theta, **more)]
    loss, denoising, distance = terms()  # β = 0 is the default and needs no targets
    assert loss == denoising > 0 and distance == 0
    assert terms(theta=target) == [loss, denoising, 0]  # without β targets change nothing
    loss, denoising, distance = terms(theta=target, alpha=0., beta=.5)
    assert loss == pytest.approx(.5 * distance) and distance > 0
    with pytest.raises(ValueError, match="β > 0 needs target θ"):
        terms(beta=1.)
    assert untouched(method.model)


def test_checkpointing_gives_the_same_gradient_through_the_hypernetwork(method):
    latent, gradients = some_latent(2), []
    model = tiny_model()
    for model.unet.gradient_checkpointing in (True, False):
        theta = some_theta(method, 2).requires_grad_()
        other = hdb.HyperDreamBooth(model)
        with model.adapted(other.lidb.adapters(theta)):
            hdb.hyper_loss(model, ["a [V] face"] * 2, noised(latent, generator()), theta)[0].backward()
        gradients.append(theta.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


def test_a_few_steps_of_target_fitting_written_out(method):
    """Adam from θ = 0 on the sum over people of each one's own loss, which leaves them apart."""
    latents, prompts = some_latent(2, seed=4), ["a [V] face", "a [V] face as a rock star"]
    told = []
    ours = method.fit_theta(lambda: (latents, prompts), 2, 3, .02, generator(6),
                            lambda step, loss: told.append(step))
    assert told == [0, 1, 2]
    assert ours.shape == (2, *method.lidb.shape) and not ours.requires_grad and untouched(method.model)
    theta, g = torch.zeros(2, *method.lidb.shape, requires_grad=True), generator(6)
    optimizer = torch.optim.Adam([theta], lr=.02, betas=(.9, .99))
    for _ in range(3):
        with method.model.adapted(method.lidb.adapters(theta)):
            loss = denoising_loss(method.model, latents, prompts, g).sum()
            (gradient,) = torch.autograd.grad(loss, [theta])
        theta.grad = gradient
        optimizer.step()
    assert torch.allclose(ours, theta, atol=1e-4) and (ours.abs().amax((1, 2)) > .03).all()
    swapped = method.fit_theta(lambda: (latents[[0, 0]], [prompts[0]] * 2), 2, 3, .02, generator(6))
    assert (swapped[0] - ours[0]).norm() < .02 * ours[0].norm()  # whoever the other is


# ------------------------------------------------------------------------------------------------------------
# Rank-lora fast fine-tuning

def written_out_fine_tuning(model, photos, predicted, steps, rank, lr, batch, seed, prompt="a sks face"):
    """LoRA beside a frozen ΔW, by Adam with weights W + ΔW + A·B put into the network by hand. One person,
    whose photos (N, 3, H, W) take turns."""
    layers, g = hdb.HyperDreamBooth(model).layers, generator(seed)
    if predicted:  # without it the text encoder is trained too
        layers = {name: layer for name, layer in layers.items() if name.startswith("unet.")}
    latents = model.encode(photos)
    pairs = {}
    for name, layer in layers.items():
        a = torch.randn(1, layer.in_features, rank, generator=g) / layer.in_features ** .5
        b = torch.zeros(1, rank, layer.out_features)
        pairs[name] = LowRank(a.requires_grad_(), b.requires_grad_())
    parameters, losses = [t for pair in pairs.values() for t in pair], []
    mean, square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(steps):
        latent = latents[[(step * batch + i) % len(latents) for i in range(batch)]]
        t, noise = times_and_noise(latent.shape, g)
        both = predicted | {k: v + predicted.get(k, 0) for k, v in deltas(pairs).items()}
        changed = Changed(model, both)
        abar = diffusion.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latent + (1 - abar).sqrt() * noise
        error = (changed.unet(noisy, t, changed.context([prompt]).expand(batch, -1, -1)) - noise).square()
        loss = (error.mean((1, 2, 3)) * ((1 - abar) / abar).flatten().clamp(max=5)).mean()
        losses.append(loss.item())
        for p, m, v, gradient in zip(parameters, mean, square, torch.autograd.grad(loss, parameters)):
            m.lerp_(gradient, 1 - .9)
            v.lerp_(gradient.square(), 1 - .99)
            ahead, wide = m / (1 - .9 ** (step + 1)), (v / (1 - .99 ** (step + 1))).sqrt()
            p.data -= lr * ahead / (wide + 1e-8)
    return pairs, losses


@pytest.mark.parametrize("with_prediction, photos", [(True, 1), (False, 1), (True, 3)])
def test_fine_tuning_written_out(method, with_prediction, photos):
    faces = photo(photos)
    theta = some_theta(method, size=.3) if with_prediction else None
    predicted = deltas(method.lidb.adapters(theta)) if with_prediction else {}
    losses = []
    given = faces if photos == 1 else faces[None]
    lora = method.fine_tune(given, theta, steps=3, rank=3, lr=1e-2, batch=4, generator=generator(8),
                               callback=lambda *told: losses.append(told))
    pairs, expected = written_out_fine_tuning(method.model, faces, predicted, 3, 3, 1e-2, 4, 8)
    assert [step for step, _ in losses] == [0, 1, 2]
    assert [loss for _, loss in losses] == pytest.approx(expected, rel=1e-5)
    assert lora.keys() == pairs.keys() and untouched(method.model)
    assert not any(t.requires_grad for pair in lora.values() for t in pair)
    for side in "a", "b":
        layers = lidb.unet_layers(method.layers) if with_prediction else method.layers
        at_first = fresh_lora(layers, 3, generator(8))
        ours, theirs, start = (torch.cat([getattr(adapters[k], side).detach().flatten() for k in pairs])
                               for adapters in (lora, pairs, at_first))
        assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


def test_the_reference_is_one_that_sees_the_prediction_and_the_prompt(method):
    """What the comparison above would miss if losses did not depend on them."""
    predicted = deltas(method.lidb.adapters(some_theta(method, size=.3)))
    first = [written_out_fine_tuning(method.model, photo(), p, 1, 3, 1e-2, 4, 8, prompt)[1][0]
             for p, prompt in ((predicted, "a sks face"), ({}, "a sks face"), (predicted, "a face"))]
    assert abs(first[1] / first[0] - 1) > .01 and abs(first[2] / first[0] - 1) > 5e-4


def test_fine_tuning_starts_at_the_prediction_and_adds_to_it(method):
    theta = some_theta(method)
    nothing = method.fine_tune(photo(), theta, steps=0, rank=2)
    assert all((b == 0).all() and a.shape[2] == 2 for a, b in nothing.values())
    given = photo().requires_grad_(), theta.clone().requires_grad_()
    method.fine_tune(*given, steps=2, rank=2, batch=2)
    assert all(t.grad is None for t in given)  # neither is trained, whoever else trains them
    person = join(method.lidb.adapters(theta), method.fine_tune(photo(), theta, steps=2, batch=2))
    # rank 4 is the default, beside LiDB's one; the text encoder has the prediction alone
    assert all(a.shape[2] == (5 if name.startswith("unet.") else 1) for name, (a, _) in person.items())
    twin = copy.deepcopy(method.model)
    merge(twin.layers, person)
    with method.model.adapted(person):
        inside = method.model.sample(["a [V] face"], [0], steps=2)
    assert torch.allclose(twin.sample(["a [V] face"], [0], steps=2), inside, atol=1e-3)
    assert untouched(method.model)


def test_fine_tuning_weighs_places_and_draws_what_its_steps_need(method):
    """Looking back at the end draws nothing more."""
    ours, theirs, losses = generator(5), generator(5), []
    for places in torch.full((8, 8), 3.), 1.:
        method.fine_tune(photo(), some_theta(method), 2, 3, 0., 2, ours.manual_seed(5),
                         lambda step, loss: losses.append(loss), places)
    assert losses[:2] == pytest.approx([3 * loss for loss in losses[2:]], rel=1e-4)
    fresh_lora(lidb.unet_layers(method.layers), 3, theirs)
    for _ in range(2):
        noised(some_latent(2), theirs)
    assert torch.equal(torch.rand(3, generator=ours), torch.rand(3, generator=theirs))


def test_what_is_fitted_is_where_the_model_is(monkeypatch):
    for name in "fit", "fit_or_take_back":  # whose optimiser knows no meta tensors
        monkeypatch.setattr(hdb, name, lambda *_, **__: None)
    model = tiny_model("meta")
    method = hdb.HyperDreamBooth(model)
    theta = method.fit_theta(None, 2, 1, .1, None)
    lora = method.fine_tune(photo(2), theta)
    assert all(t.device == model.device for t in (theta, *(t for pair in lora.values() for t in pair)))


def test_the_defaults_of_fine_tuning(method):
    losses = []
    method.fine_tune(photo(), callback=lambda step, loss: losses.append(loss))
    same = []  # of four steps, which suffice: the rate and the rank show from the second on
    method.fine_tune(photo(), None, 4, 4, 3e-3, 4, generator(0), lambda step, loss: same.append(loss))
    assert len(losses) == 40 and losses[:4] == same
    assert sum(losses[-8:]) < sum(losses[:8])


def test_ten_losses_of_a_fine_tuning(method):
    """Stored ones: whatever changes them changes the method."""
    losses = []
    method.fine_tune(photo(), some_theta(method), steps=10, lr=1e-2, generator=generator(1),
                     callback=lambda step, loss: losses.append(loss))
    assert losses == pytest.approx(LOSSES, rel=2e-3)


LOSSES = [4.56725, 3.26457, 2.84317, 3.08453, 2.98364, 2.77414, 3.1169, 3.34462, 3.36288, 2.99894]


def test_in_a_small_models_weights_the_lora_learns_the_same(method, monkeypatch):
    for theta in some_theta(method), None:
        in_weights = method.fine_tune(photo(), theta, steps=3, lr=1e-2)
        with monkeypatch.context() as patch:
            patch.setattr("training.fit.SMALL", 0)
            beside = method.fine_tune(photo(), theta, steps=3, lr=1e-2)
        assert all(torch.allclose(in_weights[k].b, beside[k].b, rtol=.02, atol=1e-3) for k in beside)


def test_which_form_of_a_lora_is_the_fastest(method, monkeypatch):
    """In the weights: one person's, in float32, in a small model."""
    layers = lidb.unet_layers(method.layers)
    one, two = fresh_lora(layers, 2, generator()), fresh_lora(layers, 2, generator(), 2)
    assert all(isinstance(adapter, Change) for adapter in fastest(one, layers).values())
    assert fastest(two, layers) is two
    half = {name: copy.deepcopy(layer).bfloat16() for name, layer in layers.items()}
    assert fastest(one, half) is one  # whose 8 bits would round W + ΔW
    monkeypatch.setattr("training.fit.SMALL", 8)
    assert fastest(one, layers) is one


def test_people_fine_tuned_side_by_side_do_not_mix(method):
    theta = some_theta(method, 3, size=1.)

    def tune(*who):
        photos = torch.cat([photo(seed=i) for i in who])
        return method.fine_tune(photos, theta[list(who)], steps=2, rank=2, batch=2)
    one, other = tune(0, 1), tune(0, 2)  # the second person is another, the first one's result the same
    assert all(len(a) == len(b) == 2 for a, b in one.values())
    off = torch.stack([(b - other[k].b).norm(dim=(1, 2)) / b.norm(dim=(1, 2)) for k, (_, b) in one.items()])
    assert off[:, 0].mean() < .01 and off[:, 1].min() > .1


def test_people_with_several_photos_each_do_not_mix(method):
    faces = photo(4).unflatten(0, (2, 2))
    both = method.fine_tune(faces, steps=1, rank=2, batch=2, lr=1e-2, generator=generator(1))
    other = torch.stack([faces[0], photo(2, seed=5)])
    changed = method.fine_tune(other, steps=1, rank=2, batch=2, lr=1e-2, generator=generator(1))
    same = [torch.allclose(both[k].b[0], changed[k].b[0], atol=1e-5) for k in both]
    assert all(same) and not all(torch.allclose(both[k].b[1], changed[k].b[1], atol=1e-5) for k in both)


def test_a_known_start_comes_to_a_known_optimum():
    """fit on ‖x·(W + ΔW + A·B) − x·(W + ΔW*)‖²: the lora factors become what the prediction lacks."""
    layers = {"one": torch.nn.Linear(6, 5)}
    g = generator(2)
    start = {"one": LowRank(torch.randn(1, 6, 1, generator=g), torch.randn(1, 1, 5, generator=g))}
    lacking = torch.randn(6, 2, generator=g) @ torch.randn(2, 5, generator=g)
    x = torch.linalg.qr(torch.randn(64, 6, generator=g))[0] * 8
    aim = layers["one"](x).detach() + x @ (deltas(start)["one"] + lacking)
    lora, losses = fresh_lora(layers, 2, g), []
    fit(lambda: (layers["one"](x) - aim).square().mean(), list(lora["one"]), 400, .03,
            lambda: adapted(layers, join(start, lora)),
            lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx((x @ lacking).square().mean().item(), rel=1e-4)
    assert torch.allclose(deltas(lora)["one"], lacking, atol=.02) and losses[-1] < 1e-3 * losses[0]


# ------------------------------------------------------------------------------------------------------------
# Sampling

def written_out_sample(model, prompts, negative, seeds, steps, scale):
    """DPM-Solver++(2M) on ε̂ = ε(negative) + scale·(ε(prompt) − ε(negative)), each from its own forward."""
    noise = [torch.randn(4, 8, 8, generator=generator(seed)) for seed in seeds]
    to, away = model.context(prompts), model.context([negative] * len(prompts))

    def denoise(x, t):
        towards, from_ = model.unet(x, torch.tensor([t]), to), model.unet(x, torch.tensor([t]), away)
        return from_ + scale * (towards - from_)
    latent = diffusion.dpmpp_2m(denoise, torch.stack(noise), steps)
    return latent


@pytest.mark.parametrize("scale, negative", [(3., ""), (1., ""), (7.5, "blurry"), (0., "blurry")])
@torch.no_grad()
def test_guidance_and_negative_change_the_sample_as_the_formula_says(method, scale, negative):
    model, prompts = method.model, ["a [V] face", "a [V] face as a rock star"]
    words = [p.replace("[V]", "sks") for p in prompts]
    person = method.lidb.adapters(some_theta(method))
    for adapters in {}, person:
        latent = written_out_sample(Changed(model, deltas(adapters)), words, negative, [3, 4], 2, scale)
        expected = model.decode(latent).clamp(-1, 1)
        got = method.sample(prompts, adapters, [3, 4], steps=2, guidance=scale, negative=negative)
        assert got.shape == (2, 3, 64, 64) and got.dtype == torch.float32
        assert (got - expected).norm() < .005 * expected.norm()
    plain = method.sample(prompts, {}, [3, 4], steps=2, guidance=scale, negative=negative)
    assert (plain - got).norm() > .02 * got.norm()


@pytest.mark.parametrize("text, person", [(3., 1.5), (1., 0.), (0., 2.), (2., 2.)])
@torch.no_grad()
def test_text_and_person_have_a_weight_each(method, text, person):
    model, prompts = method.model, ["a [V] face", "a [V] face as a rock star"]
    adapters = method.lidb.adapters(some_theta(method, 2))
    nobody = model.context(["blurry"])

    def written_out(own, prompt, seed):
        to, away = (own.context([words]) for words in (prompt.replace("[V]", "sks"), "blurry"))

        def denoise(x, t):
            t = torch.tensor([t])
            base, empty = model.unet(x, t, nobody), own.unet(x, t, away)
            return base + person * (empty - base) + text * (own.unet(x, t, to) - empty)
        noise = torch.randn(1, 4, 8, 8, generator=generator(seed))
        return model.decode(diffusion.dpmpp_2m(denoise, noise, 2)).clamp(-1, 1)
    pictures = method.sample(prompts, adapters, [3, 4], steps=2, guidance=text, negative="blurry",
                             person_guidance=person)
    for i, prompt in enumerate(prompts):
        expected = written_out(Changed(model, deltas(adapters, i)), prompt, [3, 4][i])
        assert (pictures[i] - expected).norm() < .005 * expected.norm()
    assert untouched(model)


def test_the_persons_usual_weight_costs_nothing(method, monkeypatch):
    model, asked, applied = method.model, [], []
    adapters = method.lidb.adapters(some_theta(method))
    with model.adapted(adapters):
        before = model.sample(["a [V] face"], [5], steps=2)
    monkeypatch.setattr(model, "adapted", lambda a: applied.append(len(a)) or adapted(model.layers, a))
    counts = model.unet.register_forward_pre_hook(lambda unet, inputs: asked.append(len(inputs[0])))
    try:
        assert torch.equal(method.sample(["a [V] face"], adapters, [5], steps=2, person_guidance=1.), before)
        assert asked == [2, 2] and [n for n in applied if n] == [len(adapters)]  # once, not at every step
        asked.clear()
        method.sample(["a [V] face"], adapters, [5], steps=2, person_guidance=1.5)
        assert asked == [2, 1, 2, 1]
    finally:
        counts.remove()
    with pytest.raises(ValueError, match="adapters of a person"):
        model.sample(["a [V] face"], steps=1, person_guidance=2.)


def test_the_formula_sees_its_arguments(method):
    def sample(guidance, negative):
        return method.sample(["a [V] face"], {}, [3], steps=3, guidance=guidance, negative=negative)
    base = sample(3., "")
    assert (sample(4., "") - base).abs().max() > .01 and (sample(3., "blurry") - base).abs().max() > .01


def test_the_defaults_of_sampling(method):
    model = method.model
    person = method.lidb.adapters(some_theta(method).requires_grad_())
    assert not method.sample(["a face"], person, steps=1).requires_grad
    default = model.sample(["a face", "a face as a rock star"])
    same = model.sample(["a face", "a face as a rock star"], [0, 1], 15, 2., "", (64, 64), diffusion.dpmpp_2m)
    assert torch.equal(default, same) and default.abs().max() <= 1
    assert torch.equal(method.sample(["a face"]), model.sample(["a face"]))


def test_sampling_is_one_person_per_picture_and_seeded(method):
    prompts = ["a [V] face", "a [V] face as a rock star"]
    adapters = method.lidb.adapters(some_theta(method, 2))
    state = torch.get_rng_state()
    together = method.sample(prompts, adapters, [3, 4], steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(2):
        mine = {k: LowRank(a[i:i + 1], b[i:i + 1]) for k, (a, b) in adapters.items()}
        alone = method.sample(prompts[i:i + 1], mine, [3 + i], steps=2)[0]
        assert (alone - together[i]).norm() < .01 * alone.norm()
    assert not torch.allclose(method.sample(prompts, {}, [3, 4], steps=2), together, atol=1e-2)
    assert not torch.allclose(method.sample(prompts, adapters, [5, 4], steps=2)[0], together[0], atol=1e-2)
    with pytest.raises(ValueError, match="1 seeds for a batch of 2"):
        method.sample(prompts, adapters, [3])


def test_other_sizes_samplers_and_callbacks(method):
    model, calls = method.model, []
    wide = model.sample(["a face"], [0], steps=2, size=(64, 96),
                        callback=lambda i, t, x, x0: calls.append((i, x.shape)))
    assert wide.shape == (1, 3, 64, 96) and calls == [(0, (1, 4, 8, 12)), (1, (1, 4, 8, 12))]
    other = model.sample(["a face"], [0], steps=2, sampler=diffusion.ddim)
    assert not torch.allclose(other, model.sample(["a face"], [0], steps=2), atol=1e-3)
    for wrong in ((60, 64), (64, 60)):
        with pytest.raises(ValueError, match=f"divisible by 8, not {wrong[0]}×{wrong[1]}"):
            model.sample(["a face"], size=wrong)
    with pytest.raises(ValueError, match="divisible by 8"):
        model.encode(torch.zeros(1, 3, 64, 100))


def test_an_interrupted_run_leaves_the_model_untouched(method):
    def stop(*_):
        raise KeyboardInterrupt
    adapters = method.lidb.adapters(some_theta(method))
    for run in (lambda: method.fine_tune(photo(), steps=1, callback=stop),
                lambda: method.sample(["a [V] face"], adapters, [0], steps=2, callback=stop)):
        with pytest.raises(KeyboardInterrupt):
            run()
    assert untouched(method.model)


def test_two_methods_around_one_model_do_not_meet(method):
    other = hdb.HyperDreamBooth(method.model, basis_seed=1)
    adapters = method.lidb.adapters(some_theta(method))
    before = method.sample(["a [V] face"], adapters, [0], steps=1)
    theta = torch.ones(1, *other.lidb.shape)
    with method.model.adapted(other.lidb.adapters(theta)):
        assert hdb.hyper_loss(method.model, [hdb.PROMPT], noised(some_latent(1), generator()), theta)[0] > 0
    assert torch.equal(method.sample(["a [V] face"], adapters, [0], steps=1), before)
    assert untouched(method.model)


def test_v_becomes_the_identifier(method):
    prompts = "a sks face", "a [V] face", "a [v] face", "a[V]face"
    plain, *others = (method.model.context([p]) for p in prompts)
    assert all(torch.equal(plain, other) for other in others)
    assert not torch.allclose(method.model.context(["a face"]), plain, atol=1e-3)


def test_a_photo_of_another_shape_is_looked_at_whole(method):
    vit = method.hypernet.vit
    assert encode_face(vit, torch.zeros(1, 3, 64, 128)).shape == encode_face(vit, photo()).shape


def test_an_official_encoder_has_its_numbers_while_it_looks(method, monkeypatch):
    """So it costs no memory afterwards."""
    vit, theta, read = method.hypernet.vit, method.predict(photo()), []

    def load_vit(source, device):
        again = copy.deepcopy(vit)
        read.append((source, device, weakref.ref(again)))
        return again
    monkeypatch.setattr(encoders, "load_vit", load_vit)
    monkeypatch.setattr(method.hypernet, "vit", copy.deepcopy(vit).to("meta"))
    method.hypernet.vit.source, method.hypernet.vit.checksum_of_file = "some/vit", checksum(vit)
    assert torch.equal(method.predict(photo()), theta)
    ((source, device, copied),) = read
    assert (source, device) == ("some/vit", method.model.device) and copied() is None
