"""The method on a randomly filled miniature: losses, fine-tuning, sampling, determinism."""
import copy
import json
import pickle

import pytest
import torch
from rule import fill
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clip
import hdb
import sampling
import unet
import vae
from hypernet import HyperConfig, HyperNetwork, NANO_VIT
from lidb import join, lora, merge
from trainer import backward


@pytest.fixture(scope="module")
def method():
    words = sorted({w for p in ("a face as rock star", hdb.IDENTIFIER) for w in p.split()})
    vocab, merges = clip.learn_bpe(words)
    model = hdb.StableDiffusion("random", fill(unet.UNet(unet.NANO)), fill(clip.TextTransformer(clip.NANO)),
                                clip.Tokenizer(vocab, merges, clip.NANO.max_position_embeddings), fill(vae.VAE(vae.NANO)))
    method = hdb.HyperDreamBooth(model)
    torch.manual_seed(0)
    method.hypernet = HyperNetwork(HyperConfig(*method.lidb.shape, vit=NANO_VIT)).eval().requires_grad_(False)
    torch.nn.init.normal_(method.hypernet.heads, std=.1)
    return method


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(people=1, seed=1):
    return torch.rand(people, 3, 128, 128, generator=generator(seed)) * 2 - 1


def test_the_denoising_loss_is_the_error_of_the_clean_latent(method):
    latent = torch.randn(4, 4, 16, 16, generator=generator())
    method.personal.factors = {}
    loss = method.denoising_loss(latent, ["a [V] face"] * 4, generator(7))
    g = generator(7)
    t = ((torch.arange(4) + torch.rand(4, generator=g)) * 250).long()[torch.randperm(4, generator=g)]
    noise = torch.randn(latent.shape, generator=g)
    noisy = sampling.add_noise(latent, noise, t)
    predicted = method.model.unet(noisy, t, method.model.context([f"a {hdb.IDENTIFIER} face"] * 4))
    abar = sampling.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    clean = (noisy - (1 - abar).sqrt() * predicted) / abar.sqrt()
    x_error, e_error = ((a - b).pow(2).mean((1, 2, 3)) for a, b in ((clean, latent), (predicted, noise)))
    strong = (1 / abar - 1).flatten() > 5  # where the clean latent's error is cut
    assert torch.allclose(loss, torch.where(strong, 5 * e_error, x_error), rtol=1e-3)


def test_eq_2(method):
    latent, prompts = torch.randn(2, 4, 16, 16, generator=generator()), ["a [V] face"] * 2
    theta_hat, theta = (torch.randn(2, *method.lidb.shape, generator=generator(s)) * .01 for s in (1, 2))
    terms = lambda **weights: method.hyper_loss(theta_hat, latent, prompts, generator(3), **weights)
    total, denoising, distance = terms(theta=theta, alpha=2., beta=3.)
    assert distance == pytest.approx((theta_hat - theta).pow(2).mean().item())
    assert total.item() == pytest.approx(2 * denoising.item() + 3 * distance.item(), rel=1e-5)
    assert terms()[0] == terms()[1] == denoising  # β = 0 is the default and needs no targets
    assert terms(theta=theta, alpha=0., beta=1.)[0] == distance
    with pytest.raises(ValueError, match="target"):
        terms(beta=1.)


def test_gradients_reach_theta_and_the_model_stays_frozen(method):
    theta = torch.zeros(2, *method.lidb.shape, requires_grad=True)
    method.hyper_loss(theta, torch.randn(2, 4, 16, 16, generator=generator()), ["a [V] face"] * 2, generator())[0].backward()
    assert (theta.grad[..., method.lidb.a:].abs().amax((0, 2)) > 0).all()  # every layer, text encoder included
    assert all(p.grad is None for m in (method.model.unet, method.model.text) for p in m.parameters())


def test_checkpointing_gives_the_same_gradients(method):
    latent, gradients = torch.randn(2, 4, 16, 16, generator=generator()), []
    for method.model.unet.gradient_checkpointing in (True, False):
        theta = (.01 * torch.randn(2, *method.lidb.shape, generator=generator(5))).requires_grad_()
        method.hyper_loss(theta, latent, ["a [V] face"] * 2, generator())[0].backward()
        gradients.append(theta.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


def test_prediction(method):
    one, two = method.predict(photo()), method.predict(photo(2))
    assert one.shape == (1, *method.lidb.shape) and two.shape == (2, *method.lidb.shape) and one.abs().max() > 0
    assert torch.equal(one, method.predict(photo())) and not torch.allclose(one, method.predict(photo(), iterations=1))
    assert method.predict(torch.zeros(1, 3, 128, 512)).shape == one.shape
    with pytest.raises(ValueError, match="no hypernetwork"):
        hdb.HyperDreamBooth(method.model).predict(photo())


def test_fine_tuning_lowers_the_loss_of_its_photo_and_nothing_else(method):
    before = {k: v.clone() for k, v in method.model.unet.state_dict().items()}
    state, losses, theta = torch.get_rng_state(), [], method.predict(photo())
    relaxed = method.fine_tune(photo(), theta, steps=12, rank=3, lr=1e-2, batch=4, callback=lambda step, loss: losses.append(loss))
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert set(relaxed) == set(method.layers) and all(a.shape[2] == b.shape[1] == 3 for a, b in relaxed.values())
    assert all(torch.equal(v, before[k]) for k, v in method.model.unet.state_dict().items())
    assert method.personal.factors == {} and torch.equal(torch.get_rng_state(), state)
    again = method.fine_tune(photo(), theta, steps=12, rank=3, lr=1e-2, batch=4)
    assert all(torch.equal(b, again[k][1]) for k, (_, b) in relaxed.items())


def test_people_fine_tuned_side_by_side_do_not_mix(method):
    tune = lambda *seeds: method.fine_tune(torch.cat([photo(seed=s) for s in seeds]), steps=2, rank=2, batch=2)
    one, other = tune(1, 2), tune(1, 3)  # the second person is another, the first one's result the same
    assert all(len(a) == 2 and torch.allclose(b[0], other[k][1][0], atol=1e-5) for k, (a, b) in one.items())
    assert not any(torch.allclose(b[1], other[k][1][1], atol=1e-4) for k, (_, b) in one.items())


def test_gradients_survive_float16():
    gradients = []
    for dtype in (torch.float32, torch.float16):
        method = hdb.HyperDreamBooth(hdb.load("nano", "cpu", dtype))
        method.personal.factors = lora(method.layers, 1, generator())
        pairs = method.personal.factors.values()
        latent = method.model.encode(photo())
        backward(method.denoising_loss(latent, [hdb.PROMPT], generator()).mean(), [b for _, b in pairs])
        gradients.append([b.grad.flatten() for _, b in pairs])
    assert min(torch.cosine_similarity(*pair, 0) for pair in zip(*gradients)) > .99


def test_every_time_step_can_be_drawn_and_no_other(method, monkeypatch):
    steps = []
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 1 - 2 ** -24))  # the greatest that there is
    monkeypatch.setattr(sampling, "add_noise", lambda x, noise, t: steps.extend(t.tolist()) or x)
    method.personal.factors = {}
    method.denoising_loss(torch.zeros(4, 4, 16, 16), [hdb.PROMPT] * 4, generator())
    assert max(steps) == 999


def test_sampling_is_one_person_per_picture_and_seeded(method):
    theta = method.predict(photo(2))
    factors, prompts = method.lidb.factors(theta), ["a [V] face", "a [V] face as a rock star"]
    together = method.sample(prompts, factors, [3, 4], steps=3)
    assert together.shape == (2, 3, 128, 128) and together.abs().max() <= 1
    for i in range(2):
        alone = method.sample(prompts[i:i + 1], {k: (a[i:i + 1], b[i:i + 1]) for k, (a, b) in factors.items()}, [3 + i], steps=3)
        assert torch.allclose(alone[0], together[i], atol=1e-3)
    assert not torch.allclose(method.sample(prompts, {}, [3, 4], steps=3), together, atol=1e-3)
    assert method.sample(prompts[:1], size=(64, 96), steps=1).shape == (1, 3, 64, 96)
    for wrong in (lambda: method.sample(prompts[:1], size=(100, 64), steps=1), lambda: method.model.encode(torch.zeros(1, 3, 64, 100))):
        with pytest.raises(ValueError, match="divisible by 8"):
            wrong()


def test_an_interrupted_run_leaves_the_model_untouched(method):
    def stop(*_):
        raise KeyboardInterrupt
    factors = method.lidb.factors(method.predict(photo()))
    for run in (lambda: method.fine_tune(photo(), steps=1, callback=stop), lambda: method.sample(["a [V] face"], factors, [0], steps=2, callback=stop)):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert method.personal.factors == {}


def test_a_loss_that_fails_leaves_the_model_untouched(method):
    with pytest.raises(RuntimeError):
        method.hyper_loss(method.predict(photo()), torch.zeros(1, 4, 16, 16), [hdb.PROMPT] * 2, generator())
    assert method.personal.factors == {}


def test_two_methods_around_one_model_do_not_add_up(method):
    other = hdb.HyperDreamBooth(method.model, basis_seed=1)
    assert all(len(m._forward_hooks) == 1 for m in method.layers.values())
    factors = method.lidb.factors(method.predict(photo()))
    before = method.sample(["a [V] face"], factors, [0], steps=1)
    other.hyper_loss(torch.ones(1, *other.lidb.shape), torch.zeros(1, 4, 16, 16), [hdb.PROMPT], generator())
    assert torch.equal(method.sample(["a [V] face"], factors, [0], steps=1), before)


def test_a_deep_copy_is_independent_and_a_model_can_be_pickled(method):
    twin, factors = copy.deepcopy(method), method.lidb.factors(method.predict(photo()))
    person = method.sample(["a [V] face"], factors, [0], steps=1)
    assert torch.equal(twin.sample(["a [V] face"], factors, [0], steps=1), person)
    assert not torch.allclose(method.sample(["a [V] face"], {}, [0], steps=1), person, atol=1e-3)
    twin.personal.factors = factors
    assert method.personal.factors == {}
    assert pickle.loads(pickle.dumps(method.model)).text.config == method.model.text.config


def test_v_becomes_the_identifier(method):
    plain, capital, small, joined = (method.context([p]) for p in (f"a {hdb.IDENTIFIER} face", "a [V] face", "a [v] face", "a[V]face"))
    assert torch.equal(plain, capital) and torch.equal(plain, small) and torch.equal(plain, joined)


def test_hypernetwork_files(method, tmp_path):
    file = tmp_path / "hypernet.safetensors"
    hdb.save_hypernet(method.hypernet, method, file)
    back = hdb.load_hypernet(file, method.model)
    assert back.config == method.hypernet.config and torch.allclose(back(photo()), method.hypernet(photo()), atol=1e-2)
    hdb.save_hypernet(method.hypernet, hdb.HyperDreamBooth(method.model, basis_seed=1), file)
    seed_one = hdb.load_hypernet(file, method.model)
    assert seed_one.lidb.seed == 1
    (tmp_path / "text.safetensors").write_text("hello")
    good, note = load_file(file), safe_open(file, "pt").metadata()
    config = json.loads(note["config"])
    save_file(good, tmp_path / "other.safetensors")
    save_file(good, tmp_path / "field.safetensors", note | {"config": json.dumps(config | {"height": 3})})
    save_file({k: v for k, v in good.items() if k != "bias"}, tmp_path / "missing.safetensors", note)
    save_file(good | {"bias": torch.zeros(3)}, tmp_path / "misshapen.safetensors", note)
    for name, why in (("text", "not safetensors"), ("none", "No such file"), ("other", "not a hypernetwork"), ("field", "not a hypernetwork"),
                      ("missing", "no tensor for bias"), ("misshapen", r"bias has shape \(3,\), expected \(79, 96\)")):
        with pytest.raises(hdb.LoadError, match=why):
            hdb.load_hypernet(tmp_path / f"{name}.safetensors", method.model)


def test_joined_prediction_and_lora_are_what_is_sampled(method):
    theta = method.predict(photo())
    relaxed = method.fine_tune(photo(), theta, steps=2, batch=2)
    person = join(method.lidb.factors(theta), relaxed)
    assert all(a.shape[2] == 5 for a, _ in person.values())
    picture = method.sample(["a [V] face"], person, [0], steps=1)
    twin = copy.deepcopy(method)
    merge(twin.layers, person)
    assert torch.allclose(twin.sample(["a [V] face"], {}, [0], steps=1), picture, atol=1e-3)
    assert not torch.allclose(twin.sample(["a [V] face"], {}, [0], steps=1), method.sample(["a [V] face"], {}, [0], steps=1), atol=1e-2)
