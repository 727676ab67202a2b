"""methods/perfusion.py by numbers, on a tiny model: against the paper's formulas, token by token."""
from types import SimpleNamespace

import pytest
import torch
from tiny import Stage, generator, photo, shared_model, untouched
from torch.func import functional_call

import hdb
from adapters import LowRank, adapted
from methods import perfusion
from methods.perfusion import (
    Gated,
    covariance,
    dual,
    adapters,
    encoding,
    learn,
    inverse,
    make,
    projections,
    shapes,
    super_category,
    together,
    at_sampling,
)
from methods.textual_inversion import LAYER, Rows
from diffusion import denoising_loss
from program.console import UserError
from methods import hyperdreambooth
from methods.table import METHODS
from files.person import Person, load_person, save_person

VOCAB = shared_model().tokenizer.vocab
SKS, FACE, ROCK = (VOCAB[f"{word}</w>"] for word in ("sks", "face", "rock"))
TEMPLATES = "a {}", "a star as a {}"
CAPTIONS = ["a face", "a rock star", "", "a face as a star", "a sks star", "face as a rock", "star", "a"]
WIDTH = 32


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """What the tiny model, with its seven words and twelve places, can be told."""
    monkeypatch.setattr(perfusion, "TEMPLATES", TEMPLATES)
    monkeypatch.setattr(perfusion, "captions", lambda model: CAPTIONS)


def some(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def some_covariance(seed=1):
    e = some(100, 8, seed=seed) * torch.arange(1, 9)
    return e.T @ e / 100


def written_out(weight, e, concepts, c_inverse, beta, tau):
    """h of one token e (d,) by the paper: Gram-Schmidt of U·i*_j, C⁻¹ = UᵀU, then the sum of gated terms."""
    u = torch.linalg.cholesky(c_inverse).T
    left, basis = u @ e, []
    for i, _ in concepts:
        b = u @ i
        for other in basis:
            b = b - other * (other @ b)
        basis.append(b / b.norm())
    for b in basis:
        left = left - b * (b @ left)
    h = weight @ torch.linalg.solve(u, left)
    for i, o in concepts:
        sim, square = e @ c_inverse @ i, i @ c_inverse @ i
        h = h + o / (1 + torch.exp(-(sim / square - beta) / tau))
    return h


def one(i, o, c_inverse, beta=.6, tau=.2):
    """The adapter of one concept i (d,), o (n,)."""
    return Gated(i[None, None], dual(i[None], c_inverse)[None], o[None, None], beta, tau)


def some_layer(d=8, n=5):
    layer = torch.nn.Linear(d, n, bias=False).requires_grad_(False)
    layer.weight.copy_(some(n, d, seed=9))
    return layer


def some_tensors(people=1, seed=0, word=SKS, model=None):
    """As if they were fitted, with values and directions of people who differ a lot."""
    model = model or shared_model()
    i = super_category(model) + some(people, WIDTH, seed=seed)
    found = {"token": torch.tensor([divmod(word, 256)] * people).float(), "input": i,
             "dual": dual(i, inverse(covariance(model, CAPTIONS))),
             "embedding": some(people, WIDTH, seed=seed + 1)}
    for n, (name, layer) in enumerate(projections(model, "v").items()):
        found[name] = some(people, layer.out_features, seed=seed + n + 2)
    return found


def predicted(model, adapters, prompts, seed=4):
    """The UNet's outputs for these prompts, under the adapters."""
    x = some(len(prompts), 4, 8, 8, seed=seed)
    with torch.no_grad(), model.adapted(adapters):
        return model.unet(x, 500, model.context(prompts))


# ------------------------------------------------------------------------------------------------------------
# The formula

@pytest.mark.parametrize(("beta", "tau"), [(.75, .1), (.2, .5), (-1., 2.)])
def test_a_layer_under_the_edit_is_the_formula(beta, tau):
    layer, e, c_inverse = some_layer(), some(2, 3, 8), inverse(some_covariance().double())
    i, o = some(8, seed=2), some(5, seed=3)
    e[0, 1] = i  # the concept's own token
    ours = one(i, o, c_inverse, beta, tau)(layer, e, layer(e))
    for h, token in zip(ours.flatten(0, 1), e.flatten(0, 1)):
        sim, square = token @ c_inverse @ i, i @ c_inverse @ i
        expected = layer.weight @ (token - i * sim / square) + o * torch.sigmoid((sim / square - beta) / tau)
        assert torch.allclose(h, expected, atol=1e-4)
        assert torch.allclose(h, written_out(layer.weight, token, [(i, o)], c_inverse, beta, tau), atol=1e-4)


def test_outside_the_concepts_direction_only_the_gates_tail_is_added():
    layer, c_inverse = some_layer(), inverse(some_covariance().double())
    i, o = some(8, seed=2), some(5, seed=3)
    e = some(2, 3, 8)
    e = e - (e @ dual(i[None], c_inverse).T) * i  # now eᵀC⁻¹i* = 0
    assert (e @ c_inverse @ i).abs().max() < 1e-5
    y = layer(e)
    tail = 1 / (1 + torch.tensor(.7 / .15).exp())
    assert torch.allclose(one(i, o, c_inverse, .7, .15)(layer, e, y), y + tail * o, atol=1e-5)
    assert torch.allclose(one(i, o, c_inverse, 1e6, .15)(layer, e, y), y, atol=1e-5)  # W·e, nothing else


@pytest.mark.parametrize("hook", [True, False])
def test_a_lora_outside_belongs_to_w(hook):
    """Whether it acts by a hook or in the weights, and each of two; one inside does not."""
    layer, gated, e = some_layer(), one(some(8), some(5, seed=1), some_covariance().inverse()), some(2, 6, 8)
    lora = LowRank(some(1, 8, 1, seed=2).requires_grad_(hook), some(1, 1, 5, seed=3))
    changed = torch.nn.Linear(8, 5, bias=False).requires_grad_(False)
    changed.weight.copy_(layer.weight + 2 * (lora.a[0] @ lora.b[0]).T)
    layers = {"x": layer}
    with adapted(layers, {"x": lora}), adapted(layers, {"x": lora}), adapted(layers, {"x": gated}):
        assert torch.allclose(layer(e), gated(changed, e, changed(e)), atol=1e-5)
    if hook:
        with adapted(layers, {"x": gated}), adapted(layers, {"x": lora}):
            expected = gated(layer, e, layer.forward(e)) + e @ lora.a[0] @ lora.b[0]
            assert torch.allclose(layer(e), expected, atol=1e-5)


def test_with_the_gate_shut_what_lies_along_the_concept_is_still_gone():
    layer, c_inverse = some_layer(), inverse(some_covariance().double())
    i, o, across = some(8, seed=2), some(5, seed=3), some(8, seed=4)
    across = across - i * (dual(i[None], c_inverse)[0] @ across)
    e = torch.stack([i, across, 2 * i + across])[None]
    y = layer(e)
    (own, other, mixed), = one(i, o, c_inverse, beta=1e6)(layer, e, y)
    assert torch.allclose(own, torch.zeros(5), atol=1e-5)
    assert torch.allclose(other, y[0, 1], atol=1e-5) and torch.allclose(mixed, y[0, 1], atol=1e-4)
    (own, other, mixed), = one(i, o, c_inverse, beta=-1e6)(layer, e, y)  # wide open: o* everywhere
    assert torch.allclose(own, o, atol=1e-5) and torch.allclose(other, y[0, 1] + o, atol=1e-5)
    (own, *_), = one(i, o, c_inverse, .7, .15)(layer, e, y)
    assert torch.allclose(own, o * torch.sigmoid(torch.tensor(.3 / .15)), atol=1e-5)


def test_beta_and_tau_open_and_sharpen_the_gate():
    layer, c_inverse = some_layer(), inverse(some_covariance().double())
    i, o = some(8, seed=2), some(5, seed=3)

    def share(beta, tau, s):
        """Of o* in the output for s times i*."""
        e = s * i[None, None]
        return (one(i, o, c_inverse, beta, tau)(layer, e, layer(e)) @ o / (o @ o)).item()
    assert share(.5, .15, 1) > share(.7, .15, 1) > share(.9, .15, 1) > .5 > share(1.1, .15, 1)
    assert share(.7, .05, 1) > share(.7, .15, 1) > share(.7, .5, 1) > .5  # above β
    assert share(.7, .05, .4) < share(.7, .15, .4) < share(.7, .5, .4) < .5  # and below
    assert share(.7, .15, 1) > share(.7, .15, .7) > share(.7, .15, 0) > share(.7, .15, -1)


def test_the_scale_of_c_cancels_and_i_is_its_duals_one():
    c, i = some_covariance().double(), some(2, 8)
    ours = dual(i, inverse(c))
    assert torch.allclose(ours, dual(i, inverse(c * 1000)), rtol=1e-4)
    assert torch.allclose((ours * i).sum(1), torch.ones(2), atol=1e-5)
    for k in range(2):
        there = torch.linalg.inv(c).float() @ i[k]
        assert torch.allclose(ours[k], there / (there @ i[k]), rtol=.02, atol=1e-4)
    assert not torch.allclose(ours, i / i.square().sum(1, keepdim=True), atol=.02)  # C does something


def test_people_side_by_side_have_their_own():
    layer, c_inverse = some_layer(), inverse(some_covariance().double())
    i, o, e = some(2, 8, seed=2), some(2, 5, seed=3), some(4, 3, 8)
    both = Gated(i[:, None], dual(i, c_inverse)[:, None], o[:, None], .6, .2)
    h = both(layer, e, layer(e))
    for sample in range(4):
        alone = one(i[sample % 2], o[sample % 2], c_inverse)
        assert torch.allclose(h[sample], alone(layer, e[[sample]], layer(e[[sample]]))[0], atol=1e-5)
    with pytest.raises(ValueError, match="cannot be shared"):
        both(layer, e[:3], layer(e[:3]))


# ------------------------------------------------------------------------------------------------------------
# Encodings

def test_the_covariance_is_the_mean_of_all_tokens_uncentred():
    model, many = shared_model(), CAPTIONS * 9  # more than one batch
    c = covariance(model, many + ["a face"])
    expected, count = torch.zeros(WIDTH, WIDTH), 0
    for caption in many + ["a face"]:
        for e in model.context([caption])[0]:
            expected, count = expected + torch.outer(e, e), count + 1
    assert count == 73 * 12 and torch.allclose(c.float(), expected / count, atol=1e-4)
    assert c.dtype == torch.float64 and not c.requires_grad


def test_a_singular_covariance_has_an_inverse():
    e = some(3, 8)
    c = (e.T @ e).double()
    ridge = perfusion.RIDGE * c.trace() / 8
    assert torch.allclose(inverse(c) @ (c + ridge * torch.eye(8)).float(), torch.eye(8), atol=.02)
    assert inverse(c).dtype == torch.float32 and inverse(c).isfinite().all()


def written_out_encoding(model, embedding, phrase, token):
    """Mean over templates of the encoding of `token`, whose row is `embedding`, at its place."""
    weight = "text_model.embeddings.token_embedding.weight"
    table = model.text.state_dict()[weight].clone()
    table[token] = embedding
    found = []
    for template in TEMPLATES:
        ids = model.tokenizer([template.format(phrase)])
        place = ids[0].tolist().index(token)
        found.append(functional_call(model.text, {weight: table}, (ids,))[0, place])
    return torch.stack(found).mean(0)


def test_encodings_are_those_of_the_word_at_its_places():
    model, rows = shared_model(), some(2, WIDTH)
    plain = model.layers[LAYER].weight[FACE]
    face = super_category(model)
    assert face.shape == (1, WIDTH) and not face.requires_grad
    assert torch.allclose(face[0], written_out_encoding(model, plain, "face", FACE), atol=1e-5)
    rows.requires_grad_()
    with model.adapted({LAYER: Rows(rows[:, None], SKS)}):
        ours = encoding(model, "sks face", SKS, 2)
    assert ours.shape == (2, WIDTH) and not ours.requires_grad  # no gradient through i*
    for person in range(2):
        expected = written_out_encoding(model, rows[person], "sks face", SKS)
        assert torch.allclose(ours[person], expected, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > .1


def test_captions_are_nanos_own_or_everyday_things(monkeypatch, nano):
    monkeypatch.undo()
    texts = perfusion.captions(nano)
    assert len(texts) == 1024 and texts == perfusion.captions(nano) and len(set(texts)) > 700
    assert "" in texts and any("astronaut" in text for text in texts)
    assert any("zwx" in text for text in texts) and not any("sks" in text for text in texts)
    everyday = perfusion.captions(shared_model())
    assert len(everyday) == len(set(everyday)) == 12 * 40 and not any("{" in text for text in everyday)
    assert sum("face" in text for text in everyday) == 12


# ------------------------------------------------------------------------------------------------------------
# Training

def written_out_fit(model, photos, steps, lr, embedding_lr, batch, seed, token=SKS, word="sks"):
    """The training of one person with every layer's formula put in by hand, and Adam."""
    g, latent = generator(seed), model.encode(photos).repeat(batch, 1, 1, 1)
    c_inverse = torch.linalg.inv(covariance(model, CAPTIONS) + perfusion.RIDGE * covariance(
        model, CAPTIONS).trace() / WIDTH * torch.eye(WIDTH)).float()
    start = model.layers[LAYER].weight[FACE].clone()
    face = written_out_encoding(model, start, "face", FACE)
    embedding, i = start.clone().requires_grad_(), face
    keys = {name: layer.weight @ face for name, layer in projections(model, "k").items()}
    values = {name: (layer.weight @ face).requires_grad_() for name, layer in projections(model, "v").items()}
    trained = [*values.values(), embedding]
    mean, square = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    losses = []

    def by_hand(o):
        def adapter(layer, e, y):
            sim, norm = e @ c_inverse @ i, i @ c_inverse @ i
            left = e - sim[..., None] * i / norm
            return left @ layer.weight.T + torch.sigmoid((sim / norm - .75) / .1)[..., None] * o
        return adapter
    for step in range(steps):
        i = .99 * i + .01 * written_out_encoding(model, embedding, f"{word} face", token).detach()
        replaced = {LAYER: lambda layer, x, y: torch.where((x == token)[..., None], embedding, y)}
        replaced |= {name: by_hand(o) for name, o in (keys | values).items()}
        with model.adapted(replaced):
            loss = denoising_loss(model, latent, [f"a {word} face"], g).mean()
            gradients = torch.autograd.grad(loss, trained)
        losses.append(loss.item())
        for p, m, v, gradient in zip(trained, mean, square, gradients):
            m.lerp_(gradient, 1 - .9)
            v.lerp_(gradient.square(), 1 - .99)
            rate = embedding_lr if p is embedding else lr
            p.data -= rate * (m / (1 - .9 ** (step + 1))) / ((v / (1 - .99 ** (step + 1))).sqrt() + 1e-8)
    return {"embedding": embedding, "input": i, "dual": c_inverse @ i / (i @ c_inverse @ i)} | values, losses


@pytest.mark.parametrize(("word", "token"), [("sks", SKS), ("rock", ROCK)])
def test_fitting_written_out(word, token):
    model, losses = shared_model(), []
    ours = learn(model, photo(), 3, .02, .004, 2, word, generator(8), lambda *said: losses.append(said))
    theirs, expected = written_out_fit(model, photo(), 3, .02, .004, 2, 8, token, word)
    assert [step for step, _ in losses] == [0, 1, 2]
    assert [loss for _, loss in losses] == pytest.approx(expected, rel=1e-3)
    start = learn(model, photo(), 0, identifier=word)
    assert ours.keys() == {"token", *theirs} and not any(t.requires_grad for t in ours.values())
    for name, t in theirs.items():
        moved = (t - start[name][0]).norm()
        assert moved > 0 and (ours[name][0] - t).norm() < .05 * moved, name
    digits = ours["token"][0].tolist()
    assert digits[0] * 256 + digits[1] == token and untouched(model)


def test_everybody_starts_as_a_face():
    model = shared_model()
    start, face = learn(model, photo(2), 0), super_category(model)
    assert torch.equal(start["embedding"], model.layers[LAYER].weight[[FACE, FACE]])
    assert torch.equal(start["input"], face.repeat(2, 1))
    for name, layer in projections(model, "v").items():
        assert torch.allclose(start[name], (face @ layer.weight.T).repeat(2, 1), atol=1e-5)
    assert all(t.dtype == torch.float32 and len(t) == 2 for t in start.values())


def test_the_concepts_encoding_is_a_slow_average():
    model = shared_model()
    after = [learn(model, photo(), steps, .02, .05, 2, generator=generator(1)) for steps in range(4)]
    for before, now in zip(after, after[1:]):
        seen = written_out_encoding(model, before["embedding"][0], "sks face", SKS)
        assert torch.allclose(now["input"][0], .99 * before["input"][0] + .01 * seen, atol=1e-6)
        assert torch.allclose((now["dual"] * now["input"]).sum(1), torch.ones(1), atol=1e-5)
    assert (after[1]["input"] - after[0]["input"]).abs().max() < 1e-5  # the word is still "face"
    assert (after[3]["input"] - after[1]["input"]).abs().max() > 1e-4


def test_each_rate_moves_its_own():
    model, start = shared_model(), learn(shared_model(), photo(), 0)
    for lr, word_lr in ((.02, 0.), (0., .02), (.03, .01)):
        ours = learn(model, photo(), 1, lr, word_lr, 1)
        for name in start.keys() - {"input", "dual", "token"}:
            moved = (ours[name] - start[name]).abs()
            assert moved.max().item() == pytest.approx(word_lr if name == "embedding" else lr, abs=1e-4)


def test_people_are_fitted_side_by_side_as_alone():
    model, two = shared_model(), photo(2)
    both, others = (learn(model, photos, 2, .02, .01, 2, generator=generator(3))
                    for photos in (two, two[[0, 0]]))

    def apart(person):
        return sum((both[name][person] - others[name][person]).square().sum() for name in both) ** .5
    assert apart(0) < .002 and apart(1) > 5 * apart(0)  # whoever the other is
    assert all(len(t) == 2 for t in both.values())


# ------------------------------------------------------------------------------------------------------------
# What is made of a person

def test_edits_are_of_every_cross_attention_at_sampling_settings():
    model, tensors = shared_model(), some_tensors(2)
    made = adapters(tensors, hdb.HyperDreamBooth(model))
    cross = {name for name in model.layers if "attn2.to_k" in name or "attn2.to_v" in name}
    assert made.keys() == {LAYER, *cross} and len(cross) > 4
    assert made[LAYER].token == SKS and torch.equal(made[LAYER].vectors, tensors["embedding"][:, None])
    for name in cross:
        assert (made[name].beta, made[name].tau) == (.7, .15)
        assert torch.equal(made[name].inputs[:, 0], tensors["input"])
        assert torch.equal(made[name].duals[:, 0], tensors["dual"])
    assert {type(adapter) for adapter in made.values()} == set(perfusion.METHOD.kinds(None))


def test_keys_are_locked_whatever_was_trained():
    model = shared_model()
    face = written_out_encoding(model, model.layers[LAYER].weight[FACE], "face", FACE)
    for seed in 0, 50:
        tensors = some_tensors(seed=seed)
        made = adapters(tensors, hdb.HyperDreamBooth(model))
        e = tensors["input"][None]
        for name, layer in projections(model, "k").items():
            locked = layer.weight @ face
            gate = torch.sigmoid(torch.tensor((1 - .7) / .15))
            assert torch.allclose(made[name](layer, e, layer(e))[0, 0], gate * locked, atol=1e-4)
            wide = made[name]._replace(beta=-1e6)
            assert torch.allclose(wide(layer, e, layer(e))[0, 0], locked, atol=1e-4)
        for name, layer in projections(model, "v").items():
            wide = made[name]._replace(beta=-1e6)
            assert torch.allclose(wide(layer, e, layer(e))[0, 0], tensors[name][0], atol=1e-4)


def test_pictures_of_people_side_by_side_are_each_ones():
    model, tensors = shared_model(), some_tensors(2)
    both = predicted(model, adapters(tensors, hdb.HyperDreamBooth(model)), ["a [V] face"] * 4)
    for person in range(2):
        own = {name: t[person:person + 1] for name, t in tensors.items()}
        alone = adapters(own, hdb.HyperDreamBooth(model))
        ours = predicted(model, alone, ["a [V] face"] * 4)[person::2]
        assert torch.allclose(both[person::2], ours, atol=1e-4)
    assert (predicted(model, {}, ["a [V] face"] * 4) - both).abs().max() > .01 and untouched(model)


def test_people_of_different_words_are_not_side_by_side():
    tensors = some_tensors(2)
    tensors["token"][1] += 1
    with pytest.raises(ValueError):
        adapters(tensors, hdb.HyperDreamBooth(shared_model()))


def test_a_file_holds_the_shapes_and_the_word(tmp_path):
    model = shared_model()
    method, tensors = hdb.HyperDreamBooth(model), some_tensors(word=ROCK)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes({}, hdb.HyperDreamBooth(model))
    person = Person(perfusion.METHOD, tensors, base="tiny", identifier="rock")
    save_person(person, method, tmp_path / "me.safetensors")
    again = load_person(tmp_path / "me.safetensors", method, METHODS)
    assert again.identifier == "rock" and again.adapters(method)[LAYER].token == ROCK  # in float16
    assert ROCK > 256
    for name, t in tensors.items():
        assert torch.allclose(again.tensors[name], t, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------
# β, τ and two people

def two_concepts(orthogonal):
    c_inverse, i, o = inverse(some_covariance().double()), some(2, 8, seed=2), some(2, 5, seed=3)
    if orthogonal:
        i[1] -= i[0] * (i[0] @ c_inverse @ i[1]) / (i[0] @ c_inverse @ i[0])
    return c_inverse, i, o


def test_two_people_that_are_orthogonal_add_up():
    layer, e = some_layer(), some(2, 3, 8)
    c_inverse, i, o = two_concepts(True)
    first, second = ({"layer": one(i[k], o[k], c_inverse)} for k in range(2))
    joined = together(first, second)["layer"]
    y = layer(e)
    expected = y + (first["layer"](layer, e, y) - y) + (second["layer"](layer, e, y) - y)
    assert torch.allclose(joined(layer, e, y), expected, atol=1e-4)


def test_two_people_are_gram_schmidt_of_their_directions():
    layer, e = some_layer(), some(2, 3, 8)
    c_inverse, i, o = two_concepts(False)
    e[0, :2] = i
    adapter = [{"layer": one(i[k], o[k], c_inverse)} for k in range(2)]
    ours = [together(*pair)["layer"](layer, e, layer(e)) for pair in (adapter, adapter[::-1])]
    assert torch.allclose(*ours, atol=1e-4)  # whoever comes first
    for h, token in zip(ours[0].flatten(0, 1), e.flatten(0, 1)):
        expected = written_out(layer.weight, token, [(i[0], o[0]), (i[1], o[1])], c_inverse, .6, .2)
        assert torch.allclose(h, expected, atol=1e-3)
    other = {"layer": adapter[1]["layer"]._replace(beta=.1, tau=.9)}
    assert together(adapter[0], other)["layer"][3:] == (.6, .2)  # the first's
    one_by_one = adapter[1]["layer"](layer, e, adapter[0]["layer"](layer, e, layer(e)))
    assert (ours[0] - one_by_one).abs().max() > .1  # which is more than the sum
    three = together(together(*adapter), {"layer": one(some(8, seed=5), some(5, seed=6), c_inverse)})["layer"]
    concepts = [(i[0], o[0]), (i[1], o[1]), (some(8, seed=5), some(5, seed=6))]
    expected = written_out(layer.weight, e[1, 2], concepts, c_inverse, .6, .2)
    assert torch.allclose(three(layer, e, layer(e))[1, 2], expected, atol=1e-3)


def test_two_people_in_a_model_have_a_word_each():
    model = shared_model()
    people = some_tensors(2), some_tensors(seed=30, word=ROCK)
    me, you = (adapters(tensors, hdb.HyperDreamBooth(model)) for tensors in people)
    joined = together(me, you)
    assert joined.keys() == me.keys()
    ids = torch.tensor([[SKS, ROCK, FACE]] * 2)
    with model.adapted({LAYER: joined[LAYER]}):
        rows = model.layers[LAYER](ids)
    assert torch.equal(rows[:, 0], me[LAYER].vectors[:, 0])
    assert torch.equal(rows[:, 1], you[LAYER].vectors[:, 0].expand(2, -1))
    assert torch.equal(rows[:, 2], model.layers[LAYER].weight[[FACE, FACE]])
    for name in projections(model, "v"):
        assert torch.equal(joined[name].outputs[:, 0], me[name].outputs[:, 0])
        assert torch.equal(joined[name].outputs[:, 1], you[name].outputs[:, 0].expand(2, -1))
        assert (joined[name].beta, joined[name].tau) == (.7, .15)
    pictures = predicted(model, joined, ["a [V] face", "a [V] face"])
    assert pictures.isfinite().all() and (pictures - predicted(model, me, ["a [V] face"] * 2)).abs().max() > 0


def args(**given):
    return SimpleNamespace(**{"beta": .7, "tau": .15, "beside": None, "identifier": "sks"} | given)


def test_the_knobs_turn_every_gate():
    model, method = shared_model(), hdb.HyperDreamBooth(shared_model())
    made = adapters(some_tensors(), hdb.HyperDreamBooth(model))
    assert at_sampling(made, args(), method) == made
    for given, expected in ((args(beta=.4), (.4, .15)), (args(tau=.3), (.7, .3)),
                            (args(beta=0., tau=1.), (0., 1.))):
        turned = at_sampling(made, given, method)
        assert turned.keys() == made.keys() and turned[LAYER] is made[LAYER]
        for name in made.keys() - {LAYER}:
            assert turned[name][3:] == expected and turned[name][:3] == made[name][:3]
    outputs = [predicted(model, at_sampling(made, args(beta=beta), method), ["a [V] face"])
               for beta in (.5, .9)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_the_second_person_comes_from_a_file(tmp_path):
    model, file = shared_model(), tmp_path / "you.safetensors"
    method = hdb.HyperDreamBooth(model)
    me, you = adapters(some_tensors(), hdb.HyperDreamBooth(model)), some_tensors(seed=30, word=ROCK)
    you = {name: t.half().float() for name, t in you.items()}
    save_person(Person(perfusion.METHOD, you, identifier="rock"), method, file)
    ours = at_sampling(me, args(beside=str(file), beta=.5), method)
    expected = together(me, adapters(you, hdb.HyperDreamBooth(model)))
    for name in projections(model, "k") | projections(model, "v"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name][:3], expected[name][:3]))
        assert ours[name][3:] == (.5, .15)
    words = torch.cat([some_tensors()["embedding"], you["embedding"]])
    assert torch.equal(ours[LAYER](None, torch.tensor([[SKS, ROCK]]), torch.zeros(1, *words.shape))[0], words)
    save_person(Person(perfusion.METHOD, some_tensors()), method, file)
    with pytest.raises(UserError, match="both people are called sks"):
        at_sampling(me, args(beside=str(file)), method)
    twin = some_tensors() | {"token": you["token"]}
    save_person(Person(perfusion.METHOD, twin, identifier="rock"), method, file)
    me = adapters({name: t.half().float() for name, t in some_tensors().items()}, hdb.HyperDreamBooth(model))
    with pytest.raises(UserError, match="its word cannot be told from sks"):
        at_sampling(me, args(beside=str(file)), method)
    save_person(hyperdreambooth.person(torch.zeros(1, *method.lidb.shape)), method, file)
    with pytest.raises(UserError, match="made by hyperdreambooth"):
        at_sampling(me, args(beside=str(file)), method)


# ------------------------------------------------------------------------------------------------------------
# The command line's part

def test_a_person_is_made_as_the_options_say():
    model, stage = shared_model(), Stage()
    said = SimpleNamespace(steps=2, lr=.02, embedding_lr=.01, batch=3, identifier="rock", seed=7,
                           model="tiny")
    person = make(hdb.HyperDreamBooth(model), photo()[:, None], [generator(said.seed)], said, stage)
    assert (person.method.name, person.base, person.identifier) == ("perfusion", "tiny", "rock")
    expected = learn(model, photo(), 2, .02, .01, 3, "rock", generator(7))
    assert all(torch.equal(person.tensors[name], t) for name, t in expected.items())
    assert stage.steps == len(stage.losses) == 2 and len(stage.said) == 1


def test_the_identifier_is_one_token():
    for word in "rocking", "sks face", "":
        with pytest.raises(UserError, match="one token"):
            learn(shared_model(), photo(), 1, identifier=word)
