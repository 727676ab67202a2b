"""The reader of photos: its labels, its geometry, and that what it ships reads drawings; what --look says."""
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import generator

from program.console import UserError
from nano import faces, seeds
from nano.photo import avatar, reader, report, train
from nano.photo.reader import CLASSES, HEADS, NUMBERS, Reader
from nano.photo.report import UNKNOWN


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


def sure(identity, logit=50.):
    """Logits of a reader that sees these people (B, 27) and has no doubt."""
    truth = train.truth_of(identity)
    logits = {name: logit * F.one_hot(truth[name], count).float() for name, count in CLASSES.items()}
    return logits | {"numbers": truth["numbers"].logit()}


def test_an_identity_survives_its_labels():
    identity = people()
    again = avatar.identity_of(sure(identity))
    truth, found = train.truth_of(identity), train.truth_of(again)
    assert all(torch.equal(truth[name], kind) for name, kind in found.items()
               if name not in ("numbers", "glasses_colour"))
    assert torch.allclose(found["numbers"], truth["numbers"], atol=1e-5)
    assert not found["glasses_colour"].any()  # nobody's frames are red by mistake
    assert set(NUMBERS) | set(CLASSES) == set(faces.IDENTITY)


def test_drawn_is_what_costs_least():
    """A beard at either side of its threshold, glasses, a mohawk, skin between two steps."""
    shares = {name: torch.eye(count)[[0, 0]] for name, count in CLASSES.items()}
    shares["beard"] = torch.tensor([[.46, .30, .14, .10], [.44, .10, .30, .16]])
    shares["glasses"] = torch.tensor([[.35, .65, 0], [.30, .40, .30]])  # 3·p(none) against 1.5·p(some)
    shares["hair_style"] = torch.tensor([[0, .3, 0, 0, 0, 0, 0, .7], [0, .49, 0, .51, 0, 0, 0, 0]])
    shares["skin"] = torch.tensor([[.5, .5, 0, 0, 0], [0, 0, 0, .2, .8]])
    found = avatar.decided(shares)
    assert found["beard"].tolist() == [0, 2] and found["glasses"].tolist() == [0, 1]
    assert found["hair_style"].tolist() == [1, 3]  # .7 by short hair, .9 by a mohawk
    assert torch.allclose(found["skin"], torch.tensor([.5, 3.8]))
    assert all((cost.diagonal() == 0).all() and (cost >= 0).all() for cost in avatar.costs().values())


def test_what_is_unsure_is_said_and_not_named():
    (identity,) = avatar.identity_of(sure(people(1) * 0 + .1))
    shares = {name: torch.eye(count)[[0]] for name, count in CLASSES.items()}
    assert avatar.unsure(shares, identity) == []
    assert avatar.said(identity) == "pale skin, bald"
    shares["beard"], shares["skin"] = torch.tensor([[.69, .31, 0, 0]]), torch.tensor([[.4, .4, .2, 0, 0]])
    assert avatar.unsure(shares, identity) == ["beard"]  # of skin, the next step is as good
    hairy = identity.clone()
    hairy[faces.IDENTITY.index("hair_style")] = faces.number("hair_style", 5)
    assert avatar.said(hairy, ["beard"]) == "pale skin, a black bun; beard unsure: none drawn"
    assert avatar.said(hairy, ["hair_style", "skin"]) == (
        "black hair; hair style unsure: a bun drawn; skin unsure: pale drawn")
    assert avatar.said(hairy, ["hair_colour"]) == "pale skin, a bun; hair colour unsure: black drawn"


def test_the_visible_error_is_what_the_table_says():
    truth = {"skin": [1, 0, 4], "hair_colour": [0, 1, UNKNOWN], "hair_style": [1, UNKNOWN, 3],
             "glasses": [0, 2, 1], "beard": [0, 3, 0], "eye_colour": [0, UNKNOWN, 1]}
    found = {"skin": [2, 0, 0], "hair_colour": [1, 5, 5], "hair_style": [2, 7, 0], "glasses": [1, 0, 2],
             "beard": [0, 0, 1], "eye_colour": [1, 2, 0]}
    truth, found = ({name: torch.tensor(t) for name, t in some.items()} for some in (truth, found))
    truth["sun"] = torch.tensor([False, True, False])
    error = report.visible(found, truth)
    by_hand = [.15 + .5 + .25 + 3 + .5, 2 + 3 + .75 + 1, 2 + 2 + .25 + 3 + .25]
    assert torch.allclose(error, torch.tensor(by_hand))
    shown = report.figures(found, truth)
    assert shown["gross"] == "3/3" and shown["false beards"] == "1/2" and shown["missed beards"] == "1/1"
    assert shown["false glasses"] == "1/1" and shown["missed glasses"] == "0/1"  # sunglasses are neither


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
    shown, frame = train.looks(picture, generator(0), torch.zeros(16))
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
    none, full = (train.photographed(x, generator(1), torch.full((64,), s)) for s in (0., 1.))
    assert torch.allclose(none, x, atol=1e-6) and full.std() > .1 and full.abs().max() <= 1


def test_losses_count_what_is_known_and_rare_classes_more():
    found = {name: torch.zeros(3, n) for name, n in HEADS.items()}
    truth = {name: torch.tensor([UNKNOWN, 0, 1]) for name in CLASSES}
    truth["numbers"] = torch.full((3, len(NUMBERS)), float(UNKNOWN))
    truth["numbers"][0, 0] = 1.
    weights = {name: torch.ones(n) for name, n in CLASSES.items()}
    drawn = torch.tensor([1., UNKNOWN, 0.])
    each = train.losses(found, truth, torch.full((3, 3), .5), drawn, weights)
    assert each["skin"].item() == pytest.approx(math.log(5), rel=1e-5)
    assert each["numbers"].item() == pytest.approx(4 * .25) and each["frame"].item() == pytest.approx(2.5)
    assert each["drawn"].item() == pytest.approx(math.log(2), rel=1e-5)
    found["drawn"][1] = 9.  # of which nothing is known
    assert train.losses(found, truth, torch.full((3, 3), .5), drawn, weights)["drawn"] == each["drawn"]
    seen = torch.tensor([0] * 90 + [1] * 10 + [UNKNOWN] * 50)
    weight = train.rarity(seen, 3)
    assert weight[0] < weight[1] < weight[2] and weight[1] / weight[0] == pytest.approx(5 ** .8)


def test_balanced_is_a_mean_over_classes_with_enough_examples():
    kind = torch.tensor([0] * 20 + [1] * 10 + [2] * 3 + [UNKNOWN] * 4)
    hit = torch.cat([torch.ones(20), torch.zeros(17)]) > 0
    assert report.balanced(hit, kind) == .5 and math.isnan(report.balanced(hit[30:], kind[30:]))


def test_words_of_a_table_are_classes():
    names = {"hair_style": ["bald", "short", "parted", "long", "curly", "bun", "bob", "mohawk", "hidden"],
             "hair_colour": ["black", "brown", "blond", "red", "grey", "blue", "hidden"],
             "glasses": ["none", "round", "square"], "beard": ["none", "moustache", "goatee", "full"]}
    for name, words in names.items():
        found = [train.class_of(name, word) for word in words]
        assert found == [UNKNOWN if word == "hidden" else i for i, word in enumerate(words)]
    assert train.class_of("skin", "3") == 3 and train.class_of("glasses", "sun") == 2


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
    both = avatar.avatar(network, pictures)[0]
    alone = [avatar.avatar(network, picture[None])[0] for picture in pictures]
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
    found = avatar.identity_of(reader.read(shipped, faces.photos(identity, generator(5), "cpu")))
    ours, theirs = faces.attributes(found), faces.attributes(identity)
    right = {name: (ours[name] == theirs[name]).float().mean().item() for name in ours}
    assert ((ours["skin"] - theirs["skin"]).abs() <= 1).float().mean() > .95
    least = {"hair_colour": .85, "hair_style": .6, "glasses": .6}  # photos are what it is for
    assert all(right[name] >= share for name, share in least.items()), right


def test_an_avatar_is_who_was_read_and_what_was_said(shipped):
    photo = faces.photos(people(1), generator(5), "cpu")
    look = faces.understood("dark skin, long blue hair, square glasses, no beard")
    identity, portrait, said = avatar.avatar(shipped, photo, look)
    assert said == "dark skin, long blue hair, square glasses"  # of what was said nothing is unsure
    assert faces.describe(identity[None]) == [said.split(", ")]
    assert portrait.shape == (1, 3, 128, 128)
    again = faces.render(identity[None], torch.full((1, len(faces.NUISANCE)), .5), torch.zeros(1).long())
    assert torch.equal(portrait, again)
    plain = faces.attributes(avatar.avatar(shipped, photo)[0][None])
    assert any(plain[name] != kind for name, kind in look.items())
