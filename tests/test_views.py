"""training/views.py by numbers: which crops, whose generator, which places count."""
import pytest
import torch
from tiny import generator, photo, shared_model, tiny_hypernet

import hdb
from methods import hyperdreambooth
from training.views import crops, face_weights


def test_crops_are_the_photo_zoomed_turned_and_shifted():
    """Of a picture whose colours are its coordinates: what a crop shows at each place is where it looks."""
    at = (torch.arange(64) + .5) / 32 - 1
    picture = torch.stack([at[None].expand(64, 64), at[:, None].expand(64, 64), torch.zeros(64, 64)])
    whole, *found = crops(picture[None], 4, [generator(3)])[0]
    assert torch.equal(whole, picture)
    numbers = 2 * torch.rand(3, 4, generator=generator(3)) - 1
    border = 1 - 1 / 64  # where the outermost pixels are
    for view, (zoom, angle, x, y) in zip(found, numbers):
        scale, turn = 1 + .1 * zoom, .12 * angle
        expected_x = scale * (turn.cos() * picture[0] - turn.sin() * picture[1]) + .1 * x
        expected_y = scale * (turn.sin() * picture[0] + turn.cos() * picture[1]) + .1 * y
        for channel, expected in (0, expected_x), (1, expected_y):
            mirrored = torch.where(expected.abs() > 1, 2 * expected.sign() - expected, expected)
            assert torch.allclose(view[channel], mirrored.clamp(-border, border), atol=1e-3)


def test_nobodys_crops_depend_on_who_is_beside_them():
    both = crops(photo(2), 3, [generator(1), generator(2)])
    assert both.shape[:2] == (2, 3) and torch.equal(both[1], crops(photo(2)[1:], 3, [generator(2)])[0])


def test_the_middle_counts_and_the_mean_is_one():
    weights = face_weights(16, 16)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5) and weights[8, 8] > 1.5 > .1 > weights[0, 0]
    x, y = (4 + .5) / 8 - 1, (12 + .5) / 8 - 1
    inside = 1 / (1 + torch.tensor(-6 * (1 - (x / .62) ** 2 - ((y - .03) / .85) ** 2)).exp())
    assert weights[12, 4] / weights[8, 8] == pytest.approx(inside.item() / .9975, rel=.01)


def test_tuning_is_on_the_views_of_one_photo_and_on_several_photos_as_they_are():
    model = shared_model()
    engine = hdb.HyperDreamBooth(model)
    engine.hypernet = tiny_hypernet(*engine.lidb.shape)
    theta, g = engine.predict(photo()), generator(5)
    tuned = hyperdreambooth.tune(engine, photo()[:, None], theta, [generator(5)], 3, 2, 2, .01, 3)
    views = crops(photo(), 3, [g])
    places = face_weights(*(side // 8 for side in photo().shape[-2:]))
    expected = engine.fine_tune(views, theta, 2, 2, .01, 3, [g], places=places)
    assert all(torch.equal(tuned[name].b, expected[name].b) for name in expected)
    for photos, count in (photo()[:, None], 1), (photo(2)[None], 8):
        asis = hyperdreambooth.tune(engine, photos, theta, [generator(5)], count, 2, 2, .01, 3)
        expected = engine.fine_tune(photos, theta, 2, 2, .01, 3, [generator(5)])
        assert all(torch.equal(asis[name].b, expected[name].b) for name in expected)


def test_nano_adds_a_part_of_what_is_learnt_to_a_prediction_and_all_of_it_to_none(nano):
    """On the views of one photo, and on the photo as it is."""
    engine, seen = hdb.HyperDreamBooth(nano), torch.rand(1, 3, 128, 128, generator=generator(1)) * 2 - 1
    theta = torch.randn(1, *engine.lidb.shape, generator=generator(2)) * .1
    for given, part in (theta, .7), (None, 1.):
        learnt = engine.fine_tune(seen, given, 2, 1, .01, 1, [generator(5)])
        added = hyperdreambooth.tune(engine, seen[:, None], given, [generator(5)], 1, 2, 1, .01, 1)
        for name, (a, b) in learnt.items():
            assert b.norm() > 0 and torch.equal(added[name].a, a) and torch.equal(added[name].b, b * part)
    onviews = hyperdreambooth.tune(engine, seen[:, None], theta, [generator(5)], 2, 2, 1, .01, 1)
    g = generator(5)
    views, places = crops(seen, 2, [g]), face_weights(16, 16)
    learnt = engine.fine_tune(views, theta, 2, 1, .01, 1, [g], places=places)
    assert all(torch.equal(onviews[name].b, learnt[name].b * .7) for name in learnt)
