"""Stable Diffusion by its parts: pictures to latents and back, texts to features."""
import pytest
import torch
from rule import draw
from small import MERGES, VOCAB, parts, write_folder
from tiny import tiny_model

import clip
import diffusion
import sd
from files.checkpoints import checksum


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("small") / "model")


def test_encode_decode_context(folder):
    model, ours = sd.load(folder, device="cpu"), parts()
    image, latent = draw((2, 3, 16, 24), "image"), draw((2, 4, 2, 3), "latent")
    mean = ours["vae"].encode(image)[0].detach()
    assert torch.equal(model.encode(image), model.vae.encode(image)[0] * .18215)
    # the same weights elsewhere in memory may differ in the last bit
    torch.testing.assert_close(model.encode(image), mean * .18215)
    assert torch.equal(model.decode(latent), model.vae.decode(latent / .18215))
    torch.testing.assert_close(model.decode(latent), ours["vae"].decode(latent / .18215))
    texts = ["a face", "a rock star"]
    ids, context = clip.Tokenizer(VOCAB, MERGES, 24)(texts), model.context(texts)
    assert torch.equal(context, model.text(ids))
    torch.testing.assert_close(context, ours["text_encoder"](ids))
    torch.testing.assert_close(model.unet(latent, 7, context), ours["unet"](latent, 7, context))
    with pytest.warns(UserWarning, match="cut"):
        assert model.context(["star " * 30]).shape == (1, 24, 32)


def test_a_model_knows_what_it_is(folder):
    model = sd.load(folder, device="cpu")
    assert model.name == str(folder)
    assert model.checksums == {part: checksum(getattr(model, part)) for part in ("unet", "text", "vae")}


def test_the_parts_are_frozen_and_in_eval_mode():
    unet, text, vae = (torch.nn.Linear(2, 2) for _ in range(3))
    sd.StableDiffusion("some", unet, text, None, vae)
    for part in unet, text, vae:
        assert not part.training and not part.weight.requires_grad


def test_everything_goes_where_the_model_is():
    model = tiny_model("meta")
    image, latent, ids = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 8, 8), []
    model.text.register_forward_pre_hook(lambda text, inputs: ids.append(*inputs))
    for found in (model.encode(image), model.decode(latent), model.context(["a"]),
                  model.sample(["a"], steps=1), *ids):
        assert found.device == model.device == torch.device("meta")


def test_half(folder):
    model = sd.load(folder, device="cpu", dtype=torch.bfloat16)
    latent = model.encode(draw((1, 3, 16, 16), "image"))  # inputs are converted
    image = model.decode(latent.float())
    assert model.sample(["a"], steps=1, size=(16, 16)).dtype == torch.float32
    assert latent.dtype == image.dtype == model.context(["a"]).dtype == torch.bfloat16


@pytest.mark.parametrize("image", [torch.zeros(3, 16, 16), torch.zeros(1, 4, 16, 16),
                                   torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 17)])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match="pictures are|divisible by 8"):
        tiny_model().encode(image)


def test_a_sampler_that_adds_noise_takes_each_pictures_own():
    model = tiny_model()
    both = model.sample(["a", "a"], [0, 1], steps=2, sampler=diffusion.lcm, guidance=1.)
    second = model.sample(["a"], [1], steps=2, sampler=diffusion.lcm, guidance=1.)
    assert torch.allclose(both[1:], second, atol=1e-5)


@pytest.mark.parametrize("dtype, warned", [(torch.float16, 1), (torch.bfloat16, 0)])
def test_a_dtype_that_is_slow_on_a_cpu_is_warned_of(recwarn, dtype, warned):
    sd.load("nano", "cpu", dtype)
    assert sum("float16 is many times slower" in str(w.message) for w in recwarn) == warned
