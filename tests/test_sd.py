"""Stable Diffusion by its parts: pictures to latents and back, texts to features."""
import pytest
import torch
from rule import draw, generator
from small import MERGES, VOCAB, parts, write_folder

import clip
import sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("small") / "model")


def test_encode_decode_context(folder):
    model, ours = sd.load(folder, device="cpu"), parts()
    image, latent = draw((2, 3, 16, 24), "image"), draw((2, 4, 2, 3), "latent")
    mean, logvar = (x.detach() for x in ours["vae"].encode(image))
    assert torch.equal(model.encode(image), model.vae.encode(image)[0] * .18215)
    # the same weights elsewhere in memory may differ in the last bit
    torch.testing.assert_close(model.encode(image), mean * .18215)
    noise = torch.randn(mean.shape, generator=generator("noise"))
    noisy = (mean + logvar.mul(.5).exp() * noise) * .18215
    torch.testing.assert_close(model.encode(image, generator("noise")), noisy)
    assert torch.equal(model.decode(latent), model.vae.decode(latent / .18215))
    torch.testing.assert_close(model.decode(latent), ours["vae"].decode(latent / .18215))
    texts = ["a face", "a rock star"]
    ids, context = clip.Tokenizer(VOCAB, MERGES, 24)(texts), model.context(texts)
    assert torch.equal(context, model.text(ids))
    torch.testing.assert_close(context, ours["text_encoder"](ids))
    torch.testing.assert_close(model.unet(latent, 7, context), ours["unet"](latent, 7, context))
    with pytest.warns(UserWarning, match="cut"):
        assert model.context(["star " * 30]).shape == (1, 24, 32)


def test_half(folder):
    model = sd.load(folder, device="cpu", dtype=torch.bfloat16)
    latent = model.encode(draw((1, 3, 16, 16), "image"), generator("noise"))  # inputs are converted
    image = model.decode(latent)
    assert image.dtype == model.context(["a"]).dtype == torch.bfloat16
