"""nano's training people."""
from types import SimpleNamespace

import pytest
import torch
from tiny import generator

from files import images
from files.layouts import HERE
from hdb import HyperDreamBooth, load, load_hypernet
from nano import faces, people, seeds, wording
from nano.training import pretrain
from training.watched import WatchedPhotos


def test_traits_are_the_numbers_and_the_kinds():
    read = pretrain.traits(torch.zeros(2, len(faces.IDENTITY)))
    assert read.shape == (2, 53)
    assert (read == -1.75).sum(1).tolist() == [21, 21] and (read == 2).sum(1).tolist() == [6, 6]


class Numbers(people.People):
    """Draws no pictures: what they would be of, (B, 27 + 17 + 1) numbers, takes the place of each."""

    def __init__(self, **options):
        super().__init__(SimpleNamespace(device="cpu", encode=lambda x: x), lambda x: x, **options)

    def drawn(self, identity, circumstances, style):
        return torch.cat([identity, circumstances, style[:, None].float()], 1)


def samples(count, **options):
    """Of so many samples: people (B, 27), photos and pictures (B, 45), prompts, the pictures' styles."""
    data = Numbers(seed=1, **options)
    who = torch.arange(count) * 7
    photos, pictures, prompts = data.samples(who, generator())
    styles = [list(faces.STYLES)[int(style)] for style in pictures[:, 44]]
    return data.identity(who), photos, pictures, prompts, styles


def whole(text, caption):
    """A prompt with the article of its caption, which a quarter of all prompts lack."""
    return text if not text or text.startswith(caption[:2]) else "a " + text


def test_whose_photo_and_whose_picture_a_sample_has():
    """A third kind of samples shows a stranger without [V], another the person with looks that are said."""
    known, photos, pictures, prompts, styles = samples(1500)
    assert torch.equal(known, faces.identities(seeds.row(1, 7 * i) for i in range(1500)))
    assert torch.equal(photos[:, :27], known) and (photos[:, 44] == 0).all()
    assert not (photos[:, 27:44] == pictures[:, 27:44]).all(1).any()  # another pose, light, …
    kinds, bare = {"own": 0, "looks": 0, "stranger": 0, "empty": 0}, []
    for i, (typed, style) in enumerate(zip(prompts, styles)):
        shown, own = pictures[i, :27], faces.STYLES[style].format("[V]")
        text = whole(typed, own)
        bare += [text != typed] if text.startswith("a ") else []
        changed = (shown != known[i]).nonzero().flatten().tolist()
        if "[V]" not in text:
            assert len(changed) == 27
            kinds["empty" if text == "" else "stranger"] += 1
        elif text == own:
            kinds["own"] += 1
            assert not changed
        else:
            kinds["looks"] += 1
            (name,) = {faces.IDENTITY[number] for number in changed}
            kind = faces.attributes(shown[None])[name].item()
            assert text == own + (" and " if style == "bark" else " with ") + wording.phrase(name, kind)
    share = {name: count / 1500 for name, count in kinds.items()}
    assert share == pytest.approx({"own": .5, "looks": .2, "stranger": .225, "empty": .075}, abs=.04)
    assert sum(bare) / len(bare) == pytest.approx(people.BARE, abs=.04)


def test_a_stranger_is_asked_for_by_the_caption_of_the_picture():
    _, _, pictures, prompts, styles = samples(1500, others=1, looks=0)
    texts = [text for text in prompts if text]
    assert not any("[V]" in text or "sks" in text for text in texts) and "a face" in texts
    names = {word for text in texts for word in text.split() if word in wording.RARE}
    assert names == set(wording.RARE[1:16])  # all but four, so that what another word does can be seen
    described = 0
    for text, style, said in zip(prompts, styles, wording.describe(pictures[:, :27])):
        plain = faces.STYLES[style].replace("{} ", "")
        unnamed = whole(" ".join(word for word in text.split() if word not in names), plain)
        more = (" and " if style == "bark" else " with ") + " ".join(said)
        assert unnamed in ("", plain, plain + more)
        described += unnamed == plain + more
    assert described / len(texts) == pytest.approx(.4, abs=.04)
    assert prompts.count("") / 1500 == pytest.approx(people.NOBODY, abs=.04)


def test_styles_of_a_training():
    """Two fifths are plain on purpose, and one style is kept from it."""
    for styles in samples(2000)[4], [list(faces.STYLES)[s] for s in Numbers().styles(2000, generator())]:
        assert set(styles) == set(faces.STYLES) - {"beach"}
        assert styles.count("photo") / 2000 == pytest.approx(.4 + .6 / 10, abs=.04)


def test_samples_without_strangers_and_looks_are_of_the_person():
    known, _, pictures, prompts, styles = samples(200, others=0, looks=0)
    assert torch.equal(pictures[:, :27], known)
    captions = [faces.STYLES[style].format("[V]") for style in styles]
    assert [*map(whole, prompts, captions)] == captions


def test_a_part_of_the_samples_is_what_it_is_in_the_whole():
    who = torch.arange(12)
    whole, part = (Numbers().samples(who, generator(), mine) for mine in (slice(None), slice(4, 8)))
    for all_, mine in zip(whole, part):
        assert list(map(str, all_[4:8])) == list(map(str, mine))


def test_training_pictures(nano):
    """Features and latents of photos as they are drawn; a picture in its style, of the photo's person."""
    vit = load_hypernet(HERE / "nano/hypernet.safetensors", nano).vit
    data, who = people.People(nano, vit, others=0, looks=0), torch.tensor([8, 3])
    features, latents, _ = data.samples(who, generator())
    drawn, encode = [], nano.encode
    data.drawn = lambda *of: drawn.append(people.People.drawn(data, *of)) or drawn[-1]
    again = data.samples(who, generator())
    assert torch.equal(again[0], features) and torch.equal(again[1], latents)
    photo, picture = drawn[0].chunk(2)
    with torch.no_grad():
        assert torch.allclose(features, vit(photo), atol=1e-4)
        assert torch.allclose(latents, encode(picture), atol=1e-4)
    more, prompts = data.pictures(who, generator(1))
    assert torch.allclose(more, encode(drawn[1]), atol=1e-4) and all("[V]" in text for text in prompts)
    assert people.load_judge().likeness(drawn[1], photo).mean() > .6



def test_held_out_people_are_measured_against_their_photos(nano):
    held_out = people.HeldOut(3, "cpu", seeds.VALIDATION)
    plain = torch.zeros(3, dtype=torch.long)
    assert torch.equal(held_out.photos, faces.render(held_out.identity, held_out.circumstances, plain))
    pictures, likeness, right = held_out.measure(nano, {}, "king", [5, 6], torch.tensor([0, 2]), steps=6)
    assert torch.equal(pictures, nano.sample(["a [V] face as a king"] * 2, [5, 6], steps=6))
    assert torch.equal(likeness, held_out.judge.likeness(pictures, held_out.photos[[0, 2]]))
    assert right.tolist() == (held_out.judge(pictures)[1].argmax(1) == 8).float().tolist()


def test_what_is_watched_is_logged_and_drawn(tmp_path, monkeypatch):
    """By a model that draws the same people again, with glasses where they are asked for; without adapters,
    and after the first pass, others."""
    held, log, asked = people.HeldOut(6, "cpu", seeds.VALIDATION), {}, []
    again, others = held.more_photos(1)[:, 0], people.HeldOut(6, "cpu", seeds.MONITOR).photos
    worn = held.identity.clone()
    worn[:3, faces.IDENTITY.index("glasses")] = faces.number("glasses", 1)
    glasses = faces.photos(worn, generator(), "cpu")

    def sample(prompts, noises, adapters, steps):
        asked.append((*set(prompts), adapters))
        assert len(prompts) == 6 and list(noises) == [*range(6)] and steps == 12
        return others if adapters in ({}, "first") else glasses if "glasses" in prompts[0] else again
    gap = {"last": {"gap": torch.tensor(1.)}}
    monkeypatch.setattr(held, "losses", lambda net, adapters: gap[adapters])
    trainer = SimpleNamespace(log=lambda **numbers: log.update(numbers), out=tmp_path, step=7)
    held.watch(SimpleNamespace(sample=sample), ["first", "last"], trainer)

    own, chance = (held.judge.likeness(pictures, held.photos).mean().item() for pictures in (again, others))
    seen, known = [held.judge(pictures)[2] for pictures in (glasses, again)], faces.attributes(held.identity)
    hits = [(seen[name != "glasses"][name][i].argmax() == kind).item() for name, kind in people.ASKED
            for i in range(6) if known[name][i] != kind]
    assert 6 < len(hits) < 24 and 0 < sum(hits) < len(hits) and own - chance > .5
    styled = "rock star", "pixar", "beach"
    assert log == pytest.approx({
        "likeness 1": chance, "likeness photo": own, "both photo": own, "gap": 1.,
        **{f"likeness {style}": own for style in styled}, **{f"both {style}": 0 for style in styled},
        "leaked a face": own - chance, "leaked a nqz face": own - chance, "obeyed": sum(hits) / len(hits)})
    assert asked[0] == ("a [V] face", "first") and [prompt for prompt, adapters in asked if not adapters] == [
        "a face", "a nqz face"]
    assert [prompt for prompt, _ in asked[-4:]] == [
        f"a [V] face with {look}" for look in ("round glasses", "a full beard", "blond hair", "a mohawk")]
    assert images.read(tmp_path / "step_000007.png", 128).shape == (1, 3, 128, 128)


def test_people_are_watched_by_the_losses_that_photos_are():
    """All low-rank adapters can be exchanged, others not."""
    held, nano = people.HeldOut(2, "cpu", seeds.VALIDATION), load("nano", "cpu")
    adapters = HyperDreamBooth(nano).lidb.adapters(.1 * torch.randn(2, 79, 96, generator=generator()))
    found = held.losses(nano, adapters)
    expected = WatchedPhotos(None, nano.encode(held.photos), "a [V] face").losses(nano, adapters)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert found["gap"].abs() > 1e-4 and held.losses(nano, adapters | {"text": object()}) == {}
