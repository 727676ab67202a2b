"""What a program can do wrong with the method is a ValueError."""
import pytest
import torch
from tiny import generator, shared_model, tiny_hypernet

import hdb
from adapters import fresh_lora
from methods import dreambooth, textual_inversion


def method():
    model = shared_model()
    return hdb.HyperDreamBooth(model, tiny_hypernet(*hdb.HyperDreamBooth(model).lidb.shape))


def photo(channels=3, dtype=torch.float32):
    side = 8 * shared_model().unet.config.sample_size
    return torch.zeros(1, channels, side, side, dtype=dtype)


WRONG = [photo(channels=1), photo(channels=4), photo(dtype=torch.uint8), photo()[0]]


@pytest.mark.parametrize("wrong", WRONG, ids=["grey", "alpha", "bytes", "no batch"])
def test_what_is_no_photo(wrong):
    for call in (method().predict, lambda x: method().fine_tune(x, steps=1),
                 lambda x: textual_inversion.learn(shared_model(), x, 1),
                 lambda x: dreambooth.learn(shared_model(), x, 1), shared_model().encode):
        with pytest.raises(ValueError, match=r"are \(B, 3, H, W\) in \[-1, 1\], not"):
            call(wrong)


@pytest.mark.parametrize("iterations", [0, -1])
def test_a_prediction_of_no_iterations(iterations):
    with pytest.raises(ValueError, match=f"{iterations} iterations predict nothing"):
        method().predict(photo(), iterations)


@pytest.mark.filterwarnings("error")
def test_a_training_of_nothing():
    for options, why in ({"batch": 0}, "batch of 0"), ({"rank": 0}, "LoRA of rank 0"), (
            {"rank": -1}, "LoRA of rank -1"):
        with pytest.raises(ValueError, match=why):
            method().fine_tune(photo(), steps=1, **options)
    with pytest.raises(ValueError, match="batch of 0"):
        textual_inversion.learn(shared_model(), photo(), 1, batch=0)
    with pytest.raises(ValueError, match="rank 0"):
        fresh_lora(method().layers, 0, generator(0))


def test_a_training_where_there_are_no_gradients():
    with torch.inference_mode(), pytest.raises(ValueError, match="inside torch.inference_mode"):
        method().fine_tune(photo(), steps=1)
    with torch.no_grad():  # as evaluations are
        assert method().fine_tune(photo(), steps=1)
