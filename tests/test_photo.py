"""The reader of photos: its labels, its geometry, and that what it ships reads drawings; what --look says."""
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import generator

from files import images
from files.checkpoints import Tensors
from program.console import UserError
from nano import faces, seeds, wording
from nano.photo import avatar, labels, portraits, reader, report, train, views
from nano.photo.labels import UNKNOWN
from nano.photo.reader import CLASSES, HEADS, NUMBERS, SIDE, Reader


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
             for name, kind in wording.understood(text).items()}
    assert found == said


def test_what_is_said_of_everybody_is_understood():
    """Captions' words, all of them, mean the categories that they came from."""
    identity = people(200)
    kinds = faces.attributes(identity)
    for i, phrases in enumerate(wording.describe(identity)):
        understood = wording.understood(", ".join(phrases))
        assert all(kind == kinds[name][i] for name, kind in understood.items())
        assert {"skin", "hair_style"} <= understood.keys()
        assert ("hair_colour" in understood) == (kinds["hair_style"][i] > 0)  # of the bald it isn't said


@pytest.mark.parametrize("text", ["purple hair", "tan hair", "green skin", "short glasses", "a long beard"])
def test_another_word_is_answered_with_those_that_exist(text):
    with pytest.raises(UserError, match="an unknown word. Known are skin: pale, light, tan, brown, dark; "):
        wording.understood(text)


def sure(identity, logit=50.):
    """Logits of a reader that sees these people (B, 27) and has no doubt."""
    truth = labels.truth_of(identity)
    logits = {name: logit * F.one_hot(truth[name], count).float() for name, count in CLASSES.items()}
    return logits | {"numbers": truth["numbers"].logit()}


def test_an_identity_survives_its_labels():
    identity = people()
    again = avatar.identity_of(sure(identity))
    truth, found = labels.truth_of(identity), labels.truth_of(again)
    assert all(torch.equal(truth[name], kind) for name, kind in found.items() if name != "numbers")
    assert torch.allclose(found["numbers"], truth["numbers"], atol=1e-5)
    frames = again[:, faces.IDENTITY.index("glasses_colour")]
    assert not faces.choice(frames, len(faces.FRAMES)).any()  # nobody's are red by mistake
    assert {*NUMBERS, *CLASSES, "glasses_colour"} == set(faces.IDENTITY)


def test_drawn_is_what_costs_least():
    """A beard at either side of its threshold, glasses, a mohawk, skin between two steps."""
    shares = {name: torch.eye(count)[[0, 0]] for name, count in CLASSES.items()}
    shares["beard"] = torch.tensor([[.46, .30, .14, .10], [.44, .10, .30, .16]])
    shares["glasses"] = torch.tensor([[.72, .28, 0], [.68, .12, .20]])
    shares["hair_style"] = torch.tensor([[0, .3, 0, 0, 0, 0, 0, .7], [0, .49, 0, .51, 0, 0, 0, 0]])
    shares["skin"] = torch.tensor([[.5, .5, 0, 0, 0], [0, 0, 0, .2, .8]])
    found = avatar.decided(shares)
    assert found["beard"].tolist() == [0, 2] and found["glasses"].tolist() == [0, 2]
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
    assert shown.shape == (1, 3, SIDE, SIDE)
    inner = (torch.arange(SIDE) + .5) * 2 / SIDE - 1
    assert torch.allclose(shown[0, 0, 66], .2 + .5 * inner, atol=1e-2)
    assert torch.allclose(shown[0, 1, :, 66], -.1 + .5 * inner, atol=1e-2)
    turned = reader.view(picture, *(torch.tensor([v]) for v in (0., 0., .5, math.pi / 2)))
    assert torch.allclose(turned[0, 1, 64], .5 * inner, atol=1e-2)  # what was to the right is below


def test_training_looks_say_where_the_frame_is():
    """A picture whose middle is bright: there, in the look, is the frame's centre; and its border is at the
    frame's half side."""
    axis = torch.linspace(-1, 1, 128)
    far = (axis[None].square() + axis[:, None].square()).sqrt()
    picture = ((1 - far / 1.5) * 255).clamp(0, 255).byte().expand(16, 3, 128, 128)
    shown, frame = views.looks(picture, generator(0), torch.zeros(16))
    x, y, log = frame.unbind(1)
    brightest = shown[:, 0].flatten(1).argmax(1)
    inner = (torch.arange(SIDE) + .5) * 2 / SIDE - 1
    assert torch.allclose(inner[brightest % SIDE], x, atol=.04)
    assert torch.allclose(inner[brightest // SIDE], y, atol=.04)
    again = reader.view(shown, x, y, log.exp())[:, 0]
    plain = reader.view(picture.float() / 127.5 - 1, *torch.zeros(2, 16), torch.ones(16))[:, 0]
    middle = slice(40, 88)  # beyond the look's border there is nothing to compare
    assert torch.allclose(again[:, middle, middle], plain[:, middle, middle], atol=.03)
    assert x.std() > .02 and log.std() > .05


def test_photographic_noise_is_as_strong_as_asked():
    x = torch.zeros(64, 3, 64, 64)
    none, full = (views.photographed(x, generator(1), torch.full((64,), s)) for s in (0., 1.))
    assert torch.allclose(none, x, atol=1e-6) and full.std() > .1 and full.abs().max() <= 1


def test_losses_count_what_is_known():
    found = {name: torch.zeros(3, n) for name, n in HEADS.items()}
    truth = {name: torch.tensor([UNKNOWN, 0, 1]) for name in CLASSES}
    targets = train.targets_of(truth) | {"numbers": torch.full((3, len(NUMBERS)), torch.nan)}
    targets["numbers"][0, 0] = 1.
    frame, drawing = torch.full((3, 3), .5), torch.tensor([1., torch.nan, 0.])
    frame[1] = torch.nan
    each = train.losses(found, targets, frame, drawing, torch.tensor([0, 1, 2]))
    assert each["skin"].item() == pytest.approx(math.log(5) * 2 / 3, rel=1e-5)
    assert each["numbers"].item() == pytest.approx(4 * .25) and each["frame"].item() == pytest.approx(2.5)
    assert each["drawn"].item() == pytest.approx(math.log(2), rel=1e-5)
    found["drawn"][1], found["frame"][1], found["skin"][0, 3] = 9., 9., 9.  # of which nothing is known
    again = train.losses(found, targets, frame, drawing, torch.tensor([0, 1, 2]))
    assert all(again[name] == each[name] for name in each)


def test_targets_are_hard_and_soft_labels():
    truth = {name: torch.tensor([UNKNOWN, 1]) for name in CLASSES}
    target = train.targets_of(truth, {"glasses": torch.tensor([[.2, .2, .6], [.1, .1, .8]])})
    assert torch.allclose(target["glasses"][0], torch.tensor([.2, .2, .6]))  # open: the soft label alone
    assert torch.allclose(target["glasses"][1], torch.tensor([.055, .54, .405]))
    assert torch.equal(target["beard"][0], torch.zeros(4)) and target["beard"][1, 1] == pytest.approx(.9775)


def test_a_batch_keeps_pictures_and_targets_together():
    """Portraits of one grey each, whose number says which: in what is drawn, mixed or not, both agree."""
    greys = torch.linspace(40, 215, 8)
    photos = greys.byte()[:, None, None, None].expand(8, 3, 60, 60)
    numbers = (greys.byte() / 255.)[:, None].expand(8, len(NUMBERS))
    targets = {name: torch.zeros(8, n) for name, n in CLASSES.items()} | {"numbers": numbers}
    sources = [train.Source(.75, photos, torch.ones(8), targets, 0., 0, 1),
               train.Source(.25, photos, torch.eye(8)[3], targets, 0., torch.nan, 2)]
    x, found, frame, drawing, count = train.batch_of(sources, 64, generator(2))
    assert torch.allclose((x.mean((1, 2, 3)) + 1) / 2, found["numbers"][:, 0], atol=.01)
    assert count.tolist() == [1] * 48 + [2] * 16 and drawing[:48].eq(0).all() and drawing[48:].isnan().all()
    assert torch.allclose(found["numbers"][48:], numbers[3])  # the only one of them that is drawn
    mixed = frame[:48, 0].isnan()
    assert 8 <= mixed.sum() <= 24 and frame[48:].isnan().all()
    apart = (found["numbers"][:48, :1] - numbers[:, 0]).abs().amin(1)
    assert (apart[~mixed] < 1e-6).all() and (apart[mixed] > .005).any()


def test_labels_are_those_of_the_portraits_that_are_there(tmp_path):
    rows = labels.rows_of()
    for i in (7, 10):
        images.to_pil(torch.full((3, 80, 80), i / 10 - 1)).save(tmp_path / rows[i]["file"])
    pictures, truth, soft, held = labels.labelled(tmp_path)
    assert pictures[:, 0, 5, 5].tolist() == [89, 128] and held.tolist() == [False, True]
    everybody = labels.truth_of_rows(rows)
    assert all(torch.equal(t, everybody[name][[7, 10]]) for name, t in truth.items())
    assert truth["skin"].tolist() == [int(rows[i]["skin"]) for i in (7, 10)]
    assert truth["numbers"][1, NUMBERS.index("jaw")].item() == pytest.approx(float(rows[10]["jaw"]))
    assert (truth["numbers"][:, NUMBERS.index("hair_shade")] == UNKNOWN).all()  # nobody judged it
    for name, shares in Tensors(labels.SOFT).all().items():  # rows in the same order: they mostly agree
        known = everybody[name] >= 0
        right = (shares.argmax(1) == everybody[name])[known].float().mean()
        assert right > .55 and torch.equal(soft[name], shares[[7, 10]].float())
        assert torch.allclose(shares.float().sum(1), torch.ones(len(rows)), atol=.01)


def test_portraits_are_found_on_a_sheet():
    """Drawings of three sizes among gaps, in a JPEG: each where it is, and a stranger nowhere."""
    pictures = [images.to_pil(picture) for picture in faces.photos(people(4), generator(1), "cpu")]
    side = portraits.CELL * portraits.GRID
    wanted = torch.stack([portraits.fingerprints(portraits.shrunk(picture, side, side)).flatten()
                          for picture in pictures])
    digits = np.packbits(wanted[0].numpy() > 0).tobytes().hex()  # as labels.csv has them
    assert torch.equal(portraits.bits_of(digits), wanted[0])
    sheet, file = Image.new("RGB", (560, 300), "white"), io.BytesIO()
    places = [(11, 7, 130), (160, 40, 160), (330, 60, 210)]
    for picture, (x, y, side) in zip(pictures, places):
        sheet.paste(picture.resize((side, side)), (x, y))
    sheet.save(file, "JPEG", quality=80)
    agree, found = portraits.find(Image.open(file), wanted)
    assert (agree[:3] >= portraits.ALIKE).all() and agree[3] < portraits.ALIKE
    off = (found[:3] - torch.tensor(places)).abs() / found[:3, 2:]
    assert off.max() < .06


def test_a_head_is_as_sure_as_it_is_right():
    """Logits of ±4 that are right three times in four are divided until they say so."""
    class Sure(torch.nn.Module):
        heads = torch.nn.ModuleDict({name: torch.nn.Linear(2, n) for name, n in CLASSES.items()})
    found = {name: torch.tensor([4., *[0.] * (n - 1)]).repeat(40, 1) for name, n in CLASSES.items()}
    truth = {name: torch.tensor([0, 0, 0, 1] * 10) for name in CLASSES}
    before = Sure.heads["glasses"].weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "read", lambda model, photos: found)
        train.calibrate(Sure(), None, truth)
    temperature = (before / Sure.heads["glasses"].weight).flatten()[0].item()
    assert (found["glasses"][0] / temperature).softmax(0)[0].item() == pytest.approx(.75, abs=.01)


def test_balanced_is_a_mean_over_classes_with_enough_examples():
    kind = torch.tensor([0] * 20 + [1] * 10 + [2] * 3 + [UNKNOWN] * 4)
    hit = torch.cat([torch.ones(20), torch.zeros(17)]) > 0
    assert report.balanced(hit, kind) == .5 and math.isnan(report.balanced(hit[30:], kind[30:]))


def test_words_of_a_table_are_classes():
    names = {"hair_style": ["bald", "short", "parted", "long", "curly", "bun", "bob", "mohawk", "hidden"],
             "hair_colour": ["black", "brown", "blond", "red", "grey", "blue", "hidden"],
             "glasses": ["none", "round", "square"], "beard": ["none", "moustache", "goatee", "full"]}
    for name, words in names.items():
        found = [labels.class_of(name, word) for word in words]
        assert found == [UNKNOWN if word == "hidden" else i for i, word in enumerate(words)]
    assert labels.class_of("skin", "3") == 3 and labels.class_of("glasses", "sun") == 2


def test_the_network_gives_every_head_and_its_looks_are_averaged():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Reader().eval().requires_grad_(False)
        for name in HEADS.keys() - {"frame"}:
            network.heads[name].weight.normal_(0, .02)
    pictures = torch.rand(2, 3, 130, 130, generator=generator(3)) * 2 - 1
    found = reader.read(network, pictures)
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: (2, n) for name, n in HEADS.items()}
    assert torch.allclose(found["skin"], reader.read(network, pictures.flip(3))["skin"], atol=1e-4)
    assert reader.drawn(network, pictures).shape == (2,)
    small, middle = reader.shrunk(pictures, reader.STORED), torch.zeros(2)
    looks = [reader.view(small, middle, middle, middle + size) for size in (.95, 1.08)]
    by_hand = sum(network(turned)["beard"] for look in looks for turned in (look, look.flip(3))) / 4
    assert torch.allclose(found["beard"], by_hand, atol=1e-4)
    both = avatar.avatar(network, pictures)[0]
    alone = [avatar.avatar(network, picture[None])[0] for picture in pictures]
    assert not torch.equal(alone[0], alone[1]) and both.shape == (len(faces.IDENTITY),)


def test_the_shipped_reader_knows_drawings(shipped):
    identity, styles = people(11), torch.arange(11) % len(faces.STYLES)
    plain = faces.photos(identity, generator(5), "cpu")
    assert reader.drawn(shipped, plain).float().mean() == 1
    assert reader.drawn(shipped, faces.photos(identity, generator(6), "cpu", styles)).float().mean() >= .99
    smaller = F.interpolate(plain[:8], (100, 100), mode="area")
    assert reader.drawn(shipped, smaller).float().mean() >= .99


def test_the_shipped_reader_reads_drawn_people(shipped):
    identity = people(12)
    found = avatar.identity_of(reader.read(shipped, faces.photos(identity, generator(5), "cpu")))
    ours, theirs = faces.attributes(found), faces.attributes(identity)
    right = {name: (ours[name] == theirs[name]).float().mean().item() for name in ours}
    assert ((ours["skin"] - theirs["skin"]).abs() <= 1).float().mean() > .95
    least = {"hair_colour": .85, "hair_style": .6, "glasses": .6}  # photos are what it is for
    assert all(right[name] >= share for name, share in least.items()), right


def test_an_avatar_is_who_was_read_and_what_was_said(shipped):
    photo = faces.photos(people(1), generator(5), "cpu")
    look = wording.understood("dark skin, long blue hair, square glasses, no beard")
    identity, portrait, said = avatar.avatar(shipped, photo, look)
    assert said == "dark skin, long blue hair, square glasses"  # of what was said nothing is unsure
    assert wording.describe(identity[None]) == [said.split(", ")]
    assert portrait.shape == (1, 3, 128, 128)
    again = faces.render(identity[None], torch.full((1, len(faces.CIRCUMSTANCES)), .5), torch.zeros(1).long())
    assert torch.equal(portrait, again)
    plain = faces.attributes(avatar.avatar(shipped, photo)[0][None])
    assert any(plain[name] != kind for name, kind in look.items())
