"""methods/textual_inversion.py by numbers, on a tiny model: against text encoders with other rows."""
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from personal import refused
from tiny import Stage, generator, photo, shared_model, times_and_noise, tiny_model, untouched
from torch.func import functional_call

import clip
import diffusion
import hdb
from methods import textual_inversion
from methods.textual_inversion import (
    LAYER,
    Rows,
    adapters,
    learn,
    load_embedding,
    make,
    save_embedding,
    shapes,
)
from program.console import UserError
from sd import StableDiffusion

WEIGHT = "text_model.embeddings.token_embedding.weight"
VOCAB = shared_model().tokenizer.vocab
SKS, FACE = VOCAB["sks</w>"], VOCAB["face</w>"]
WIDTH = 32


def some_vectors(people=1, tokens=1, seed=5):
    return torch.randn(people, tokens, WIDTH, generator=generator(seed))


def written_out_features(model, vectors, ids):
    """Text features of ids (n,) by an encoder with a word more for each of one person's vectors (N, d)."""
    table = torch.cat([model.text.state_dict()[WEIGHT], vectors])
    said, words = 0, []
    for token in ids.tolist():
        words.append(len(table) - len(vectors) + said % len(vectors) if token == SKS else token)
        said += token == SKS
    return functional_call(model.text, {WEIGHT: table}, (torch.tensor([words]),))[0]


# ------------------------------------------------------------------------------------------------------------
# The adapter

def test_features_are_those_of_an_encoder_with_another_row():
    model, vectors = shared_model(), some_vectors()
    weight = model.text.state_dict()[WEIGHT].clone()
    weight[SKS] = vectors[0, 0]
    ids = model.tokenizer(["a sks face", "sks as sks rock", "a face as a star"])
    expected = functional_call(model.text, {WEIGHT: weight}, (ids,))
    with model.adapted({LAYER: Rows(vectors, SKS)}):
        got = model.text(ids)
    assert torch.allclose(got, expected, atol=1e-5)
    plain = model.text(ids)
    assert torch.equal(got[2], plain[2]) and not torch.allclose(got[:2], plain[:2], atol=.1)


def test_three_vectors_are_three_words_in_their_order():
    model, vectors = shared_model(), some_vectors(tokens=3)
    # said three times, apart, too often, too seldom
    prompts = ["a sks sks sks face", "sks a sks face sks", "sks sks sks sks sks", "a sks face"]
    ids = model.tokenizer(prompts)
    with model.adapted({LAYER: Rows(vectors, SKS)}):
        got = model.text(ids)
    for features, row in zip(got, ids):
        assert torch.allclose(features, written_out_features(model, vectors[0], row), atol=1e-5)
    turned = written_out_features(model, vectors[0].roll(1, 0), ids[0])
    assert not torch.allclose(got[0], turned, atol=.1)


def test_other_words_keep_their_embedding():
    model = shared_model()
    ids = model.tokenizer(["a sks sks rock star sks", "blurry"])
    before, vectors = model.layers[LAYER](ids), some_vectors(tokens=2)
    with model.adapted({LAYER: Rows(vectors, SKS)}):
        after = model.layers[LAYER](ids)
    assert torch.equal(after[ids != SKS], before[ids != SKS])
    assert torch.equal(after[ids == SKS], vectors[0, [0, 1, 0]])


@pytest.mark.parametrize("tokens", [1, 2])
def test_people_take_turns_in_a_batch(tokens):
    model, vectors = shared_model(), some_vectors(3, tokens)
    prompts = ["a sks sks face", "sks", "a sks face as a sks", "sks a sks", "a face", "rock sks sks"]
    ids = model.tokenizer(prompts)
    with model.adapted({LAYER: Rows(vectors, SKS)}):
        together = model.text(ids)
        with pytest.raises(ValueError, match="4 cannot be shared among 3 people"):
            model.text(ids[:4])
    for i, row in enumerate(ids):
        assert torch.allclose(together[i], written_out_features(model, vectors[i % 3], row), atol=1e-5)


def test_vectors_are_as_precise_as_the_model():
    ids, y = torch.tensor([[1, SKS]]), torch.zeros(1, 2, WIDTH, dtype=torch.bfloat16)
    out = Rows(some_vectors(), SKS)(None, ids, y)
    assert out.dtype == torch.bfloat16 and torch.equal(out[0, 1], some_vectors()[0, 0].bfloat16())


def test_edits_are_of_the_identifiers_row():
    vectors = some_vectors(2, 3)
    ((layer, adapter),) = adapters({"vectors": vectors}, hdb.HyperDreamBooth(shared_model())).items()
    assert layer == LAYER and adapter.token == SKS and adapter.vectors is vectors
    model, prompts = shared_model(), [hdb.PROMPT, hdb.PROMPT]
    with model.adapted(adapters({"vectors": vectors}, hdb.HyperDreamBooth(model))):
        one, other = model.context(prompts)
    assert not torch.allclose(one, other, atol=.1) and untouched(model)


# ------------------------------------------------------------------------------------------------------------
# The training

def written_out_start(model, tokens, g):
    """N vectors (N, d) at "face", all but the first beside it."""
    word = model.text.state_dict()[WEIGHT][FACE]
    beside = [word + .1 * word.std() * torch.randn(1, WIDTH, generator=g)[0] for _ in range(tokens - 1)]
    return torch.stack([word, *beside])


def written_out_training(model, photos, steps, lr, batch, tokens, seed, prompt=None):
    """Adam on each person's own vectors, each from their own forward, by an encoder with rows more."""
    g, people = generator(seed), len(photos)
    start = written_out_start(model, tokens, g)
    vectors = [start.clone().requires_grad_() for _ in range(people)]
    latent, losses = model.encode(photos), []
    (ids,) = model.tokenizer([prompt or f"a {'sks ' * tokens}face"])
    mean, square = ([torch.zeros_like(start) for _ in range(people)] for _ in range(2))
    for step in range(1, steps + 1):
        count = batch * people
        t, noise = times_and_noise((count, *latent.shape[1:]), g)
        loss = 0.
        for i in range(count):
            who, abar = i % people, diffusion.ALPHAS_CUMPROD[t[i]]
            noisy = abar.sqrt() * latent[who] + (1 - abar).sqrt() * noise[i]
            context = written_out_features(model, vectors[who], ids)
            error = (model.unet(noisy[None], t[i:i + 1], context[None])[0] - noise[i]).square().mean()
            loss = loss + error * min((1 - abar) / abar, 5) / count
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, vectors)
        for p, m, v, gradient in zip(vectors, mean, square, gradients):
            m.lerp_(gradient, 1 - .9)
            v.lerp_(gradient.square(), 1 - .99)
            p.data -= lr * m / (1 - .9 ** step) / ((v / (1 - .99 ** step)).sqrt() + 1e-8)
    return torch.stack(vectors).detach(), losses


@pytest.mark.parametrize("people, batch, tokens", [(1, 3, 1), (1, 2, 3), (2, 1, 2)])
def test_training_written_out(people, batch, tokens):
    model, losses = shared_model(), []
    photos, start = photo(people), written_out_start(shared_model(), tokens, generator(8))
    ours = learn(model, photos, 3, .02, batch, tokens, generator(8),
               callback=lambda step, loss: losses.append((step, loss)))
    theirs, expected = written_out_training(model, photos, 3, .02, batch, tokens, 8)
    assert ours.keys() == {"vectors"} and ours["vectors"].shape == (people, tokens, WIDTH)
    assert [step for step, _ in losses] == [0, 1, 2]
    assert [loss for _, loss in losses] == pytest.approx(expected, rel=1e-4)
    assert (ours["vectors"] - theirs).norm() < .02 * (theirs - start).norm()
    assert not ours["vectors"].requires_grad and ours["vectors"].dtype == torch.float32 and untouched(model)


def test_the_reference_is_one_that_sees_the_vectors_and_the_prompt():
    """What the comparison above would miss if losses did not depend on them."""
    model = shared_model()
    run = [written_out_training(model, photo(), 2, lr, 2, 2, 8, prompt)[1]
           for lr, prompt in ((.02, None), (0., None), (.02, "a sks face"))]
    assert run[0][0] == run[1][0] and abs(run[0][1] / run[1][1] - 1) > 1e-3
    assert abs(run[0][0] / run[2][0] - 1) > 1e-3


def test_everybody_starts_at_a_face():
    model = shared_model()
    face = model.text.state_dict()[WEIGHT][FACE]
    assert torch.equal(learn(model, photo(2), 0)["vectors"], face.expand(2, 1, WIDTH))
    one, other = learn(model, photo(2), 0, tokens=4, generator=generator(3))["vectors"]
    assert torch.equal(one, other) and torch.equal(one[0], face)
    assert torch.allclose(one, written_out_start(model, 4, generator(3)))
    apart = (one[1:] - face).norm(dim=1) / face.norm()
    assert (apart > .01).all() and (apart < .3).all()
    assert not torch.equal(learn(model, photo(), 0, tokens=4, generator=generator(4))["vectors"][0], one)


def test_arguments_are_heard():
    model, losses = shared_model(), []

    def run(**more):
        given = {"steps": 2, "lr": .01, "batch": 2, "generator": generator(1)} | more
        return learn(model, photo(), **given)["vectors"]
    base = run()
    for other in ({"steps": 3}, {"lr": .02}, {"batch": 3}, {"generator": generator(2)}):
        assert (run(**other) - base).abs().max() > 1e-4
    assert torch.equal(run(), base) and run(tokens=2).shape == (1, 2, WIDTH)
    assert torch.equal(run(generator=None), run(generator=generator(0)))
    assert (learn(model, photo(seed=2), 2, .01, 2, 1, generator(1))["vectors"] - base).abs().max() > 1e-4
    run(steps=3, callback=lambda step, loss: losses.append(loss))
    assert len(losses) == 3 and min(losses) > 0


def test_only_the_vectors_are_trained():
    model, state, given = tiny_model(), torch.get_rng_state(), photo().requires_grad_()
    learn(model, given, 2, .01, 2, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert given.grad is None and untouched(model)


def test_people_trained_side_by_side_do_not_mix():
    model = shared_model()
    # the second person is another, the first one's result the same
    photos = (torch.cat([photo(), photo(seed=seed)]) for seed in (2, 3))
    (a, b), (c, d) = (learn(model, both, 3, .02, 2, 2, generator(1))["vectors"] for both in photos)
    start = written_out_start(model, 2, generator(1))
    assert (a - c).norm() < .01 * (a - start).norm() and (b - d).norm() > .1 * (b - start).norm()


def test_a_rate_of_nothing_is_no_training_and_a_good_one_fits_the_photo():
    model = shared_model()

    def run(lr):
        losses = []
        vectors = learn(model, photo(), 20, lr, callback=lambda step, loss: losses.append(loss))["vectors"]
        return sum(losses[-5:]), torch.equal(vectors[0, 0], model.text.state_dict()[WEIGHT][FACE])
    (still, same), (trained, moved) = run(0.), run(.1)  # under the same noises
    assert same and not moved and trained < .97 * still


def test_what_is_fitted_is_where_the_model_is(monkeypatch):
    # its optimiser knows no meta tensors
    monkeypatch.setattr(textual_inversion, "fit_or_take_back", lambda *_, **__: None)
    model = tiny_model("meta")
    assert learn(model, photo(2), 1, tokens=2)["vectors"].device == model.device


@pytest.mark.parametrize("words", [["a", "face", "as"], ["a", "sks"]])
def test_the_words_have_to_be_one_token_each(words):
    ours = shared_model()
    tokenizer = clip.Tokenizer(*clip.learn_bpe(words), 12)
    other = StableDiffusion("other", ours.unet, ours.text, tokenizer, ours.vae)
    missing = "sks" if "face" in words else "face"
    with pytest.raises(UserError, match=f'"{missing}" is not one token of other'):
        learn(other, photo(), 0)
    if missing == "sks":
        with pytest.raises(ValueError, match="not one token"):
            adapters({"vectors": some_vectors()}, hdb.HyperDreamBooth(other))


def test_so_many_vectors_as_the_prompt_has_room_for():
    model = shared_model()
    for tokens in 0, -1, 9:
        with pytest.raises(ValueError, match=f"{tokens} vectors: tiny's prompts have room for 1 to 8"):
            learn(model, photo(), 1, tokens=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is cut
        vectors = learn(model, photo(), 1, .01, tokens=8)["vectors"]
    start = written_out_start(model, 8, generator(0))
    assert ((vectors[0] - start).norm(dim=1) > 0).all()


# ------------------------------------------------------------------------------------------------------------
# What the command lines ask for

def test_shapes_of_a_person():
    engine = hdb.HyperDreamBooth(shared_model())
    for tokens in 1, 3, 10:
        assert shapes({"vectors": some_vectors(1, tokens)}, engine) == {"vectors": (1, tokens, WIDTH)}
    assert shapes({"vectors": some_vectors(2, 3)}, engine) == {"vectors": (1, 3, WIDTH)}
    assert shapes({"vectors": torch.zeros(1, 11, 7)}, engine) == {"vectors": (1, 10, WIDTH)}
    for shape in (3, 4), (), (1, 0, WIDTH), (1, 2, 3, WIDTH):
        assert shapes({"vectors": torch.zeros(shape)}, engine) == {"vectors": (1, 1, WIDTH)}
    assert shapes({}, engine) == {"vectors": (1, 1, WIDTH)}


def test_a_person_is_made_as_the_options_say():
    model, stage = shared_model(), Stage()
    args = SimpleNamespace(steps=2, lr=.02, batch=3, tokens=2, seed=6, model="somewhere")
    person = make(hdb.HyperDreamBooth(model), photo()[:, None], [generator(args.seed)], args, stage)
    about = person.method.name, person.base, person.identifier
    assert about == ("textual_inversion", "somewhere", "sks sks")
    expected = learn(model, photo(), 2, .02, 3, 2, generator(6))["vectors"]
    assert torch.equal(person.tensors["vectors"], expected)
    assert stage.steps == len(stage.losses) == 2 and len(stage.said) == 1
    # the identifier is what was trained with
    ids = model.tokenizer([clip.with_identifier(hdb.PROMPT, person.identifier)])[0]
    with model.adapted(adapters(person.tensors, hdb.HyperDreamBooth(model))):
        context = model.context([clip.with_identifier(hdb.PROMPT, person.identifier)])[0]
    assert torch.allclose(context, written_out_features(model, person.tensors["vectors"][0], ids), atol=1e-5)
    assert (ids == SKS).sum() == 2


# ------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("tokens", [1, 3])
def test_an_embedding_comes_back_bit_for_bit(tmp_path, tokens):
    path, tensors = tmp_path / "embedding.safetensors", {"vectors": some_vectors(1, tokens)}
    save_embedding(tensors, path)
    stored = load_file(path)
    assert stored.keys() == {"<sks>"} and stored["<sks>"].dtype == torch.float32
    assert torch.equal(stored["<sks>"], tensors["vectors"][0])
    back = load_embedding(str(path), shared_model())
    assert back.tensors.keys() == {"vectors"} and torch.equal(back.tensors["vectors"], tensors["vectors"])
    about = back.method.name, back.base, back.identifier
    assert about == ("textual_inversion", "tiny", " ".join(["sks"] * tokens))
    save_embedding({"vectors": tensors["vectors"].double()}, str(path))
    assert load_file(path)["<sks>"].dtype == torch.float32


@pytest.mark.parametrize("name, shape, dtype", [
    ("emb_params", (1, WIDTH), torch.float16), ("emb_params", (10, WIDTH), torch.float32),
    ("<cat-toy>", (WIDTH,), torch.float32), ("*", (2, WIDTH), torch.bfloat16)])
def test_embeddings_of_others(tmp_path, name, shape, dtype):
    path, embedding = tmp_path / "cat.safetensors", torch.randn(shape, generator=generator()).to(dtype)
    save_file({name: embedding}, path)
    vectors = load_embedding(path, shared_model()).tensors["vectors"]
    assert vectors.dtype == torch.float32 and torch.equal(vectors, embedding.float().reshape(1, -1, WIDTH))
    engine = hdb.HyperDreamBooth(shared_model())
    assert shapes({"vectors": vectors}, engine)["vectors"] == vectors.shape


@pytest.mark.parametrize("tensors, words", [
    ({"a": torch.zeros(2, 768)}, ["width 768", "tiny's has width 32"]),
    ({"a": torch.zeros(768)}, ["width 768", "tiny's has width 32"]),
    ({"a": torch.zeros(WIDTH, 0)}, ["width 0"]),
    ({"a\nb": torch.full((1, WIDTH), torch.nan)}, ["NaN"]),
    ({"a": torch.full((1, WIDTH), 1e300, dtype=torch.float64)}, ["infinite"]),
    ({"a": torch.zeros(1, WIDTH, dtype=torch.int64)}, ["torch.int64", "NaN or integer"]),
    ({"a": torch.zeros(1, WIDTH, dtype=torch.bool)}, ["torch.bool", "NaN or integer"]),
    ({"a": torch.zeros(11, WIDTH)}, ["11 vectors", "1 to 10"]),
    ({"a": torch.zeros(0, WIDTH)}, ["0 vectors"]),
    ({"a": torch.zeros(())}, ["shape ()"]),
    ({"a": torch.zeros(1, 1, WIDTH)}, ["shape (1, 1, 32)"]),
    ({"clip_l": torch.zeros(1, WIDTH), "clip_g": torch.zeros(1, 40)}, ["SDXL", "clip_g", "clip_l"]),
    ({"a": torch.zeros(1, WIDTH), "b": torch.zeros(1, WIDTH)}, ["2 tensors (a, b); give a LoRA with --lora"]),
    ({"a.weight": torch.zeros(1, WIDTH), "b": torch.zeros(1, WIDTH)}, ["2 tensors (a.weight, b)"]),
    ({}, ["0 tensors"])])
def test_what_is_no_embedding_for_this_model_is_refused(tmp_path, tensors, words):
    path = tmp_path / "cat.safetensors"
    save_file(tensors, path)
    refused(lambda: load_embedding(path, shared_model()), str(path), *words)


@pytest.mark.parametrize("name, content, words", [
    ("cat.pt", b"PK\x03\x04 and what else torch.save writes", "pickle"),
    ("cat.bin", b"\x80\x02}q\x00(X and so on", "pickle"), ("cat.safetensors", b"PK\x03\x04 or so", "pickle"),
    ("cat.safetensors", b"", "empty"), ("cat.safetensors", b"just some text", "not safetensors"),
    ("cat.safetensors", None, "No such file")])
def test_what_is_no_safetensors_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(lambda: load_embedding(path, shared_model()), str(path), words)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_embedding({"vectors": some_vectors(1, 3)}, path)
    whole = path.read_bytes()
    for size in 5, 40, len(whole) - 1:
        path.write_bytes(whole[:size])
        refused(lambda: load_embedding(path, shared_model()), str(path))


def test_what_cannot_be_kept_is_not_written(tmp_path):
    path = tmp_path / "me.safetensors"
    with pytest.raises(ValueError, match="one person's vectors are needed, not 2 people's"):
        save_embedding({"vectors": some_vectors(2)}, path)
    refused(lambda: save_embedding({"vectors": torch.full((1, 1, WIDTH), torch.inf)}, path), "infinite")
    assert list(tmp_path.iterdir()) == []
