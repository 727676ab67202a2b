"""On a CUDA device: half precision against the fp32 CPU reference, and the whole path at full size.   python -m pytest -m gpu"""
import pytest
import torch
from rule import draw, fill

import clip
import hdb
import unet
import vae
from hypernet import DINO_S, HyperConfig, HyperNetwork, NANO_VIT, ViT
from person import Person

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALVES = [torch.bfloat16, torch.float16]


def relative(ours, reference):
    return ((ours.float().cpu() - reference).norm() / reference.norm()).item()


def small_models():
    ids = torch.randint(clip.NANO.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    return {"unet": (unet.UNet(unet.NANO), (draw((2, 4, 16, 16), 1), torch.tensor([10, 900]), draw((2, 24, 128), 2))),
            "text": (clip.TextTransformer(clip.NANO), (ids,)),
            "vae.encode": (vae.VAE(vae.NANO), (draw((2, 3, 128, 128), 3).clamp(-1, 1),)),
            "vae.decode": (vae.VAE(vae.NANO), (draw((2, 4, 16, 16), 4),)),
            "vit": (ViT(DINO_S), (draw((2, 3, 224, 224), 5).clamp(-1, 1),))}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("part", small_models())
def test_half_precision_against_the_cpu(part, dtype):
    module, inputs = small_models()[part]
    fill(module)
    call = {"vae.encode": lambda m, x: m.encode(x)[0], "vae.decode": lambda m, z: m.decode(z)}.get(part, lambda m, *a: m(*a))
    with torch.no_grad():
        reference = call(module, *inputs)
        on_gpu = [x.cuda() if x.dtype == torch.long else x.cuda().to(dtype) for x in inputs]
        assert relative(call(module.cuda().to(dtype), *on_gpu), reference) <= 1e-2


def full_size(dtype):
    """A randomly filled SD 1.5 on the GPU with a learnt toy vocabulary."""
    words = clip.learn_bpe(["a", "face", "as", "rock", "star", hdb.IDENTIFIER])
    with torch.device("cuda"):
        torch.manual_seed(0)
        parts = unet.UNet(unet.SD15), clip.TextTransformer(clip.SD15), vae.VAE(vae.SD15)
    for part in parts:
        part.to(dtype)
    return hdb.StableDiffusion("random", parts[0], parts[1], clip.Tokenizer(*words), parts[2])


def test_the_whole_path_at_full_size_fits_in_8_gb():
    torch.cuda.empty_cache()
    model = full_size(torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    method = hdb.HyperDreamBooth(model)
    assert method.lidb.shape == (192, 150)
    method.hypernet = HyperNetwork(HyperConfig(*method.lidb.shape, vit=NANO_VIT)).cuda().eval().requires_grad_(False)
    model.unet.gradient_checkpointing = True
    photo = draw((1, 3, 512, 512), 6).clamp(-1, 1).cuda()
    theta = method.predict(photo)
    losses = []
    relaxed = method.fine_tune(photo, theta, steps=3, batch=4, callback=lambda step, loss: losses.append(loss))
    pictures = method.sample(["[V] face as a rock star"], Person(theta, relaxed).factors(method.lidb), [0], steps=3)
    assert pictures.shape == (1, 3, 512, 512) and pictures.isfinite().all() and all(x == x for x in losses)
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"peak memory {peak:.2f} GB")
    assert peak < 8


def test_a_seed_means_the_same_on_both_devices():
    module = fill(unet.UNet(unet.NANO))
    model = hdb.StableDiffusion("nano", module, fill(clip.TextTransformer(clip.NANO)), clip.Tokenizer(*clip.learn_bpe(["a", "face"])[:2], 24),
                                fill(vae.VAE(vae.NANO)))
    method = hdb.HyperDreamBooth(model)
    pictures = []
    for device in ("cpu", "cuda"):
        for part in (model.unet, model.text, model.vae):
            part.to(device)
        pictures.append(method.sample(["a face"], seeds=[3], steps=4).cpu())
    assert (pictures[0] - pictures[1]).abs().max() < .05
