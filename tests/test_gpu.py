"""On a CUDA device: half precision against the fp32 CPU reference, and the whole path at full size.

python -m pytest -m gpu
"""
import pytest
import torch
from rule import draw, fill
from programs import ROOT, run
from torch.nn.functional import interpolate

import clip
import diffusion
import hdb
from evaluation.bench import full_size
from files import images
from methods import hyperdreambooth
from hypernet import HyperConfig, HyperNetwork
from vit import DINO_S, NANO_VIT, ViT

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALVES = [torch.bfloat16, torch.float16]


def relative(ours, reference):
    return ((ours.float().cpu() - reference).norm() / reference.norm()).item()


def parts():
    """A call, a module and its inputs: what is shipped, doing what it is made for, as random weights amplify
    rounding in the UNet and the autoencoder more than trained ones do. The official encoders of photos are
    not here, so theirs are random."""
    model = hdb.load("nano", "cpu", torch.float32)
    deep = {"num_hidden_layers": 2, "num_attention_heads": 4}
    tower = fill(clip.CLIP(clip.TextConfig(vocab_size=300, hidden_size=64, intermediate_size=128, **deep),
                           clip.VisionConfig(hidden_size=96, intermediate_size=192, **deep)))
    photo = images.read(ROOT / "nano/example.png", 128)
    ids, latent = model.tokenizer(["a face as a rock star", ""]), model.encode(photo)
    t = torch.tensor([100, 900])
    noisy = diffusion.add_noise(latent.expand(2, -1, -1, -1), draw((2, 4, 16, 16), 1), t)

    def forward(module, *inputs):
        return module(*inputs)
    return {"unet": (forward, model.unet, noisy, t, model.text(ids)),
            "text": (forward, model.text, ids),
            "vae.encode": (lambda m, x: m.encode(x)[0], model.vae, photo),
            "vae.decode": (lambda m, z: m.decode(z), model.vae, latent),
            "vit": (forward, fill(ViT(DINO_S)), interpolate(photo, (224, 224), mode="bicubic")),
            "clip image": (lambda m, x: m.image_features(x), tower, clip.preprocess(photo))}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("part", ["unet", "text", "vae.encode", "vae.decode", "vit", "clip image"])
@torch.no_grad()
def test_half_precision_against_the_cpu(part, dtype):
    call, module, *inputs = parts()[part]
    reference, on_gpu, module = call(module, *inputs), [x.cuda() for x in inputs], module.cuda()
    if part == "vit":  # its weights are always loaded in float32
        with torch.autocast("cuda", dtype):
            result = call(module, *on_gpu)
    else:
        result = call(module.to(dtype), *(x if x.dtype == torch.long else x.to(dtype) for x in on_gpu))
    assert relative(result, reference) <= 1e-2


def test_the_whole_path_at_full_size_fits_in_8_gb():
    torch.cuda.empty_cache()
    model = full_size("cuda", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    method = hdb.HyperDreamBooth(model)
    assert method.lidb.shape == (192, 150)
    config = HyperConfig(*method.lidb.shape, vit=NANO_VIT)
    method.hypernet = HyperNetwork(config).cuda().eval().requires_grad_(False)
    model.unet.gradient_checkpointing = True  # as on most GPUs
    photo = draw((1, 3, 512, 512), 6).clamp(-1, 1).cuda()
    theta = method.predict(photo)
    losses = []
    lora = method.fine_tune(photo, theta, steps=3, batch=4,
                               callback=lambda step, loss: losses.append(loss))
    factors = hyperdreambooth.person(theta, lora).adapters(method)
    pictures = method.sample(["[V] face as a rock star"], factors, [0], steps=3)
    assert pictures.shape == (1, 3, 512, 512) and pictures.isfinite().all() and all(x == x for x in losses)
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"peak memory {peak:.2f} GB")
    assert peak < 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_main_job(tmp_path, dtype):
    done = run("nano/example.png", "[V] face as a rock star", "--seed", 5, "--dtype", dtype,
               "--out", tmp_path, device="cuda")
    assert done.returncode == 0 and "on cuda" in done.stdout, done.stderr
    likeness = [float(line.split()[1]) for line in done.stdout.splitlines()
                if line.strip().startswith("likeness")]
    assert len(likeness) == 2 and min(likeness) > .5


def test_training_and_going_on(runs):
    for steps in 1, 2:
        done = run("--out", runs, "--batch", 4, "--every", 1000, "--steps", steps,
                   "--start", ROOT / "nano/hypernet.safetensors", device="cuda", script="train.py")
        assert done.returncode == 0, done.stderr


def test_a_seed_means_the_same_on_both_devices():
    pictures = []
    for device in ("cpu", "cuda"):
        method = hdb.HyperDreamBooth(hdb.load("nano", device, torch.float32))
        pictures.append(method.sample(["a face as a rock star"], seeds=[3]).cpu())
    assert (pictures[0] - pictures[1]).abs().mean() < .01


def test_a_recorded_step_does_what_the_step_does():
    photo, people = images.read(ROOT / "nano/example.png", 128), 2
    results = []
    for device in ("cpu", "cuda"):
        method = hdb.HyperDreamBooth(hdb.load("nano", device, torch.float32))
        theta, losses = torch.zeros(people, *method.lidb.shape, device=device), []
        lora = method.fine_tune(photo.to(device).expand(people, -1, -1, -1), theta, steps=8,
                                   callback=lambda step, loss, losses=losses: losses.append(loss))
        results.append((torch.tensor(losses), torch.cat([b.flatten() for _, b in lora.values()]).cpu()))
    (expected, weights), (losses, found) = results
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=0)
    assert torch.cosine_similarity(found, weights, dim=0) > .99
