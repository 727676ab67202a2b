"""Half precision on the CPU: every method and training on a tiny model, against the same in float32."""
from functools import cache

import pytest
import torch
from tiny import generator, photo, tiny_hypernet, tiny_model

import hdb
from diffusion import denoising_loss, noised
from adapters import join
from hdb import HyperDreamBooth
from methods import dreambooth, e4t, perfusion, textual_inversion, train_e4t
from training.trainer import global_seed
from vit import encode_face

STEPS = {"steps": 2, "batch": 2}


model_in = cache(tiny_model)  # by dtype


def in_float32(tensors):
    assert all(t.dtype == torch.float32 for t in tensors.values())
    return tensors


def nobody(model):
    return {}


def hyperdreambooth(model):
    method = HyperDreamBooth(model)
    method.hypernet = tiny_hypernet(*method.lidb.shape)
    theta = method.predict(photo())
    lora = method.fine_tune(photo(), theta, rank=2, generator=generator(3), **STEPS)
    return join(method.lidb.adapters(theta), lora)


def fine_tuning_alone(model):
    return HyperDreamBooth(model).fine_tune(photo(), rank=2, lr=.02, generator=generator(3), **STEPS)


def target(model):
    method, latents = HyperDreamBooth(model), model.encode(photo())
    theta = method.fit_theta(lambda: (latents, ["a [V] face"]), 1, 2, .02, generator(3))
    return method.lidb.adapters(theta)


def class_lora(model):
    prior = dreambooth.class_pictures(model, 1, 8)
    learnt = dreambooth.learn(model, photo(), rank=2, lr=.005, prior=prior, generator=generator(3), **STEPS)
    return dreambooth.adapters(in_float32(learnt), HyperDreamBooth(model))


def lora_without_a_class(model):
    learnt = dreambooth.learn(model, photo(), rank=2, lr=.02, prior_weight=0, generator=generator(3), **STEPS)
    return dreambooth.adapters(in_float32(learnt), HyperDreamBooth(model))


def all_weights(model):
    prior = torch.randn(3, 4, 8, 8, generator=generator(8))
    learnt = dreambooth.learn(model, photo(), lr=1e-3, prior=prior, generator=generator(3), **STEPS)
    return dreambooth.adapters(in_float32(learnt), HyperDreamBooth(model))


def a_word(model):
    learnt = textual_inversion.learn(model, photo(), generator=generator(3), **STEPS)
    return textual_inversion.adapters(in_float32(learnt), HyperDreamBooth(model))


def gated_values(model):
    learnt = perfusion.learn(model, photo(), generator=generator(3), **STEPS)
    return perfusion.adapters(in_float32(learnt), HyperDreamBooth(model))


def encoded(model):
    with global_seed(0):
        vit, domain = tiny_hypernet(1, 1).vit, e4t.Domain(e4t.EncoderConfig(photo=16, width=20), model)
        domain.vit = vit
        torch.nn.init.normal_(domain.encoder.word.weight, std=.01)
    learnt = e4t.learn(model, photo(), domain, generator=generator(3), **STEPS)
    return e4t.adapters(in_float32(learnt), HyperDreamBooth(model))


@cache
def picture(made, dtype):
    """What a person made by this method looks like in a model of this dtype."""
    model = model_in(dtype)
    with model.adapted(made(model)):
        return model.sample(["a [V] face"], steps=3)


@pytest.mark.filterwarnings("ignore:prompt is longer")
@pytest.mark.parametrize("made, dtype, rounding", [
    *((made, torch.bfloat16, .08) for made in (
        hyperdreambooth, fine_tuning_alone, target, class_lora, all_weights, lora_without_a_class, a_word,
        gated_values, encoded)),
    *((made, torch.float16, .01) for made in (hyperdreambooth, all_weights, gated_values))])
def test_a_person_made_in_half_precision_is_that_of_float32(made, dtype, rounding):
    expected = picture(made, torch.float32)
    # else the comparison would say little
    assert (expected - picture(nobody, torch.float32)).abs().max() > 1.5 * rounding
    assert (picture(made, dtype) - expected).abs().max() < rounding


def hyper_loss(model):
    method = HyperDreamBooth(model)
    net = tiny_hypernet(*method.lidb.shape).requires_grad_()
    latent, prompts = model.encode(photo(2)), ["a [V] face"] * 2
    theta = net.refine(encode_face(net.vit, photo(2)))
    goal = torch.zeros_like(theta)
    with model.adapted(method.lidb.adapters(theta)):
        loss, _, _ = hdb.hyper_loss(model, prompts, noised(latent, generator(3)), theta, goal, beta=1.)
        loss.backward()
    return loss.item(), net.heads.grad


def e4t_loss(model):
    with global_seed(0):
        domain = e4t.Domain(e4t.EncoderConfig(photo=16, width=20), model)
        deltas = torch.nn.ModuleList(map(train_e4t.Offset, e4t.attention(model).values()))
    seen = torch.randn(2, 16, generator=generator(5))
    adapters = train_e4t.in_training(domain, deltas, model, seen)
    with model.adapted(adapters):
        denoising = denoising_loss(model, model.encode(photo(2)), ["a [V] face"] * 2, generator(3))
        loss, _ = e4t.total(denoising, adapters["unet."])
        loss.backward()
    return loss.item(), domain.encoder.word.weight.grad


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, .1), (torch.float16, .01)])
@pytest.mark.parametrize("loss", [hyper_loss, e4t_loss])
def test_a_trainings_step_in_half_precision_is_that_of_float32(loss, dtype, rounding):
    (expected, slope), (value, gradient) = (loss(model_in(kind)) for kind in (torch.float32, dtype))
    assert value == pytest.approx(expected, rel=rounding) and gradient.dtype == torch.float32
    assert (gradient - slope).norm() < 3 * rounding * slope.norm()
