"""The miniature's renderer, its captions, and whose seeds are whose."""
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from drawn import people, photos
from tiny import generator

import clip
from nano import faces, seeds, wording
from program.console import UserError

# mean brightness of the quarters of two people's portraits, style after style
QUARTERS = [
    [0.2341, 0.2524, 0.1130, 0.1930], [0.0667, 0.0497, 0.0363, 0.0127],
    [0.2182, 0.1877, 0.2481, 0.0913], [0.2441, 0.1848, 0.0678, 0.0258],
    [-0.3441, -0.3529, -0.2515, -0.3105], [0.2336, 0.2249, 0.0422, 0.0186],
    [-0.0087, 0.0061, -0.0256, -0.0152], [-0.3481, -0.3730, -0.2310, -0.2552],
    [-0.2652, -0.2167, -0.1303, -0.0361], [-0.3648, -0.3188, 0.0162, -0.0229],
    [0.2330, 0.2407, 0.1562, 0.0870], [0.3574, 0.3138, 0.1859, 0.0422],
    [0.2203, 0.1841, 0.0269, 0.0863], [0.3695, 0.4134, 0.2046, 0.3561],
    [0.2822, 0.2025, 0.0542, -0.0147], [-0.2093, -0.2912, -0.2780, -0.3191],
    [0.2515, 0.3008, -0.0285, 0.0484], [0.0763, 0.0609, -0.0096, -0.0727],
    [-0.1955, -0.2011, -0.1697, -0.1730], [-0.2079, -0.1393, -0.0841, -0.0967],
    [-0.1822, -0.1545, -0.0014, 0.0962], [0.1543, 0.1922, 0.0153, -0.0203],
]


def test_renderer_is_a_function_of_its_numbers():
    pictures = photos(people(0, 6))
    assert pictures.shape == (6, 3, 128, 128) and pictures.isfinite().all()
    assert pictures.min() >= -1 and pictures.max() <= 1
    assert torch.equal(pictures, photos(people(0, 6)))
    assert (pictures[0] - pictures[1]).abs().mean() > .05
    alone = faces.render(people(3, 1), faces.random_circumstances(6, generator())[3:4], torch.zeros(1).long())
    assert torch.allclose(pictures[3:4], alone, atol=1e-5)


def test_plain_is_the_first_style():
    assert torch.equal(faces.photos(people(0, 2), generator(), "cpu"), photos(people(0, 2)))


def test_a_portrait_is_drawn_as_ever():
    """Every style of two people, as when the weights were trained."""
    who = people(0, 2).repeat_interleave(len(faces.STYLES), 0)
    pictures = faces.photos(who, generator(), "cpu", torch.arange(len(faces.STYLES)).repeat(2))
    quarters = torch.nn.functional.avg_pool2d(pictures.mean(1), 64).flatten(1)
    assert torch.allclose(quarters, torch.tensor(QUARTERS), atol=2e-4)


def test_every_identity_number_shows():
    middle = torch.full((1, len(faces.IDENTITY)), .6)
    middle[:, faces.IDENTITY.index("hair_style")] = .15  # short hair hides neither ears nor brows
    middle[:, faces.IDENTITY.index("beard")] = .1
    still, plain = torch.full((1, len(faces.CIRCUMSTANCES)), .5), torch.zeros(1, dtype=torch.long)
    for i, name in enumerate(faces.IDENTITY):
        low = middle.clone()
        if name == "glasses_colour":
            low[:, faces.IDENTITY.index("glasses")] = .9
        high = low.clone()
        low[:, i], high[:, i] = .05, .95
        assert (faces.render(low, still, plain) - faces.render(high, still, plain)).abs().max() > .05, name


def test_every_style_shows_and_the_papers_prompts_are_among_them():
    count = len(faces.STYLES)
    still = torch.full((count, len(faces.CIRCUMSTANCES)), .5)
    pictures = faces.render(people(1, 1).expand(count, -1), still, torch.arange(count))
    distance = (pictures[:, None] - pictures[None]).abs().mean((2, 3, 4)) + torch.eye(count)
    assert count >= 11 and distance.min() > .01
    assert {"an instagram selfie of a {} face", "a pixar character of a {} face", "a {} face with bark skin",
            "a {} face as a rock star", "a professional photo of a {} face"} <= set(faces.STYLES.values())


def test_people_are_described_as_they_are():
    identity = torch.full((3, len(faces.IDENTITY)), .5)
    for person, numbers in zip(identity, ({"hair_style": .3, "hair_colour": .6, "glasses": .6, "beard": .99},
                                          {"hair_style": .7, "skin": .99, "glasses": .99, "beard": .4},
                                          {"hair_style": 0., "skin": 0., "glasses": .1, "beard": .6})):
        for name, value in numbers.items():
            person[faces.IDENTITY.index(name)] = value
    assert wording.describe(identity) == [
        ["tan skin", "parted red hair", "round glasses", "a full beard"],
        ["dark skin", "a red bun", "square glasses"],
        ["pale skin", "bald", "a moustache"]]
    assert faces.attributes(identity)["glasses"].tolist() == [1, 2, 0]
    assert faces.attributes(identity)["beard"].tolist() == [3, 0, 1]


def test_captions_say_what_is_there_and_fit():
    identity = people(0, 300)
    style = torch.randint(len(faces.STYLES), (300,), generator=generator())
    words = wording.tokenizer()
    assert len(words.vocab) == clip.NANO.vocab_size
    texts = wording.captions(identity, style, generator(), words=1., rare=1., drop=0.)
    assert max(len(words.tokens(t)) for t in texts) <= clip.NANO.max_position_embeddings - 2
    for text, phrases in zip(texts, wording.describe(identity)):
        assert all(p in text for p in phrases)
        assert all(len(words.tokens(w)) == 1 for w in text.split())
    # [V] is never seen in training
    assert wording.RARE[0] == clip.IDENTIFIER
    assert not any(clip.IDENTIFIER in t.split() for t in texts)
    share = sum(t == "" for t in wording.captions(identity, style, generator())) / 300
    assert .03 < share < .2


def test_a_new_word_needs_a_new_text_encoder(monkeypatch):
    """An id beyond the embeddings would end a training in an IndexError."""
    monkeypatch.setitem(faces.STYLES, "robot", "a {} face as a robot")
    with pytest.raises(UserError, match="words make .* tokens: set vocab_size of NANO in clip.py"):
        wording.tokenizer()


def test_nobody_who_is_measured_is_ever_trained_on():
    last = seeds.SEEDS, seeds.STEPS - 1
    ranges = [range(part, seeds.seed(*last, part) + 1)
              for part in (seeds.PRETRAINING, seeds.ENCODER, seeds.HYPERNET)]
    ranges.append(range(seeds.POOL, seeds.row(seeds.SEEDS, -1) + 1))
    ranges.append(range(seeds.JUDGE, seeds.JUDGE + seeds.SEEDS + 1))
    ranges += [range(seed, seed + 1) for seed in (seeds.EXAMPLE, seeds.INSTRUMENT)]
    ranges += [range(part, part + 1_000_000) for part in (seeds.VALIDATION, seeds.MONITOR, seeds.TEST)]
    assert all(a[-1] < b[0] or b[-1] < a[0] for a, b in combinations(ranges, 2))
    assert seeds.seed(1, 0) > seeds.seed(0, seeds.STEPS - 1)  # nor do two trainings of a part meet


def test_seeds_are_spelt_in_one_file():
    root = Path(__file__).parents[1]
    number = re.compile(r"\b\d{1,3}(?:_?\d{3}){2}\b")
    kept = seeds.EXAMPLE, seeds.seed(1, 0)
    files = [f for folder in (".", "files", "nano", "tests") for f in (root / folder).glob("*.py")]
    assert len(files) > 40
    for file in files:
        for spelt in number.findall(file.read_text()) if file.name != "seeds.py" else ():
            value = int(spelt)
            assert value == 0 or value % seeds.VALIDATION and value not in kept, f"{file.name} says {spelt}"
