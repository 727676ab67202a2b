"""Stable Diffusion 1.x's noise schedule, the denoising loss, three samplers and classifier-free guidance.

A sampler is a pure function of a denoiser, denoise(x, t) -> the noise predicted in x at the time step t, an
int. It keeps its state in fp32. If it needs noise, it draws it from `generator`, a CPU torch.Generator or a
list of B (those that made x, or others; a new one of the same seed would draw x again). After each step it
calls callback(i, t, x, x0): the step's number, from 0, its time, the new latent, and the clean latent
predicted. The numbers are diffusers', step for step."""
import math

import torch

STEPS = 1000
# ᾱ_t, the picture's share of the variance at step t; "scaled linear" β: evenly spaced square roots.
# diffusers' operations in diffusers' order give the same fp32 numbers.
BETAS = torch.linspace(.00085 ** .5, .012 ** .5, STEPS, dtype=torch.float32, device="cpu") ** 2
ALPHAS_CUMPROD = torch.cumprod(1. - BETAS, dim=0)


def add_noise(x, noise, t):
    """A sample of q(x_t | x_0) for x (B, ...) at steps t (B,): DDPM (Ho et al., arXiv 2006.11239) eq. 4."""
    abar = ALPHAS_CUMPROD.to(x.device)[t.to(x.device)].view(-1, *[1] * (x.dim() - 1))
    return (abar.sqrt() * x + (1 - abar).sqrt() * noise).to(x.dtype)


def seeded_noise(shape, source):
    """Standard normal noise of this shape (B, ...), fp32, on the CPU: a seed gives the same for every device.

    source: a list of B seeds or CPU torch.Generators, one for each image, which then does not depend on its
    batch; or a single torch.Generator. ValueError for a list of another length."""
    if isinstance(source, torch.Generator):
        return torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")
    each = generators(source)
    if len(each) != shape[0]:
        raise ValueError(f"{len(each)} seeds for a batch of {shape[0]}")
    return torch.stack([torch.randn(shape[1:], generator=g, dtype=torch.float32, device="cpu") for g in each])


def generators(seeds):
    """A CPU torch.Generator for each seed; generators among the seeds stay as they are."""
    return [g if isinstance(g, torch.Generator) else torch.Generator().manual_seed(g) for g in seeds]


def denoising_loss(model, latent, prompts, generator):
    """‖D(x + ε, c) − x‖² of HyperDreamBooth's Eq. 2, per sample (B,), with the model's present adapters.

    latent x (B, 4, h, w); prompts c: B, or P if P people take turns in the batch; generator: a CPU generator
    for time steps and noise, or a list of P."""
    return denoising_error(model.unet, model.context(prompts), *noised(latent, generator))


def noised(latent, generator, part=(0, 1)):
    """The noisy latent x_t of x₀ (B, 4, h, w), time steps t (B,), the noise ε, and the weight (B,) of each
    sample's error, on latent's device. generator: a CPU generator, or a list of P for P people who take turns
    in the batch (sample i is person i mod P): each person's noise is then independent of the others.

    t is stratified, one in each of B equal parts of the schedule, in random order: this makes a batch's mean
    less noisy. part (i, n): these B samples are part i of a batch of n·B, with the noise of that batch.
    ValueError for an empty batch, whose mean error would be NaN."""
    if not len(latent):
        raise ValueError("a batch of 0 has no loss")
    if isinstance(generator, list):
        people = latent.unflatten(0, (-1, len(generator))).transpose(0, 1)
        each = [noised(own, one) for own, one in zip(people, generator)]
        return tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*each))
    index, parts = part
    count, own = len(latent) * parts, slice(index * len(latent), (index + 1) * len(latent))
    with torch.device("cpu"):
        spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        t = (spread * STEPS).long().clamp(max=STEPS - 1)[torch.randperm(count, generator=generator)][own]
        noise = torch.randn(count, *latent.shape[1:], generator=generator)[own].to(latent)
    snr = ALPHAS_CUMPROD[t] / (1 - ALPHAS_CUMPROD[t])
    weight = (1 / snr).clamp(max=5).to(latent.device)
    return add_noise(latent, noise, t), t.to(latent.device), noise, weight


def denoising_error(unet, context, noisy, t, noise, weight, places=1.):
    """The squared error (B,) of the clean latent that the UNet's prediction ε̂ implies, in float32.

    noisy, t, noise, weight: from noised(). context: text features (n, m, d) of n people who take turns in the
    batch; the UNet computes in its dtype. x̂₀ = (x_t − √(1−ᾱ) ε̂)/√ᾱ, so ‖x̂₀ − x₀‖² = ‖ε̂ − ε‖²/SNR; 1/SNR
    is clipped at 5, so that almost pure noise does not dominate. places: weights (h, w) of the latent's
    pixels, 1 on average."""
    predicted = unet(noisy.to(context.dtype), t, context.repeat(len(noisy) // len(context), 1, 1))
    return weight * (places * (predicted.float() - noise.float()).pow(2)).mean((1, 2, 3))


def timesteps(steps, spacing="leading"):
    """The time steps that a sampler visits, from noisy to clean, as a list of ints.

    They are diffusers' with SD 1.5's scheduler file: "leading" for DDIM, multiples of ⌊1000 / steps⌋ plus 1
    (the file's steps_offset); "linspace" for DPM-Solver++, from 999 evenly down, without 0. ValueError for
    another spacing, or steps outside 1 to 999."""
    if not 1 <= steps < STEPS:
        raise ValueError(f"steps must be from 1 to {STEPS - 1}, not {steps}")
    if spacing == "leading":
        return [i * (STEPS // steps) + 1 for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * ((STEPS - 1) / steps)) for i in range(steps, 0, -1)]
    raise ValueError(f'spacing must be "leading" or "linspace", not {spacing!r}')


@torch.no_grad()
def ddim(denoise, x, steps=50, eta=0., generator=None, callback=None):
    """DDIM (Song et al., arXiv 2010.02502), eq. 12, from the noise x (B, 4, h, w): deterministic at eta 0,
    with DDPM's variance at eta 1. generator: needed if eta > 0 (ValueError)."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta}")
    if eta > 0:
        require_generators(generator)
    x = x.float()
    for i, t in enumerate(timesteps(steps)):
        abar = ALPHAS_CUMPROD[t].item()
        # ᾱ_0, not 1, at the end: set_alpha_to_one is false
        abar_next = ALPHAS_CUMPROD[max(t - STEPS // steps, 0)].item()
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))  # eq. 16
        epsilon = denoise(x, t).float()
        x0 = (x - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)  # eq. 9
        x = math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next - sigma ** 2) * epsilon
        if eta > 0:
            x = x + sigma * seeded_noise(x.shape, generator).to(x.device)
        if callback:
            callback(i, t, x, x0)
    return x


@torch.no_grad()
def dpmpp_2m(denoise, x, steps=25, generator=None, callback=None):
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095), Algorithm 2, from the noise x (B, 4, h, w).

    The first step has no predecessor, and the last ends at an infinite λ: both are of first order."""
    x = x.float()
    times = timesteps(steps, "linspace")
    abars = [ALPHAS_CUMPROD[t].item() for t in times] + [1.]
    alphas, sigmas = [math.sqrt(a) for a in abars], [math.sqrt(1 - a) for a in abars]
    lambdas = [math.log(a / s) if s else math.inf for a, s in zip(alphas, sigmas)]
    x0_before = None
    for i, t in enumerate(times):
        x0 = (x - sigmas[i] * denoise(x, t).float()) / alphas[i]
        h = lambdas[i + 1] - lambdas[i]
        d = x0
        if 0 < i < steps - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * d
        x0_before = x0
        if callback:
            callback(i, t, x, x0)
    return x


def require_generators(generator):
    """ValueError unless this is a torch.Generator or a list of them."""
    given = generator if isinstance(generator, (list, tuple)) else [generator]
    if not all(isinstance(g, torch.Generator) for g in given):
        raise ValueError("this sampler draws noise at each step: give generator=, a CPU torch.Generator or a "
                         "list with one for each image")


LCM_STEPS = 50         # time steps of the solver that consistency models are distilled from
LCM_DATA = .5          # σ_data of the boundary scalings
LCM_TIME_SCALE = 10.   # their factor of t


@torch.no_grad()
def lcm(denoise, x, steps=4, generator=None, callback=None):
    """Latent consistency sampling (Luo et al., arXiv 2310.04378, Algorithm 3) from the noise x (B, 4, h, w),
    for a distilled UNet or an LCM-LoRA (2311.05556), in 1 to 8 steps, 50 at most, at guidance 1.

    The consistency function is f(x, t) = c_skip·x + c_out·x̂₀ with c_skip = σ²/(s² + σ²) and
    c_out = s/√(s² + σ²) for s = 10·t and σ = .5: f(x, 0) = x. All steps but the last add fresh noise to f."""
    require_generators(generator)
    x, times = x.float(), lcm_timesteps(steps)
    for i, t in enumerate(times):
        abar, scaled = ALPHAS_CUMPROD[t].item(), LCM_TIME_SCALE * t
        c_skip = LCM_DATA ** 2 / (scaled ** 2 + LCM_DATA ** 2)
        c_out = scaled / math.sqrt(scaled ** 2 + LCM_DATA ** 2)
        x0 = (x - math.sqrt(1 - abar) * denoise(x, t).float()) / math.sqrt(abar)
        x = c_out * x0 + c_skip * x
        if i + 1 < steps:
            abar = ALPHAS_CUMPROD[times[i + 1]].item()
            noise = seeded_noise(x.shape, generator).to(x.device)
            x = math.sqrt(abar) * x + math.sqrt(1 - abar) * noise
        if callback:
            callback(i, t, x, x0)
    return x


def lcm_timesteps(steps):
    """The time steps that lcm() visits, from 999 down: `steps` of the LCM_STEPS 19, 39, …, 999, as evenly
    spaced as possible. ValueError for more."""
    if not 1 <= steps <= LCM_STEPS:
        raise ValueError(f"steps must be from 1 to {LCM_STEPS}, not {steps}")
    every = STEPS // LCM_STEPS
    return [STEPS - 1 - every * math.floor(i * (LCM_STEPS / steps)) for i in range(steps)]


SAMPLERS = {"dpmpp_2m": dpmpp_2m, "ddim": ddim, "lcm": lcm}


def guided(unet, context, negative=None, scale=7.5):
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6), as a denoiser.

    context (B, n, d) or (1, n, d): features of the prompts; negative, the same: of what to avoid, or of "".
    Each step calls unet(x, t, context) once, in the dtype of context, on a batch of 2B: all B negatives, then
    all B prompts. At scale 1 the negative is not needed (else ValueError without it), and the batch is B."""
    if scale != 1 and negative is None:
        raise ValueError("guidance needs a negative: the features of the empty prompt will do")

    def denoise(x, t):
        x = x.to(context.dtype)
        prompts = context.expand(len(x), -1, -1)
        if scale == 1:
            return unet(x, t, prompts).float()
        negatives = negative.to(context).expand(len(x), -1, -1)
        away, to = unet(torch.cat([x, x]), t, torch.cat([negatives, prompts])).float().chunk(2)
        return away + scale * (to - away)

    return denoise


def guided_to_person(person, base, context, negative, nobody, scale=7.5, person_scale=1.5):
    """Guidance with separate weights for the text and the person, as a denoiser:

        ε = base(∅) + w_person·(person(∅) − base(∅)) + w_text·(person(c) − person(∅))

    base is the model itself, person the model with a person's adapters, ∅ the negative prompt, c the prompt;
    w_text is `scale`. The first difference leads to the person, the second to what the prompt says of them.
    At w_person 1 base(∅) cancels out, and guided() remains.

    Each step calls person(x, t, context) on a batch of 2B, all B negatives, then all B prompts, and base on
    B: 1.5 times the cost of guided(). context and negative, (B, n, d) or (1, n, d), are text features of the
    person's model; nobody is the base's for the negative."""
    def denoise(x, t):
        x = x.to(context.dtype)
        unprompted, prompted, nobodys = (features.to(context).expand(len(x), -1, -1)
                                         for features in (negative, context, nobody))
        both = person(torch.cat([x, x]), t, torch.cat([unprompted, prompted]))
        person_empty, person_prompt = both.float().chunk(2)
        base_empty = base(x, t, nobodys).float()
        to_person, to_prompt = person_empty - base_empty, person_prompt - person_empty
        return base_empty + person_scale * to_person + scale * to_prompt

    return denoise
