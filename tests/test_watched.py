"""training/watched.py: the losses of photos kept apart, by numbers, and what is written of them."""
import json

import torch
from PIL import Image
from tiny import Changed, deltas, generator, shared_model

import hdb
from diffusion import denoising_loss
from files import images
from files.layouts import HERE
from training.photos import Photos
from training.trainer import Trainer
from training.watched import WatchedPhotos


def people(model):
    """Three people's latents, and adapters of their own."""
    latents = torch.randn(3, 4, 8, 8, generator=generator(1))
    theta = torch.randn(3, *hdb.HyperDreamBooth(model).lidb.shape, generator=generator(2))
    return latents, hdb.HyperDreamBooth(model).lidb.adapters(theta)


def test_losses_are_of_ones_own_anothers_and_nobodys_weights_on_the_same_noise():
    model = shared_model()
    latents, adapters = people(model)
    found = WatchedPhotos(None, latents, hdb.PROMPT).losses(model, adapters)

    def written_out(whose):
        g, sums = generator(0), []
        for _ in range(4):
            state = g.get_state()
            for i, person in enumerate(whose):
                g.set_state(state)
                changed = Changed(model, {} if person is None else deltas(adapters, person))
                changed.context = lambda texts, c=changed: Changed.context(c, ["a sks face"] * len(texts))
                sums.append(denoising_loss(changed, latents, ["a face"] * 3, g)[i])
        return torch.stack(sums).mean().item()
    expected = {"own": written_out([0, 1, 2]), "another": written_out([2, 0, 1]),
                "nobody": written_out([None] * 3)}
    assert all(abs(found[name] - value) < 1e-4 * value for name, value in expected.items())
    assert found["gap"] == found["another"] - found["own"] and len(set(found.values())) == 4


def test_photos_kept_apart_are_watched_and_not_trained_on(tmp_path):
    model = hdb.load("nano", "cpu")
    vit = hdb.load_hypernet(HERE / "nano/hypernet.safetensors", model).vit
    for i in range(8):
        one = torch.rand(3, 80, 80, generator=generator(i)) * 2 - 1
        images.save(images.to_pil(one), tmp_path / f"faces/{i}.png")
    data = Photos(tmp_path / "faces", model, vit, hdb.PROMPT, tmp_path / "cache", apart=3)
    every = Photos(tmp_path / "faces", model, vit, hdb.PROMPT, tmp_path / "cache")
    assert every.watched is None and every.count == 16 and data.count == 12  # a quarter at most
    kept = torch.tensor([12, 14])
    assert torch.equal(data.watched.latents, every.read("latents", kept))
    assert torch.equal(data.watched.features, every.read("features", kept).float())


def test_what_is_watched_is_logged_and_drawn(tmp_path):
    model = shared_model()
    latents, adapters = people(model)
    trainer = Trainer({"a": torch.nn.Linear(2, 2)}, tmp_path, 5, .1)
    watched = WatchedPhotos(None, latents, hdb.PROMPT)
    watched.watch(model, [{}, adapters], trainer)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert {"own", "another", "nobody", "gap"} <= line.keys()
    assert Image.open(tmp_path / "step_000000.png").size == (3 * 64, 2 * 64)
