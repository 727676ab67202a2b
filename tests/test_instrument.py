"""Reading pictures of nano's world by drawing them again."""
import torch
from drawn import people
from tiny import generator

from nano import faces, instrument, seeds


def drawn(count, seed=0):
    """Numbers (count, 44) and the plain photos (count, 3, 128, 128) that they draw."""
    identity = people(seeds.VALIDATION + 900, count)
    circumstances = faces.random_circumstances(count, generator(seed))
    pictures = faces.render(identity, circumstances, torch.zeros(count, dtype=torch.long))
    return torch.cat([identity, circumstances], 1), pictures


def test_pictures_are_read_by_drawing_them_again(coarse):
    numbers, pictures = drawn(3)
    identity, circumstances = instrument.read(pictures)
    assert identity.shape == (3, 27) and circumstances.shape == (3, 17)
    wrong = (torch.cat([identity, circumstances], 1) - numbers).abs()
    error = dict(zip(instrument.NUMBERS, wrong.unbind(1)))
    sure = torch.stack([error[name] for name in instrument.SURE])
    assert len(sure) == 13 and sure.mean() < .03 and sure.median() < .01
    for name in "yaw", "roll", "zoom", "x", "y", "light", "light_side":
        assert error[name].max() < .05, name
    for name in "background", "clothes":
        assert torch.minimum(error[name], 1 - error[name]).max() < .02, name
    # a coarse reading, or kinds that are never tried, leave more
    for name in "hair_style", "hair_colour", "eye_colour", "glasses", "beard":
        known, seen = (instrument.kinds(name, t[:, faces.IDENTITY.index(name)]) for t in (numbers, identity))
        assert torch.equal(known, seen), name


def test_kinds_are_the_renderers():
    u = torch.linspace(.004, .996, 125)
    for name, count in (("hair_style", 8), ("hair_colour", 6), ("eye_colour", 4), ("glasses_colour", 4)):
        assert torch.equal(instrument.kinds(name, u), faces.choice(u, count)), name
    assert torch.equal(instrument.kinds("glasses", u), (faces.choice(u, 4) - 1).clamp(min=0))
    assert torch.equal(instrument.kinds("beard", u), (faces.choice(u, 6) - 2).clamp(min=0))
    for name in instrument.EDGES:
        middles = instrument.middles(name)
        assert torch.equal(instrument.kinds(name, middles), torch.arange(len(middles))), name


def test_the_kind_that_draws_a_picture_best_is_found():
    numbers, pictures = drawn(2)
    small = torch.nn.functional.interpolate(pictures, (64, 64), mode="area")
    for name in "hair_style", "eye_colour", "beard":
        column = instrument.NUMBERS.index(name)
        other = numbers.clone()
        other[:, column] = (numbers[:, column] + .5) % 1
        found = instrument.try_kinds(other, small)[:, column]
        assert torch.equal(instrument.kinds(name, found), instrument.kinds(name, numbers[:, column])), name


def test_numbers_survive_the_columns_of_the_coarse_reading():
    numbers = torch.rand(20, 44, generator=generator()) * .9 + .05
    back = instrument.decoded(instrument.encoded(numbers))
    for name, before, after in zip(instrument.NUMBERS, numbers.unbind(1), back.unbind(1)):
        if name in instrument.EDGES:
            assert torch.equal(instrument.kinds(name, before), instrument.kinds(name, after)), name
        else:
            assert torch.allclose(before, after, atol=1e-5), name
    assert set(instrument.HUES) == {"background", "clothes"}


def test_the_difference_is_of_pixels_and_of_means_over_four_by_four():
    numbers, _ = drawn(2)
    pictures = instrument.draw(numbers).roll(3, 3)
    apart = instrument.draw(numbers) - pictures
    means = apart.reshape(2, 3, 16, 4, 16, 4).mean((3, 5))
    expected = apart.abs().flatten(1).mean(1) + .5 * means.abs().flatten(1).mean(1)
    assert torch.allclose(instrument.difference(numbers, pictures, coarse=.5), expected, atol=1e-6)
