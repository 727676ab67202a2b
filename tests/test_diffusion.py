"""diffusion.py against diffusers' schedulers, at every step, and a small model against their pipeline."""
from functools import cache
from pathlib import Path

import pytest
import torch
from rule import difference, draw, fill, generator
from safetensors.torch import load_file

import clip
import diffusion
import unet
import vae

SHAPE, STEPS, LCM_STEPS = (1, 4, 5, 3), (4, 10, 25, 50), (1, 2, 4, 7, 50)
# SD 1.5's structure, thin.
UNET = unet.UNetConfig(block_out_channels=(32, 64, 64, 64), cross_attention_dim=24, layers_per_block=1)
VAE = vae.VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
TEXT = clip.TextConfig(vocab_size=300, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=2)


def toy(x, t):
    """A denoiser in closed form that depends on both of its arguments."""
    return torch.tanh(x * (1 + t / 1000))


def pipeline_inputs():
    """Noise (2, 4, 6, 8), prompts (2, 77) and negative prompts (2, 77)."""
    ids = torch.randint(300, (2, 2, 77), generator=generator("pipeline:ids"))
    return draw((2, 4, 6, 8), "pipeline:x"), *ids


@cache
def stored(part="sampling"):
    return load_file(Path(__file__).parent / f"reference/{part}.safetensors")


@cache
def small_unet():
    return fill(unet.UNet(UNET))


def way(sampler, denoise, x, **options):
    """The latents after each step, (steps, B, 4, h, w), as the callback sees them; the last is the result."""
    seen = []
    result = sampler(denoise, x, callback=lambda i, t, x, x0: seen.append(x), **options)
    assert torch.equal(result, seen[-1])
    return torch.stack(seen)


def test_schedule_equals_diffusers():
    assert difference(diffusion.ALPHAS_CUMPROD, stored()["alphas_cumprod"]) <= 1e-6
    assert diffusion.ALPHAS_CUMPROD.dtype == torch.float32
    # from the definition, in another precision and by other operations
    betas = [(.00085 ** .5 + t / 999 * (.012 ** .5 - .00085 ** .5)) ** 2 for t in range(1000)]
    logs = torch.log1p(-torch.tensor(betas, dtype=torch.float64)).cumsum(0)
    assert difference(diffusion.ALPHAS_CUMPROD.log(), logs) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_timesteps_equal_diffusers(spacing):
    ours = [t for n in (*range(1, 61), 100, 333, 500, 999) for t in diffusion.timesteps(n, spacing)]
    assert ours == stored()[f"times {spacing}"].tolist()
    for steps in (0, 1000, -1):
        with pytest.raises(ValueError, match="from 1 to 999"):
            diffusion.timesteps(steps, spacing)


def test_a_misspelt_spacing_is_an_error():
    with pytest.raises(ValueError, match="leading"):
        diffusion.timesteps(10, "karras")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["ddim eta 0", "ddim eta 1", "dpmpp_2m"])
def test_samplers_equal_diffusers_at_every_step(name, steps):
    case = f"{name} {steps}"
    options = {"eta": 1., "generator": generator(f"{case}:steps")} if "eta 1" in name else {}
    ours = way(getattr(diffusion, name.split()[0]), toy, draw(SHAPE, f"{case}:x"), steps=steps, **options)
    assert len(ours) == steps
    assert max(difference(a, b) for a, b in zip(ours, stored()[case], strict=True)) <= 1e-4


@pytest.mark.parametrize("steps", LCM_STEPS)
def test_consistency_sampling_equals_diffusers_at_every_step(steps):
    noise = generator(f"lcm {steps}:steps")
    ours = way(diffusion.lcm, toy, draw(SHAPE, f"lcm {steps}:x"), steps=steps, generator=noise)
    expected = stored("lcm")[f"lcm {steps}"]
    assert max(difference(a, b) for a, b in zip(ours, expected, strict=True)) <= 1e-4


def test_the_consistency_function_between_its_boundaries(monkeypatch):
    """Where t is so small that f has something of x; and what the callback is told of two steps."""
    monkeypatch.setattr(diffusion, "LCM_TIME_SCALE", .001)
    told, before = [], draw(SHAPE, "x")
    noise = torch.randn(SHAPE, generator=generator("noise"))
    ours = diffusion.lcm(toy, before, 2, generator("noise"), lambda *step: told.append(step))
    for i, t in enumerate((999, 499)):
        (abar, following), s = diffusion.ALPHAS_CUMPROD[[t, 499]], t / 1000
        x0 = (before - (1 - abar).sqrt() * toy(before, t)) / abar.sqrt()
        f = s / (s ** 2 + .25) ** .5 * x0 + .25 / (s ** 2 + .25) * before
        assert told[i][:2] == (i, t) and torch.allclose(told[i][3], x0, rtol=1e-3, atol=1e-4)
        before = following.sqrt() * f + (1 - following).sqrt() * noise
    assert torch.allclose(ours, f, rtol=1e-3, atol=1e-4)


def test_consistency_samplings_time_steps_equal_diffusers():
    ours = [t for n in range(1, 51) for t in diffusion.lcm_timesteps(n)]
    assert ours == stored("lcm")["times"].tolist()
    for steps in 0, 51:
        with pytest.raises(ValueError, match="from 1 to 50"):
            diffusion.lcm(toy, draw(SHAPE, "x"), steps, generator("x"))


@pytest.mark.parametrize("sampler", [diffusion.ddim, diffusion.dpmpp_2m])
def test_samplers_solve_the_equation_they_discretise(sampler):
    """For data N(0, s²) the exact denoiser is linear in x, and the exact solution scales x to deviation s."""
    s = .5

    def exact(x, t):
        abar = diffusion.ALPHAS_CUMPROD[t].item()
        return (1 - abar) ** .5 / (abar * s ** 2 + 1 - abar) * x

    x = torch.ones(1, 4, 2, 2)
    error = {n: abs(sampler(exact, x, steps=n).mean().item() / s - 1) for n in (25, 100, 400)}
    assert error[400] < .02 and error[25] < .1


@pytest.mark.parametrize("sampler", [diffusion.ddim, diffusion.dpmpp_2m])
@pytest.mark.parametrize("steps", [1, 2, 999])
def test_any_number_of_steps(sampler, steps):
    calls = []
    x = sampler(toy, draw(SHAPE, 0), steps=steps,
                callback=lambda i, t, x, x0: calls.append((i, t, x0.isfinite().all().item())))
    assert x.isfinite().all()
    assert [i for i, _, _ in calls] == list(range(steps)) and all(ok for _, _, ok in calls)
    assert all(type(t) is int and 0 < t < 1000 for _, t, _ in calls)


def test_the_usual_number_of_steps():
    assert len(way(diffusion.ddim, toy, draw(SHAPE, 0))) == 50
    assert len(way(diffusion.dpmpp_2m, toy, draw(SHAPE, 0))) == 25
    assert len(way(diffusion.lcm, toy, draw(SHAPE, 0), generator=generator("x"))) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", [diffusion.ddim, diffusion.dpmpp_2m])
def test_the_state_is_kept_in_fp32(sampler, dtype):
    def half(x, t):
        assert x.dtype == torch.float32
        return toy(x, t).to(dtype)

    x = draw(SHAPE, "half").to(dtype)
    ours = sampler(half, x, steps=10)
    assert ours.dtype == torch.float32
    assert difference(ours, sampler(toy, x, steps=10)) < 2e-2


def test_add_noise_equals_diffusers():
    x, t = draw((3, *SHAPE[1:]), "add_noise:x"), torch.tensor([0, 500, 999])
    e = draw(x.shape, "add_noise:noise")
    assert difference(diffusion.add_noise(x, e, t), stored()["add_noise"]) <= 1e-6
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        ours = diffusion.add_noise(x.to(dtype), e.to(dtype), t)
        assert ours.dtype == dtype
        assert difference(ours.float(), stored()["add_noise"]) < 1e-2


def test_add_noise_keeps_unit_variance_and_the_stated_share_of_the_picture():
    x, e = draw((3, 4, 64, 64), "variance:x"), draw((3, 4, 64, 64), "variance:noise")
    t = torch.tensor([10, 400, 900])
    noisy = diffusion.add_noise(x, e, t)
    for i in range(3):
        abar = diffusion.ALPHAS_CUMPROD[t[i]]
        assert abs(noisy[i].var() - 1) < .05
        assert abs((noisy[i] * x[i]).mean() - abar.sqrt()) < .05
        assert abs((noisy[i] * e[i]).mean() - (1 - abar).sqrt()) < .05


@pytest.mark.parametrize("sampler", [diffusion.ddim, diffusion.dpmpp_2m])
def test_one_step_from_the_true_noise_gives_the_picture_back(sampler):
    x, e = draw(SHAPE, "true:x"), draw(SHAPE, "true:noise")
    t = diffusion.timesteps(1, "linspace" if sampler is diffusion.dpmpp_2m else "leading")
    found = []
    noisy = diffusion.add_noise(x, e, torch.tensor(t))
    sampler(lambda *_: e, noisy, steps=1, callback=lambda i, t, x, x0: found.append(x0))
    assert difference(found[0], x) < 1e-4


def test_guidance_in_one_batch_equals_two_calls():
    x, t = draw((3, 4, 6, 8), "guided:x"), 421
    prompts, negatives = draw((3, 7, 24), "guided:to"), draw((3, 7, 24), "guided:away")
    with torch.no_grad():
        for context, negative in ((prompts, negatives), (prompts, negatives[:1]),
                                  (prompts[:1], negatives[:1])):
            for scale in (7.5, 0, -1):
                ours = diffusion.guided(small_unet(), context, negative, scale)(x, t)
                away = small_unet()(x, t, negative.expand(3, -1, -1))
                to = small_unet()(x, t, context.expand(3, -1, -1))
                assert difference(ours, away + scale * (to - away)) < 1e-4


def test_guidance_puts_the_negatives_before_the_prompts():
    calls = []

    def spy(x, t, context):
        calls.append((x, t, context))
        return x * context.mean((1, 2))[:, None, None, None]

    x = draw((2, 4, 3, 3), "order")
    prompts = torch.stack([torch.full((7, 24), 1.), torch.full((7, 24), 2.)])
    negative = torch.full((1, 7, 24), 10.)
    ours = diffusion.guided(spy, prompts, negative, 3.)(x, 5)
    batch, t, context = calls.pop()
    assert not calls and t == 5
    assert torch.equal(batch, torch.cat([x, x]))
    assert context[:, 0, 0].tolist() == [10, 10, 1, 2]
    expected = torch.stack([10 * x[0] + 3 * (1 - 10) * x[0], 10 * x[1] + 3 * (2 - 10) * x[1]])
    assert torch.allclose(ours, expected)
    usual = diffusion.guided(spy, prompts, negative)(x, 5)
    assert torch.equal(usual, diffusion.guided(spy, prompts, negative, 7.5)(x, 5))
    calls.clear()

    for unused in (negative, None):  # at scale 1 there is no use for it
        unguided = diffusion.guided(spy, prompts, unused, 1)(x, 5)
        assert torch.equal(unguided, x * torch.tensor([1., 2.]).view(2, 1, 1, 1))
        assert len(calls.pop()[0]) == 2
    with pytest.raises(ValueError, match="negative"):
        diffusion.guided(spy, prompts)


def test_guidance_to_a_person_is_three_evaluations():
    calls = []

    def model(strength):
        def spy(x, t, context):
            assert t == 5 and x.dtype == context.dtype
            calls.append((len(x), context[:, 0, 0].tolist()))
            return strength * x * context.mean((1, 2))[:, None, None, None]
        return spy
    x, one = draw((3, 4, 3, 3), "person"), torch.ones(1, 7, 24)
    prompts = torch.cat([one, 2 * one, 0 * one])

    def guided(*weights):
        features = prompts, 10 * one, 20 * one
        return diffusion.guided_to_person(model(3.), model(1.), *features, *weights)(x, 5)
    # base(∅) is 20x, person(∅) 30x, person(c) 3x, 6x and 0
    expected = [(20 + 1.5 * (30 - 20) + 2 * (c - 30)) * picture for c, picture in zip((3, 6, 0), x)]
    assert torch.allclose(guided(2., 1.5), torch.stack(expected), atol=1e-4)
    assert calls == [(6, [10, 10, 10, 1, 2, 0]), (3, [20, 20, 20])]
    assert torch.equal(guided(), guided(7.5, 1.5))
    assert torch.allclose(guided(4., 1.), diffusion.guided(model(3.), prompts, 10 * one, 4.)(x, 5), atol=1e-4)


def test_guidance_calls_the_unet_in_the_dtype_of_the_context():
    def spy(x, t, context):
        assert x.dtype == context.dtype == torch.bfloat16
        return x

    context = torch.zeros(1, 7, 24, dtype=torch.bfloat16)
    assert diffusion.guided(spy, context, context.float(), 7.5)(draw(SHAPE, 0), 1).dtype == torch.float32
    single = context.float()
    guided = diffusion.guided_to_person(spy, spy, context, single, single, 7.5)
    assert guided(draw(SHAPE, 0), 1).dtype == torch.float32


def test_an_image_does_not_depend_on_its_batch():
    def image(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = diffusion.seeded_noise((len(seeds), 4, 5, 7), generators)
        return diffusion.ddim(toy, noise, steps=4, eta=1., generator=generators)

    together = image([3, 1, 4])
    for i, seed in enumerate([3, 1, 4]):
        assert torch.equal(together[i:i + 1], image([seed]))
    assert difference(together[0], together[1]) > .1

    seeds = diffusion.seeded_noise((2, 4, 5, 7), [3, 1])
    assert torch.equal(seeds, torch.cat([draw_seed((1, 4, 5, 7), 3), draw_seed((1, 4, 5, 7), 1)]))
    whole = diffusion.seeded_noise((2, 4, 5, 7), torch.Generator().manual_seed(3))
    assert torch.equal(whole, draw_seed((2, 4, 5, 7), 3))
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        diffusion.seeded_noise((3, 4, 5, 7), [3, 1])


def draw_seed(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_fp32_on_the_cpu_whatever_the_defaults():
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            each, whole = (diffusion.seeded_noise((1, 4, 5, 7), source)
                           for source in ([3], torch.Generator("cpu").manual_seed(3)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(each, draw_seed((1, 4, 5, 7), 3)) and torch.equal(whole, each)


def test_everything_is_computed_where_the_latent_is():
    x, model, g = torch.zeros(2, 4, 3, 3, device="meta"), Echo(torch.tanh), torch.Generator()
    assert diffusion.add_noise(x, x, torch.tensor([1, 2])).device == x.device
    assert diffusion.ddim(toy, x, steps=2, eta=1., generator=g).device == x.device
    assert diffusion.denoising_loss(model, x, ["a"], g).device == model.asked[0][1].device == x.device


def test_the_global_generator_is_never_touched():
    state = torch.get_rng_state()
    x = diffusion.seeded_noise(SHAPE, [7])
    diffusion.ddim(toy, x, steps=3)
    diffusion.ddim(toy, x, steps=3, eta=.5, generator=torch.Generator().manual_seed(7))
    diffusion.dpmpp_2m(toy, x, steps=3)
    diffusion.add_noise(x, x, torch.tensor([5]))
    assert torch.equal(torch.get_rng_state(), state)
    for missing in (None, 7, [7]):  # the same seed at each step would be the same noise
        with pytest.raises(ValueError, match="generator"):
            diffusion.ddim(toy, x, steps=3, eta=1., generator=missing)
    with pytest.raises(ValueError, match="eta"):
        diffusion.ddim(toy, x, steps=3, eta=1.5, generator=torch.Generator())


@pytest.mark.parametrize("sampler", [diffusion.ddim, diffusion.dpmpp_2m])
def test_the_noise_given_is_left_as_it_was_and_nothing_is_recorded_for_gradients(sampler):
    x = draw(SHAPE, 0).requires_grad_()
    before = x.detach().clone()
    assert not sampler(toy, x, steps=3).requires_grad
    assert torch.equal(x, before)


def test_pipeline_equals_diffusers():
    text, autoencoder = clip.TextTransformer(TEXT), fill(vae.VAE(VAE))
    fill(text.text_model)
    x, prompts, negatives = pipeline_inputs()
    with torch.no_grad():
        denoise = diffusion.guided(small_unet(), text(prompts), text(negatives), 7.5)
        latents = way(diffusion.ddim, denoise, x, steps=4)
        images = autoencoder.decode(latents[-1] / VAE.scaling_factor)
    reference = stored("pipeline")
    assert max(difference(a, b) for a, b in zip(latents, reference["latents"], strict=True)) <= 1e-4
    assert difference(images, reference["images"]) <= 1e-4
    unguided = way(diffusion.ddim, diffusion.guided(small_unet(), text(prompts), scale=1), x, steps=4)
    assert difference(unguided[-1], reference["latents"][-1]) > .1  # so that the comparison sees the guidance


# ------------------------------------------------------------------------------------------------------------
# The denoising loss

class Echo:
    """A model that keeps what it is asked and answers with a part of it."""

    def __init__(self, answer):
        self.asked, self.answer = [], answer

    def context(self, prompts):
        return torch.tensor([[[float(len(p))]] for p in prompts])

    def unet(self, x, t, context):
        self.asked.append((x, t, context))
        return self.answer(x)


def drawn(count, shape, seed):
    """Time steps and noise as the loss draws them: a step in each of `count` equal parts, in random order."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=g)
    order = torch.randperm(count, generator=g)
    t = torch.stack([((i + u[i]) / count * 1000).long() for i in range(count)])[order]
    return t, torch.randn(shape, generator=g)


def test_the_denoising_loss_is_the_error_of_the_clean_latent():
    latent = draw((6, 4, 5, 3), "loss")
    model = Echo(torch.tanh)
    state = torch.get_rng_state()
    loss = diffusion.denoising_loss(model, latent, ["a", "bb"], torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state) and loss.shape == (6,) and len(model.asked) == 1
    t, noise = drawn(6, latent.shape, 7)
    noisy, asked_t, context = model.asked[0]
    abar = diffusion.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, abar.sqrt() * latent + (1 - abar).sqrt() * noise)
    assert torch.equal(asked_t, t) and sorted(t.mul(6).div(1000, rounding_mode="floor")) == [0, 1, 2, 3, 4, 5]
    assert context.flatten().tolist() == [1, 2, 1, 2, 1, 2]  # two people take turns, each encoded once
    clean = (noisy - (1 - abar).sqrt() * noisy.tanh()) / abar.sqrt()
    x_error, e_error = ((a - b).pow(2).mean((1, 2, 3)) for a, b in ((clean, latent), (noisy.tanh(), noise)))
    strong = ((1 - abar) / abar).flatten() > 5  # where the clean latent's error is cut
    assert strong.any() and not strong.all()
    torch.testing.assert_close(loss, torch.where(strong, 5 * e_error, x_error), rtol=1e-3, atol=1e-6)


def test_places_weigh_the_error():
    noisy, noise, places = draw((2, 4, 5, 3), "noisy"), draw((2, 4, 5, 3), "noise"), draw((5, 3), "places")
    weight = torch.tensor([2., 3.])
    got = diffusion.denoising_error(lambda x, t, c: x, torch.zeros(1, 2, 3), noisy, 5, noise, weight, places)
    expected = [w * ((x - e).square() * places).mean() for w, x, e in zip(weight, noisy, noise)]
    assert torch.allclose(got, torch.stack(expected), atol=1e-5)


def test_shares_of_a_batch_are_the_batch():
    """What several processes draw is what one would have drawn for all."""
    latent = draw((6, 4, 5, 3), "latent")
    whole = diffusion.noised(latent, torch.Generator().manual_seed(7))
    shares = [diffusion.noised(some, torch.Generator().manual_seed(7), (i, 3))
              for i, some in enumerate(latent.split(2))]
    for together, *each in zip(whole, *shares):
        assert torch.equal(torch.cat(each), together)
    assert len(set(whole[1].tolist())) == 6


def test_people_who_take_turns_in_a_batch_have_noise_of_their_own():
    latent = draw((6, 4, 5, 3), "latent")
    whole = diffusion.noised(latent, [generator("0"), generator("1")])
    for i in range(2):
        alone = diffusion.noised(latent[i::2], generator(str(i)))
        for together, own in zip(whole, alone):
            assert torch.equal(together[i::2], own)


def test_every_time_step_can_be_drawn_and_no_other(monkeypatch):
    model = Echo(lambda x: x)
    greatest = 1 - 2 ** -24
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, greatest))
    diffusion.denoising_loss(model, torch.zeros(4, 4, 2, 2), ["a"] * 4, torch.Generator())
    assert sorted(model.asked[0][1].tolist()) == [249, 500, 750, 999]  # rounded up from 499.99
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.zeros(shape))
    diffusion.denoising_loss(model, torch.zeros(4, 4, 2, 2), ["a"] * 4, torch.Generator())
    assert sorted(model.asked[1][1].tolist()) == [0, 250, 500, 750]


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_the_loss_is_computed_in_float32_and_its_draws_on_the_cpu(kept):
    latent = draw((4, 4, 3, 3), "half").to(kept)
    model = Echo(lambda x: x * .9)
    model.context = lambda prompts: torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    loss = diffusion.denoising_loss(model, latent, ["a"], torch.Generator().manual_seed(1))
    noisy = model.asked[0][0]
    t, noise = drawn(4, latent.shape, 1)
    abar = diffusion.ALPHAS_CUMPROD[t]
    error = ((noisy * .9).float() - noise.to(kept).float()).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(loss, error * ((1 - abar) / abar).clamp(max=5), rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32 and noisy.dtype == torch.bfloat16
    with torch.device("meta"):
        again = diffusion.denoising_loss(model, latent, ["a"], torch.Generator().manual_seed(1))
    assert again.device.type == "cpu" and torch.equal(again, loss)
