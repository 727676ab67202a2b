"""methods/e4t.py and its pre-training by numbers, on a tiny model: against other weights, other words."""
import argparse
import copy
import itertools
import shutil
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from personal import altered, refused
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import (
    Changed, Stage, generator, photo, shared_model, some_latent, times_and_noise, tiny_hypernet, tiny_model,
    untouched)
from torch.func import functional_call

import diffusion
import hdb
from methods import e4t, train_e4t
from diffusion import denoising_loss
from files import encoders, images
from files.checkpoints import checksum
from program import console
from program.options import add
from files.layouts import HERE
from training.photos import Photos
from nano import people, seeds
from training.trainer import Trainer, global_seed
from unet import UNet, UNetConfig
from vit import encode_face

TABLE = "text_model.embeddings.token_embedding.weight"
VOCAB = shared_model().tokenizer.vocab
SKS, FACE = VOCAB["sks</w>"], VOCAB["face</w>"]
PEOPLE = ["a [V] face", "a [V] face as a rock star"]
FEATURES = 16 + 16 + 16 + 24  # of the tiny UNet: conv_in, a level, on its way to the next, that one


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """The paper's s and λ, which are not so near to 1 and 0 as nano's."""
    assert (e4t.STRENGTH, e4t.LAMBDA) == (1., 1e-4)
    monkeypatch.setattr(e4t, "STRENGTH", .1)
    monkeypatch.setattr(e4t, "LAMBDA", .01)


def tiny_domain(model=None, seed=0, size=.3):
    """One as pre-training might have made it: nothing in it is zero."""
    model = model or shared_model()
    with global_seed(seed):
        vit, domain = tiny_hypernet(1, 1).vit, e4t.Domain(e4t.EncoderConfig(photo=16, width=20), model)
        domain.vit = vit
        for p in (*domain.rows, *domain.columns):
            torch.nn.init.normal_(p, std=size)
        torch.nn.init.normal_(domain.encoder.word.weight)
    return domain.eval().requires_grad_(False)


def some_photos(people, seed=5):
    """Means of tokens."""
    return torch.randn(people, 16, generator=generator(seed))


# ------------------------------------------------------------------------------------------------------------
# The paper, written out

def look_of(unet, text, tokenizer, x, t):
    """u (1, features) of one sample: means over the pixels of whatever the way down keeps, caught where the
    way up takes it from."""
    kept = []
    names = ("conv_in", "down_blocks.0.attentions.0", "down_blocks.0.downsamplers.0.conv",
             "down_blocks.1.resnets.0")
    handles = [unet.get_submodule(name).register_forward_hook(lambda *of: kept.append(of[2].mean((2, 3))))
               for name in names]
    unet(x, torch.tensor([t]), text(tokenizer([""])))
    for handle in handles:
        handle.remove()
    return torch.cat(kept, 1)


def written_out_e(weights, tokens, u):
    """E (d,) of one photo's tokens (n, photo), with the weights of an Encoder, token by token."""
    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def leaky(x):
        return torch.where(x > 0, x, .01 * x)
    u = leaky(linear("second", leaky(linear("first", u))))
    mapped = [linear("both", torch.cat([token, u])) for token in tokens]
    return linear("word", leaky(torch.stack(mapped).mean(0)))


def written_out_context(model, e, prompt):
    """Text features (1, n, d) of a text encoder in whose table the identifier's row is another."""
    table = model.text.state_dict()[TABLE].clone()
    table[SKS] = e
    return functional_call(model.text, {TABLE: table}, (model.tokenizer([prompt.replace("[V]", "sks")]),))


def written_out_word(model, unet, weights, seen, x, t):
    """e of one sample: the class's word + .1·E."""
    u = look_of(unet, model.text, model.tokenizer, x, t)[0]
    return model.text.state_dict()[TABLE][FACE] + .1 * written_out_e(weights, seen[None], u)


def test_the_encoder_is_the_papers_formula():
    domain = tiny_domain()
    tokens = torch.randn(3, 5, 16, generator=generator(1))
    u = torch.randn(3, FEATURES, generator=generator(2))
    got, weights = domain.encoder(tokens.mean(1), u), domain.encoder.state_dict()
    for one, mine, its_u in zip(got, tokens, u):
        assert torch.allclose(one, written_out_e(weights, mine, its_u), atol=1e-5)
    assert got.shape == (3, 32) and got.std() > .1


def test_what_is_known_of_a_photo_is_the_mean_of_its_tokens():
    domain, photos = tiny_domain(), photo(2)
    assert torch.allclose(domain.look(photos), encode_face(domain.vit, photos).mean(1), atol=1e-6)
    domain.vit.bfloat16()
    assert domain.look(photos).dtype == torch.float32


@pytest.mark.parametrize("blocks, each", [((16, 24), 1), ((16, 24, 32), 2), ((16,), 3)])
def test_the_width_of_u(blocks, each):
    net = UNet(UNetConfig(block_out_channels=blocks, down_block_types=("DownBlock2D",) * len(blocks),
                          layers_per_block=each, cross_attention_dim=8, attention_head_dim=2,
                          norm_num_groups=8))
    skips, _ = net.down(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 2, 8))
    assert e4t.features(net.config) == sum(skip.shape[1] for skip in skips)


# ------------------------------------------------------------------------------------------------------------
# Offsets

def test_which_layers_have_offsets():
    names = e4t.attention(shared_model()).keys()
    transformers = {name.rpartition(".attn")[0] for name in names}
    assert names == {f"{block}.{attn}.{to}" for block in transformers for attn in ("attn1", "attn2")
                     for to in ("to_q", "to_k", "to_v")}
    every = [name for name in shared_model().layers if name.endswith("transformer_blocks.0")]
    assert transformers == set(every) and len(every) == 4


@torch.no_grad()
def test_offsets_are_weights_times_one_plus_delta():
    model, domain, x = shared_model(), tiny_domain(), some_latent(2)
    context, t = model.context(PEOPLE), torch.tensor([3, 700])
    deltas = {}
    for (name, layer), rows, columns in zip(e4t.attention(model).items(), domain.rows, domain.columns):
        delta = sum(torch.outer(rows[:, i], columns[:, i]) for i in range(3))
        deltas[name] = (layer.weight * (1 + delta) - layer.weight).T
    expected = Changed(model, deltas).unet(x, t, context)
    with model.adapted(e4t.offsets(model, domain.rows, domain.columns)):
        got = model.unet(x, t, context)
    assert torch.allclose(got, expected, atol=1e-4)
    assert (model.unet(x, t, context) - got).norm() > .05 * got.norm()


def test_one_layers_delta_is_the_papers():
    """A rank-one matrix, of which every column and then every row goes through a linear map."""
    layer = shared_model().layers["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    with global_seed(1):
        offset = train_e4t.Offset(layer)
        torch.nn.init.normal_(offset.along_columns.weight)
        torch.nn.init.normal_(offset.along_columns.bias)
    rows, columns = offset()
    matrix = torch.outer(offset.row(offset.vector), offset.column(offset.vector))
    matrix = offset.along_columns(offset.along_rows(matrix.T).T)
    assert (rows @ columns.T).shape == layer.weight.shape == (16, 32)
    assert torch.allclose(rows @ columns.T, matrix, atol=1e-5) and matrix.std() > .1


def test_offsets_at_delta_zero_leave_the_model_and_are_no_saddle():
    model, x = shared_model(), some_latent(1)
    context, t = model.context(PEOPLE[:1]), torch.tensor([500])
    with global_seed(0):
        deltas = [train_e4t.Offset(layer) for layer in e4t.attention(model).values()]
    factors = list(zip(*(delta() for delta in deltas)))
    fresh = e4t.Domain(e4t.EncoderConfig(), model)
    for rows, columns in (factors, (fresh.rows, fresh.columns)):
        with model.adapted(e4t.offsets(model, rows, columns)):
            got = model.unet(x, t, context)
        assert torch.equal(got, model.unet(x, t, context))
    with model.adapted(e4t.offsets(model, *factors)):
        model.unet(x, t, context).square().mean().backward()
    assert all(delta.along_columns.weight.grad.norm() > 0 for delta in deltas) and untouched(model)


# ------------------------------------------------------------------------------------------------------------
# The word

def said(model, seen, encoder, prompts, x, t, **more):
    """What the UNet is given as context under the adapters, and its output."""
    given, words = [], e4t.words(model, seen, encoder)
    with model.adapted(words | more):
        handle = model.unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
        y = model.unet(x, t, model.context(prompts))
        handle.remove()
    return given[0], y


@torch.no_grad()
def test_the_context_is_that_of_a_table_with_another_row():
    model, domain, x = shared_model(), tiny_domain(), some_latent(2)
    seen, t = some_photos(2), [3, 700]
    context, y = said(model, seen, domain.encoder, PEOPLE, x, torch.tensor(t))
    for i in range(2):
        e = written_out_word(model, model.unet, domain.encoder.state_dict(), seen[i], x[i:i + 1], t[i])
        expected = written_out_context(model, e, PEOPLE[i])
        assert torch.allclose(context[i:i + 1], expected, atol=1e-4)
        noise = model.unet(x[i:i + 1], torch.tensor(t[i:i + 1]), expected)
        assert torch.allclose(y[i:i + 1], noise, atol=1e-4)
        assert (model.context(PEOPLE[i:i + 1]) - expected).norm() > .05 * expected.norm()
    assert untouched(model)


@torch.no_grad()
def test_the_word_is_another_for_each_photo_latent_and_time():
    model, domain = shared_model(), tiny_domain()

    def context(seen=5, latent=0, t=3):
        return said(model, some_photos(1, seen), domain.encoder, PEOPLE[:1], some_latent(1, latent), t)[0]
    first = context()
    assert torch.equal(first, context())
    for other in (context(seen=6), context(latent=1), context(t=600)):
        assert (other - first).norm() > 1e-3 * first.norm()


@torch.no_grad()
def test_holes_are_where_v_stands_and_nowhere_else():
    model, domain, x = shared_model(), tiny_domain(), some_latent(4)
    prompts = ["", "a face", "a [V] face", "[V] as [V]"]
    with model.adapted(e4t.words(model, some_photos(1), domain.encoder)):
        words = model.context(prompts)
    ids = model.tokenizer([prompt.replace("[V]", "sks") for prompt in prompts])
    assert torch.equal(words.isnan().all(2), ids == SKS) and torch.equal(words.isnan().any(2), ids == SKS)
    assert torch.equal(words[ids != SKS], model.text.state_dict()[TABLE][ids[ids != SKS]])
    context, _ = said(model, some_photos(1), domain.encoder, prompts, x, torch.tensor([500]))
    assert torch.allclose(context[:2], model.context(prompts[:2]), atol=1e-5)
    e = written_out_word(model, model.unet, domain.encoder.state_dict(), some_photos(1)[0], x[3:], 500)
    assert torch.allclose(context[3:], written_out_context(model, e, prompts[3]), atol=1e-4)
    assert not torch.allclose(context[3:], model.context(prompts[3:]), atol=.01)


@torch.no_grad()
def test_guidance_and_a_sampler_meet_the_word_at_every_step():
    """sample(), [negatives, prompts] in one batch, as the sampler written out, a context for each step."""
    model, domain, seen = shared_model(), tiny_domain(), some_photos(2)
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator(i)) for i in (3, 4)])

    def denoise(x, t):
        outs = []
        for i in range(2):
            mine, at = x[i:i + 1], torch.tensor([t])
            e = written_out_word(model, model.unet, domain.encoder.state_dict(), seen[i], mine, t)
            away = model.unet(mine, at, model.context(["blurry"]))
            towards = model.unet(mine, at, written_out_context(model, e, PEOPLE[i]))
            outs.append(away + 3 * (towards - away))
        return torch.cat(outs)
    expected = model.decode(diffusion.dpmpp_2m(denoise, noise, 3)).clamp(-1, 1)
    with model.adapted(e4t.words(model, seen, domain.encoder)):
        got = model.sample(PEOPLE, [3, 4], steps=3, guidance=3., negative="blurry")
    assert (got - expected).norm() < .01 * expected.norm()
    assert (model.sample(PEOPLE, [3, 4], steps=3, negative="blurry") - got).norm() > .02 * got.norm()


@torch.no_grad()
def test_the_look_at_the_latent_is_through_the_edited_unet():
    model, domain, x = shared_model(), tiny_domain(), some_latent(1)
    changes = e4t.offsets(model, domain.rows, domain.columns)
    context, _ = said(model, some_photos(1), domain.encoder, PEOPLE[:1], x, torch.tensor([500]), **changes)
    twin = tiny_model()
    for name, change in changes.items():
        twin.layers[name].weight += change.tensors["weight"]
    e = written_out_word(model, twin.unet, domain.encoder.state_dict(), some_photos(1)[0], x, 500)
    plain = written_out_word(model, model.unet, domain.encoder.state_dict(), some_photos(1)[0], x, 500)
    assert torch.allclose(context, written_out_context(model, e, PEOPLE[0]), atol=1e-4)
    assert not torch.allclose(context, written_out_context(model, plain, PEOPLE[0]), atol=1e-4)


def test_v_and_its_class_have_to_be_tokens():
    model = copy.copy(shared_model())
    model.tokenizer = copy.copy(model.tokenizer)
    model.tokenizer.tokens = lambda text: ["s", "ks</w>"]
    with pytest.raises(ValueError, match='"sks" is not one token of tiny'):
        e4t.words(model, some_photos(1), tiny_domain().encoder)


# ------------------------------------------------------------------------------------------------------------
# The loss

def written_out_loss(model, unet, weights, seen, latent, prompts, g):
    """Denoising under each sample's word + .01·‖E‖². `unet`: whose look at z_t it is, and who denoises."""
    t, noise = times_and_noise(latent.shape, g)
    losses = []
    for i in range(len(latent)):
        abar = diffusion.ALPHAS_CUMPROD[t[i]]
        noisy = abar.sqrt() * latent[i:i + 1] + (1 - abar).sqrt() * noise[i:i + 1]
        u = look_of(unet, model.text, model.tokenizer, noisy, t[i].item())[0].detach()
        predicted = written_out_e(weights, seen[i, None], u)
        e = model.text.state_dict()[TABLE][FACE] + .1 * predicted
        error = unet(noisy, t[i:i + 1], written_out_context(model, e, prompts[i])) - noise[i:i + 1]
        losses.append(error.square().mean() * min((1 - abar) / abar, 5) + .01 * predicted.square().sum())
    return torch.stack(losses).mean()


def test_the_loss_and_its_gradient():
    model, domain, latent, seen = shared_model(), tiny_domain(), some_latent(2), some_photos(2)
    encoder = copy.deepcopy(domain.encoder).requires_grad_()
    inside = e4t.words(model, seen, encoder)
    with model.adapted(inside):
        denoising = denoising_loss(model, latent, PEOPLE, generator(3))
        loss, size = e4t.total(denoising, inside["unet."])
        loss.backward()
    weights = {name: p.clone().requires_grad_() for name, p in domain.encoder.state_dict().items()}
    expected = written_out_loss(model, model.unet, weights, seen, latent, PEOPLE, generator(3))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == pytest.approx(denoising.mean().item() + .01 * size.item(), rel=1e-5)
    assert size.item() > 1
    for name, p in encoder.named_parameters():
        assert (p.grad - weights[name].grad).norm() < 1e-3 * weights[name].grad.norm() + 1e-6, name
    assert untouched(model)


# ------------------------------------------------------------------------------------------------------------
# One person

def test_fine_tuning_written_out():
    """Two steps of Adam on all of a UNet that starts at W ⊙ (1 + Δ), and on the encoder."""
    model, domain, losses = shared_model(), tiny_domain(), []
    tensors = e4t.learn(model, photo(), domain, steps=2, lr=1e-3, batch=2, generator=generator(4),
                      callback=lambda step, loss: losses.append((step, loss)))
    twin, g = tiny_model(), generator(4)
    for layer, rows, columns in zip(e4t.attention(twin).values(), domain.rows, domain.columns):
        layer.weight *= 1 + rows @ columns.T
    start = {name: p.clone() for name, p in twin.unet.named_parameters()}
    twin.unet.requires_grad_()
    weights = {name: p.clone().requires_grad_() for name, p in domain.encoder.state_dict().items()}
    latent, seen = model.encode(photo()).repeat(2, 1, 1, 1), domain.look(photo()).expand(2, -1)
    parameters, expected = [*twin.unet.parameters(), *weights.values()], []
    optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=(.9, .99))
    for _ in range(2):
        loss = written_out_loss(model, twin.unet, weights, seen, latent, PEOPLE[:1] * 2, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert [step for step, _ in losses] == [0, 1]
    assert [loss for _, loss in losses] == pytest.approx(expected, rel=1e-3)

    def near(ours, theirs, moved):
        """The gradients of a few numbers are rounding, whose sign Adam makes a step of."""
        return (ours - theirs).norm() < .1 * moved.norm() + 1e-6
    ours = {name: p + tensors[f"unet.{name}"][0] for name, p in model.unet.named_parameters()}
    flat = [torch.cat([state[name].detach().flatten() for name in start]) for state in
            (ours, dict(twin.unet.named_parameters()), start)]
    assert near(flat[0], flat[1], flat[1] - flat[2]) and (flat[1] - flat[2]).norm() > .1
    for name, p in domain.encoder.named_parameters():
        mine, theirs = tensors[f"encoder.{name}"][0], weights[name].detach()
        assert near(mine, theirs, theirs - p) and (theirs - p).norm() > 0, name
    assert torch.equal(tensors["photo"], domain.look(photo())) and untouched(model)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in tensors.values())


def test_fifteen_steps_move_all_of_the_unet_and_the_encoder():
    model, domain, losses = shared_model(), tiny_domain(), []
    tensors = e4t.learn(model, photo(), domain, lr=1e-3, callback=lambda step, loss: losses.append(loss))
    still = e4t.learn(model, photo(), domain, 0)
    assert len(losses) == 15 and tensors.keys() == still.keys()
    for name, t in tensors.items():
        assert (name == "photo") == torch.equal(t, still[name]), name
    # without a step the UNet has its offsets, and the encoder is what it was
    at_first = {f"encoder.{name}": p for name, p in domain.encoder.named_parameters()}
    offsets = e4t.offsets(model, domain.rows, domain.columns)
    at_first |= {f"{name}.weight": change.tensors["weight"] for name, change in offsets.items()}
    for name, t in still.items():
        expected = at_first.get(name, torch.zeros(())) if name != "photo" else t
        assert torch.allclose(t[0], expected, atol=1e-6), name


@torch.no_grad()
def by_hand(model, tensors, prompts, x, t):
    """The UNet's output for one person's tensors, with their numbers in the weights themselves."""
    twin = tiny_model()
    for name, p in twin.unet.named_parameters():
        p += tensors[f"unet.{name}"][0]
    weights = {name: tensors[f"encoder.{name}"][0] for name in tiny_domain().encoder.state_dict()}
    outs = []
    for i, prompt in enumerate(prompts):
        e = written_out_word(model, twin.unet, weights, tensors["photo"][0], x[i:i + 1], t)
        outs.append(twin.unet(x[i:i + 1], torch.tensor([t]), written_out_context(model, e, prompt)))
    return torch.cat(outs)


@torch.no_grad()
def test_a_person_is_sampled_as_they_were_fitted():
    model, x = shared_model(), some_latent(2)
    tensors = e4t.learn(model, photo(), tiny_domain(), steps=2, lr=1e-2, batch=2)
    with model.adapted(e4t.adapters(tensors, hdb.HyperDreamBooth(model))):
        got = model.unet(x, torch.tensor([300]), model.context(PEOPLE))
    expected = by_hand(model, tensors, PEOPLE, x, 300)
    assert (got - expected).norm() < 1e-3 * expected.norm()
    plain = model.unet(x, torch.tensor([300]), model.context(PEOPLE))
    assert (plain - got).norm() > .1 * got.norm() and untouched(model)


def test_it_takes_one_person_at_a_time():
    with pytest.raises(ValueError, match="one person at a time"):
        e4t.learn(shared_model(), torch.cat([photo(seed=1), photo(seed=2)]), tiny_domain(), 1)


def test_shapes_are_those_of_one_person():
    model = shared_model()
    tensors = e4t.learn(model, photo(), tiny_domain(), 0)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    assert e4t.shapes(tensors, hdb.HyperDreamBooth(model)) == found
    for name in "photo", "encoder.second.bias":
        damaged = {key: t for key, t in tensors.items() if key != name}
        assert name in e4t.shapes(damaged, hdb.HyperDreamBooth(model))
        assert e4t.shapes(tensors | {name: torch.zeros(1, 7)}, hdb.HyperDreamBooth(model)) != found


# ------------------------------------------------------------------------------------------------------------
# The file

@pytest.fixture
def looker(monkeypatch):
    """A tiny ViT wherever one is looked for: by which name, and on which device."""
    asked, vit = [], tiny_hypernet(1, 1).vit
    vit.source, vit.checksum_of_file = "some/vit", checksum(vit)

    def load_vit(source, device):
        asked.append((source, str(device)))
        return copy.deepcopy(vit).to(device)
    for module in e4t, encoders:
        monkeypatch.setattr(module, "load_vit", load_vit)
    return asked


@pytest.fixture
def file(tmp_path, looker):
    e4t.save_domain(tiny_domain(), shared_model(), "some/vit", tmp_path / "e4t.safetensors")
    return tmp_path / "e4t.safetensors"


def test_what_was_pre_trained_comes_back_in_half_precision(file, looker):
    domain, back = tiny_domain(), e4t.load_domain(file, shared_model())
    assert looker == [("some/vit", "meta")] and back.config == domain.config
    back.vit = encoders.loaded(back.vit, "cpu")
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    stored = load_file(file)
    assert stored.keys() == {name for name in back.state_dict() if not name.startswith("vit.")}
    for name, t in domain.state_dict().items():
        assert torch.equal(back.state_dict()[name], t if name.startswith("vit.") else t.half().float()), name
        assert name not in stored or stored[name].dtype == torch.float16
    assert torch.allclose(back.look(photo()), domain.look(photo()))
    note = safe_open(file, "pt").metadata()
    assert note["model"] == "tiny" and shared_model().checksums.items() <= note.items()


BIAS = "encoder.word.bias"


@pytest.mark.parametrize("tensors, settings, note, words", [
    ({}, {}, {"config": None}, "not a file of methods/train_e4t.py"),
    ({}, {}, {"config": "{"}, "not a file of methods/train_e4t.py"),
    ({}, {}, {"config": "3"}, "not a file of methods/train_e4t.py"),
    ({}, {}, {"vit": None}, "not a file of methods/train_e4t.py"),
    ({}, {}, {"vit_checksum": None}, "not a file of methods/train_e4t.py"),
    ({}, {"width": "2"}, {}, "width cannot be '2'"),
    ({}, {"photo": -2}, {}, "photo cannot be -2"),
    ({}, {"width": 21}, {}, "expected"),
    ({BIAS: None}, {}, {}, f"no tensor for {BIAS}"),
    ({BIAS: torch.zeros(3)}, {}, {}, f"tensor {BIAS} has shape (3,), expected (32,)"),
    ({"rows.24": torch.zeros(3)}, {}, {}, "surplus tensor rows.24"),
    ({BIAS: torch.full((32,), torch.nan)}, {}, {}, "holds NaN or numbers too large"),
    ({}, {}, {"vit_checksum": "00000000"}, "another encoder of photos than some/vit is now"),
])
def test_a_file_that_does_not_fit_is_refused(file, tensors, settings, note, words):
    altered(file, tensors, settings, **note)
    refused(lambda: e4t.load_domain(file, shared_model()), str(file), words)


def test_another_models_weights_are_warned_of(file):
    other = tiny_model()
    other.name = "other"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e4t.load_domain(file, other)
    torch.nn.init.ones_(next(other.text.parameters()))
    with pytest.warns(UserWarning, match="trained for tiny, whose text weights differ from other's"):
        e4t.load_domain(file, other)


# ------------------------------------------------------------------------------------------------------------
# The command lines

def options(*arguments, model="tiny"):
    """What personalize.py knows of a command line when it calls make."""
    parser = argparse.ArgumentParser()
    parser.set_defaults(model=model)
    add(parser, e4t.options(model), model)
    return parser.parse_args(map(str, arguments))


def test_a_person_of_the_command_line(file):
    method, stage = hdb.HyperDreamBooth(shared_model()), Stage()
    args = options("--encoder", file, "--steps", 2, "--batch", 3)
    person = e4t.make(method, photo()[:, None], [generator(6)], args, stage)
    domain = e4t.load_domain(file, method.model)
    expected = e4t.learn(method.model, photo(), domain, 2, 1.6e-5, 3, generator(6))
    assert person.tensors.keys() == expected.keys() and len(stage.losses) == 2
    assert all(torch.equal(t, expected[name]) for name, t in person.tensors.items())
    assert (person.method.name, person.base) == ("e4t", "tiny") and len(stage.said) == 1
    made = e4t.adapters(person.tensors, method)
    assert {type(adapter) for adapter in made.values()} == set(e4t.METHOD.kinds(args))


def test_another_model_needs_an_encoder():
    with pytest.raises(console.UserError, match="no encoder for tiny: give --encoder a file of train_e4t.py"):
        e4t.make(hdb.HyperDreamBooth(shared_model()), photo()[:, None], [], options(), Stage())


# ------------------------------------------------------------------------------------------------------------
# Pre-training

@pytest.fixture
def train(tmp_path, monkeypatch, looker):
    """Runs train_e4t.py here on a tiny model and two photos: (loss, denoising, size) of its steps."""
    for name in "ab":
        images.save(images.to_pil(photo(seed=ord(name))[0]), tmp_path / "faces" / f"{name}.png")

    def run(*arguments, model="tiny"):
        steps, update = [], Trainer.update

        def record(trainer, loss, **numbers):
            update(trainer, loss, **numbers)
            steps.append((loss.item(), *(n.item() for n in numbers.values())))
        monkeypatch.setattr(Trainer, "update", record)
        monkeypatch.setattr(hdb, "load", lambda *_: tiny_model())
        common = ["--device", "cpu", "--out", tmp_path, "--batch", 2, "--model", model]
        common += ["--faces", tmp_path / "faces", "--encoder", "some/vit"] if model == "tiny" else []
        monkeypatch.setattr("sys.argv", ["train_e4t.py", *map(str, [*common, *arguments])])
        monkeypatch.setattr(train_e4t, "model_name", str)
        train_e4t.main(train_e4t.arguments())
        monkeypatch.setattr(Trainer, "update", update)
        return steps
    return run


def test_training_moves_the_encoder_and_the_offsets_alone(train, looker, tmp_path):
    steps = train("--steps", 2, "--dtype", "float16")
    assert looker == [("some/vit", "meta"), ("some/vit", "cpu")]  # read where the photos are encoded
    for loss, denoising, size in steps:
        assert loss == pytest.approx(denoising + e4t.LAMBDA * size, rel=1e-4) and size > 0
    state = load_file(tmp_path / "e4t/state.safetensors")
    kinds = {tuple(name.split(".")[:2]) for name in state if name.startswith("now.")}
    assert len(steps) == 2 and kinds == {("now", "encoder"), ("now", "offsets")}
    domain = e4t.load_domain(tmp_path / "e4t/e4t.safetensors", shared_model())
    with global_seed(0):
        start = e4t.Domain(e4t.EncoderConfig(16), shared_model())
    for name, p in domain.encoder.named_parameters():
        assert not torch.equal(p, start.encoder.get_parameter(name).half().float()), name
    for name, p in domain.encoder.named_parameters():
        assert torch.equal(p, state[f"ema.encoder.{name}"].half().float()), name
    for rows, columns in zip(domain.rows, domain.columns):
        assert (rows @ columns.T).abs().max() > 0
    # the photos' tokens, latents and one prompt, at the first step
    model, g = shared_model(), generator(seeds.seed(0, 0, seeds.HYPERNET))
    data = Photos(tmp_path / "faces", model, domain.vit, hdb.PROMPT, tmp_path / "cache")
    features, latent, prompts = data.samples(torch.randint(data.count, (2,), generator=g), g)
    weights = dict(start.encoder.named_parameters())
    expected = written_out_loss(model, model.unet, weights, features.mean(1), latent, prompts, g)
    assert prompts == [hdb.PROMPT] * 2
    assert steps[0][0] == pytest.approx(expected.item(), rel=1e-3)


def test_training_goes_on_where_it_was_stopped(train, tmp_path):
    whole = train("--steps", 2, "--name", "whole")
    with pytest.raises(console.Stopped, match="photos, 0 of 1 parts; the same command resumes it"):
        train("--steps", 2, "--minutes", 0, "--name", "parts")
    assert train("--steps", 2, "--name", "parts", "--save", tmp_path / "here.safetensors") == whole
    assert len(train("--steps", 3, "--name", "parts")) == 1
    before = (tmp_path / "here.safetensors").read_bytes()  # which what is not done doesn't replace
    train("--steps", 4, "--minutes", 0, "--name", "parts", "--save", tmp_path / "here.safetensors")
    assert (tmp_path / "here.safetensors").read_bytes() == before
    first, second = load_file(tmp_path / "whole/e4t.safetensors"), load_file(tmp_path / "here.safetensors")
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    # the same photos, wherever they are, and no others
    shutil.copytree(tmp_path / "faces", tmp_path / "moved")
    assert len(train("--steps", 4, "--name", "parts", "--faces", tmp_path / "moved")) == 1
    shutil.copy(tmp_path / "moved/a.png", tmp_path / "moved/b.png")
    with pytest.raises(console.UserError, match=r"made for others \(photos "):
        train("--steps", 5, "--name", "parts", "--faces", tmp_path / "moved")
    shutil.rmtree(tmp_path / "parts/photos")
    with pytest.raises(console.UserError, match="of another run .*faces"):
        train("--steps", 5, "--name", "parts", "--faces", tmp_path / "moved")


def test_nano_draws_its_people_and_watches_others(train, monkeypatch, tmp_path, looker):
    model, vit, made = shared_model(), tiny_hypernet(1, 1).vit, []
    likeness = itertools.cycle([torch.tensor([.1, .3]), torch.zeros(2)])  # with the people, and without

    class Judge:
        def likeness(self, pictures, photos):
            return next(likeness)

        def __call__(self, pictures):
            return None, None, {name: F.one_hot(torch.tensor([kind] * 2), 10) for name, kind in people.ASKED}

    class Watched(people.HeldOut):
        photos, identity, judge = photo(2), torch.rand(2, 27, generator=generator()), Judge()

        def __init__(self):
            pass

        def measure(self, model, adapters, style, noises, steps):
            made.append((style, list(noises), steps))
            with model.adapted(adapters):
                pictures = model.sample(PEOPLE, noises, steps=1)
            return pictures, torch.tensor([.25, .5]), torch.tensor([1., 0.])

    def drawn(*given, **more):
        made.append((given[1:], more))
        return Photos(tmp_path / "faces", model, vit, hdb.PROMPT, tmp_path / "cache")
    brings = SimpleNamespace(vit=vit)
    monkeypatch.setattr(e4t, "load_hypernet", lambda file, model: made.append(file) or brings)
    monkeypatch.setattr(people, "People", drawn)
    monkeypatch.setattr(people, "HeldOut", lambda *given: made.append(given) or Watched())
    train("--steps", 3, "--every", 2, model="nano")
    file, (given, more), watched, *measures = made
    assert file == HERE / "nano/hypernet.safetensors" and looker == []
    assert given == (vit, 0) and more == {"others": 0, "looks": 0}
    assert watched == (8, model.device, seeds.MONITOR)
    styles = "photo", "rock star", "pixar", "beach"
    assert measures == [(style, [0, 1], 12) for style in styles] * 2  # at steps 2 and 3
    lines = [json.loads(x) for x in (tmp_path / "e4t/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert Image.open(tmp_path / "e4t/step_000003.png").size == (20 * 64, 64)
    assert lines[0]["likeness rock star"] == .375 and lines[0]["both photo"] == .125
    assert lines[0]["leaked a face"] == pytest.approx(.2) and lines[0]["obeyed"] == 1
    assert safe_open(tmp_path / "e4t/e4t.safetensors", "pt").metadata()["vit"] == "nano/hypernet.safetensors"
