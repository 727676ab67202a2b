"""The reader of photos: its labels, its geometry, and that what it ships reads drawings; what --look says."""
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import generator

from files.console import UserError
from nano import faces, reader, seeds, train_reader
from nano.reader import CLASSES, HEADS, NUMBERS, Reader
from nano.train_reader import UNKNOWN


@pytest.fixture(scope="module")
def shipped():
    return reader.load_reader()


def people(count=64):
    return faces.identities(range(seeds.VALIDATION, seeds.VALIDATION + count))


def test_a_category_and_its_number_are_each_other_backwards():
    for name, count in faces.ATTRIBUTES.items():
        identity = torch.full((count, len(faces.IDENTITY)), .5)
        identity[:, faces.IDENTITY.index(name)] = faces.number(name, torch.arange(count))
        assert faces.attributes(identity)[name].tolist() == list(range(count))


@pytest.mark.parametrize("text, said", [
    ("short grey hair, a full beard",
     {"hair_style": "short hair", "hair_colour": "grey", "beard": "a full beard"}),
    ("brown skin and brown hair", {"skin": "brown", "hair_colour": "brown"}),
    ("No Glasses, no moustache", {"glasses": "", "beard": ""}),
    ("round glasses, a moustache", {"glasses": "round glasses", "beard": "a moustache"}),
    ("a blond bun", {"hair_style": "a bun", "hair_colour": "blond"}),
    ("bald", {"hair_style": "bald"}), ("", {})])
def test_looks_are_understood(text, said):
    found = {name: faces.WORDS[name][kind - faces.ATTRIBUTES[name]]
             for name, kind in faces.understood(text).items()}
    assert found == said


def test_what_is_said_of_everybody_is_understood():
    """Captions' words, all of them, mean the categories that they came from."""
    identity = people(200)
    kinds = faces.attributes(identity)
    for i, phrases in enumerate(faces.describe(identity)):
        understood = faces.understood(", ".join(phrases))
        assert all(kind == kinds[name][i] for name, kind in understood.items())
        assert {"skin", "hair_style"} <= understood.keys()
        assert ("hair_colour" in understood) == (kinds["hair_style"][i] > 0)  # of the bald it isn't said


@pytest.mark.parametrize("text", ["purple hair", "tan hair", "green skin", "short glasses", "a long beard"])
def test_another_word_is_answered_with_those_that_exist(text):
    with pytest.raises(UserError, match="is no word here. There are skin: pale, light, tan, brown, dark; "):
        faces.understood(text)


def test_an_identity_survives_its_labels():
    identity = people()
    truth = train_reader.truth_of(identity)
    logits = {name: 50. * F.one_hot(truth[name], count).float() for name, count in CLASSES.items()}
    logits["numbers"] = truth["numbers"].logit()
    again = reader.identity_of(logits)
    found = train_reader.truth_of(again)
    assert all(torch.equal(t, found[name]) for name, t in truth.items() if name != "numbers")
    assert torch.allclose(found["numbers"], truth["numbers"], atol=1e-5)
    assert set(NUMBERS) | set(CLASSES) == set(faces.IDENTITY)
    between = {**logits, "skin": torch.tensor([[0., 0., -50., -50., -50.]]).expand(64, 5)}
    assert torch.allclose(reader.identity_of(between)[:, 0], torch.tensor(.2))  # half way of pale and light


def test_a_view_shows_its_square():
    axis = torch.linspace(-1 + 1 / 128, 1 - 1 / 128, 128)
    x, y = axis.expand(128, 128), axis[:, None].expand(128, 128)
    picture = torch.stack([x, y, 0 * x])[None]
    shown = reader.view(picture, *(torch.tensor([v]) for v in (.2, -.1, .5)))
    assert shown.shape == (1, 3, 64, 64)
    inner = (torch.arange(64) + .5) / 32 - 1
    assert torch.allclose(shown[0, 0, 33], .2 + .5 * inner, atol=1e-2)
    assert torch.allclose(shown[0, 1, :, 33], -.1 + .5 * inner, atol=1e-2)
    turned = reader.view(picture, *(torch.tensor([v]) for v in (0., 0., .5, math.pi / 2)))
    assert torch.allclose(turned[0, 1, 32], .5 * inner, atol=1e-2)  # what was to the right is below


def test_training_looks_say_where_the_frame_is():
    """A picture whose middle is bright: there, in the look, is the frame's centre; and its border is at the
    frame's half side."""
    axis = torch.linspace(-1, 1, 128)
    far = (axis[None].square() + axis[:, None].square()).sqrt()
    picture = ((1 - far / 1.5) * 255).clamp(0, 255).byte().expand(16, 3, 128, 128)
    shown, frame = train_reader.looks(picture, generator(0), torch.zeros(16))
    x, y, log = frame.unbind(1)
    brightest = shown[:, 0].flatten(1).argmax(1)
    inner = (torch.arange(64) + .5) / 32 - 1
    assert torch.allclose(inner[brightest % 64], x, atol=.04)
    assert torch.allclose(inner[brightest // 64], y, atol=.04)
    again = reader.view(shown, x, y, log.exp())[:, 0]
    plain = reader.view(picture.float() / 127.5 - 1, *torch.zeros(2, 16), torch.ones(16))[:, 0]
    middle = slice(20, 44)  # beyond the look's border there is nothing to compare
    assert torch.allclose(again[:, middle, middle], plain[:, middle, middle], atol=.03)
    assert x.std() > .02 and log.std() > .05


def test_photographic_noise_is_as_strong_as_asked():
    x = torch.zeros(64, 3, 64, 64)
    none, full = (train_reader.photographed(x, generator(1), torch.full((64,), s)) for s in (0., 1.))
    assert torch.allclose(none, x, atol=1e-6) and full.std() > .1 and full.abs().max() <= 1


def test_losses_count_what_is_known_and_rare_classes_more():
    found = {name: torch.zeros(3, n) for name, n in HEADS.items()}
    truth = {name: torch.tensor([UNKNOWN, 0, 1]) for name in CLASSES}
    truth["numbers"] = torch.full((3, len(NUMBERS)), float(UNKNOWN))
    truth["numbers"][0, 0] = 1.
    weights = {name: torch.ones(n) for name, n in CLASSES.items()}
    drawn = torch.tensor([1., UNKNOWN, 0.])
    each = train_reader.losses(found, truth, torch.full((3, 3), .5), drawn, weights)
    assert each["skin"].item() == pytest.approx(math.log(5), rel=1e-5)
    assert each["numbers"].item() == pytest.approx(4 * .25) and each["frame"].item() == pytest.approx(2.5)
    assert each["drawn"].item() == pytest.approx(math.log(2), rel=1e-5)
    found["drawn"][1] = 9.  # of which nothing is known
    assert train_reader.losses(found, truth, torch.full((3, 3), .5), drawn, weights)["drawn"] == each["drawn"]
    seen = torch.tensor([0] * 90 + [1] * 10 + [UNKNOWN] * 50)
    weight = train_reader.rarity(seen, 3)
    assert weight[0] < weight[1] < weight[2] and weight[1] / weight[0] == pytest.approx(5 ** .8)


def test_balanced_is_a_mean_over_classes_with_enough_examples():
    kind = torch.tensor([0] * 20 + [1] * 10 + [2] * 3 + [UNKNOWN] * 4)
    hit = torch.cat([torch.ones(20), torch.zeros(17)]) > 0
    assert train_reader.balanced(hit, kind) == .5 and math.isnan(train_reader.balanced(hit[30:], kind[30:]))


def test_words_of_a_table_are_classes():
    names = {"hair_style": ["bald", "short", "parted", "long", "curly", "bun", "bob", "mohawk", "hidden"],
             "hair_colour": ["black", "brown", "blond", "red", "grey", "blue", "hidden"],
             "glasses": ["none", "round", "square"], "beard": ["none", "moustache", "goatee", "full"]}
    for name, words in names.items():
        found = [train_reader.class_of(name, word) for word in words]
        assert found == [UNKNOWN if word == "hidden" else i for i, word in enumerate(words)]
    assert train_reader.class_of("skin", "3") == 3 and train_reader.class_of("glasses", "sun") == 2


def test_the_network_gives_every_head_and_its_looks_are_averaged():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Reader().eval().requires_grad_(False)
    network.heads["frame"].weight.zero_(), network.heads["frame"].bias.zero_()
    pictures = torch.rand(2, 3, 130, 130, generator=generator(3)) * 2 - 1
    found = reader.read(network, pictures)
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: (2, n) for name, n in HEADS.items()}
    assert torch.allclose(found["skin"], reader.read(network, pictures.flip(3))["skin"], atol=1e-4)
    assert reader.drawn(network, pictures).shape == (2,)
    both = reader.avatar(network, pictures)[0]
    alone = [reader.avatar(network, picture[None])[0] for picture in pictures]
    assert not torch.equal(alone[0], alone[1]) and both.shape == (len(faces.IDENTITY),)


def test_the_shipped_reader_knows_drawings(shipped):
    identity = people(128)
    styles = torch.arange(128) % len(faces.STYLES)
    plain = faces.photos(identity, generator(5), "cpu")
    assert reader.drawn(shipped, plain).float().mean() == 1
    assert reader.drawn(shipped, faces.photos(identity, generator(6), "cpu", styles)).float().mean() >= .99
    smaller = F.interpolate(plain, (100, 100), mode="area")
    assert reader.drawn(shipped, smaller).float().mean() >= .99


def test_the_shipped_reader_reads_drawn_people(shipped):
    identity = people(128)
    found = reader.identity_of(reader.read(shipped, faces.photos(identity, generator(5), "cpu")))
    ours, theirs = faces.attributes(found), faces.attributes(identity)
    right = {name: (ours[name] == theirs[name]).float().mean().item() for name in ours}
    assert ((ours["skin"] - theirs["skin"]).abs() <= 1).float().mean() > .95
    least = {"hair_colour": .85, "hair_style": .6, "glasses": .6}  # photos are what it is for
    assert all(right[name] >= share for name, share in least.items()), right


def test_an_avatar_is_who_was_read_and_what_was_said(shipped):
    photo = faces.photos(people(1), generator(5), "cpu")
    look = faces.understood("dark skin, long blue hair, square glasses, no beard")
    identity, portrait = reader.avatar(shipped, photo, look)
    assert faces.describe(identity[None]) == [["dark skin", "long blue hair", "square glasses"]]
    assert portrait.shape == (1, 3, 128, 128)
    again = faces.render(identity[None], torch.full((1, len(faces.NUISANCE)), .5), torch.zeros(1).long())
    assert torch.equal(portrait, again)
    plain = faces.attributes(reader.avatar(shipped, photo)[0][None])
    assert any(plain[name] != kind for name, kind in look.items())
