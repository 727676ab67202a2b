import pytest
import torch
from torch import nn

import clip
import unet
from lidb import LiDB, Personal, join, lora, merge, personal_layers, scale


def small_layers():
    torch.manual_seed(0)
    return {"one": nn.Linear(24, 40), "two": nn.Linear(40, 16), "three": nn.Linear(16, 16, bias=False)}


def some_theta(basis, people=3, size=.3):
    return size * torch.randn(people, *basis.shape, generator=torch.Generator().manual_seed(1))


def run(layers, x):
    for layer in layers.values():
        x = torch.tanh(layer(x))
    return x


def test_the_papers_counts_on_sd15():
    with torch.device("meta"):
        layers = personal_layers(unet.UNet(unet.SD15), clip.TextTransformer(clip.SD15))
    kinds = [n.split(".", 1)[0] for n in layers]
    assert (len(layers), kinds.count("unet"), kinds.count("text")) == (192, 144, 48)
    assert sum(m.in_features + m.out_features for m in layers.values()) == 385_344  # rank-1 LoRA, "386K"
    basis = LiDB(layers)
    assert (basis.a, basis.b) == (100, 50) and basis.shape[0] * basis.shape[1] == 28_800  # "28k"


def test_bases_are_orthonormal():
    basis = LiDB(small_layers())
    for a, b in zip(basis.a_aux, basis.b_aux):
        assert torch.allclose(a.T @ a, torch.eye(basis.a), atol=1e-5)
        assert torch.allclose(b @ b.T, torch.eye(basis.b), atol=1e-5)


def test_basis_depends_on_its_seed_alone():
    layers = small_layers()
    state = torch.get_rng_state()
    first, again, other = LiDB(layers, seed=5), LiDB(layers, seed=5), LiDB(layers, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.checksum == again.checksum != other.checksum
    assert LiDB(layers, seed=0, a=4, b=3).checksum == 4031387682  # saved files rely on it: a change here breaks them
    torch.set_default_dtype(torch.float64)
    try:
        assert LiDB(layers, seed=5).checksum == first.checksum
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert LiDB(layers, seed=5, device="cpu").checksum == first.checksum


def test_eq_1():
    layers = small_layers()
    basis = LiDB(layers, a=8, b=6, rank=2)
    theta = some_theta(basis)
    for i, (name, layer) in enumerate(layers.items()):
        for person in range(3):
            a_train = basis.a0 + theta[person, i, :16].view(8, 2)
            b_train = theta[person, i, 16:].view(2, 6)
            delta = basis.a_aux[i] @ a_train @ b_train @ basis.b_aux[i]  # (in, out)
            a, b = basis.factors(theta)[name]
            assert delta.shape == (layer.in_features, layer.out_features)
            assert torch.allclose(a[person] @ b[person], delta, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_every_sample_its_own_person_equals_merging(rank):
    layers = small_layers()
    basis, personal = LiDB(layers, rank=rank), Personal(layers)
    factors = basis.factors(some_theta(basis))
    x = torch.randn(3, 5, 24)
    personal.factors = factors
    together = run(layers, x)
    personal.remove()
    for person in range(3):
        copies = small_layers()
        merge(copies, {k: (a[person:person + 1], b[person:person + 1]) for k, (a, b) in factors.items()})
        assert torch.allclose(together[person], run(copies, x[person]), atol=1e-5)


def test_one_person_serves_any_batch_and_p_people_serve_groups():
    layers = small_layers()
    basis, personal = LiDB(layers), Personal(layers)
    x, theta = torch.randn(6, 5, 24), some_theta(basis, 2)
    personal.factors = basis.factors(theta[:1])
    alone = run(layers, x)
    personal.factors = basis.factors(theta[:1].expand(6, -1, -1))
    assert torch.allclose(alone, run(layers, x), atol=1e-6)
    personal.factors = basis.factors(theta)
    grouped = run(layers, x)
    personal.factors = basis.factors(theta[[0, 1, 0, 1, 0, 1]])
    assert torch.allclose(grouped, run(layers, x), atol=1e-6)
    personal.factors = basis.factors(some_theta(basis, 4))
    with pytest.raises(ValueError, match="6 cannot be shared among 4"):
        run(layers, x)


@pytest.mark.parametrize("shape", [(2, 24), (2, 5, 24), (2, 24, 3, 24)])
def test_any_number_of_axes_between_the_people_and_the_width(shape):
    layers = {"one": small_layers()["one"]}
    basis, personal, x = LiDB(layers), Personal(layers), torch.randn(shape)
    a, b = basis.factors(some_theta(basis, 2))["one"]
    plain = layers["one"](x)
    personal.factors = {"one": (a, b)}
    expected = torch.stack([plain[i] + x[i] @ a[i] @ b[i] for i in range(2)])
    assert torch.allclose(layers["one"](x), expected, atol=1e-5)


def test_theta_zero_is_the_untouched_model_with_a_gradient():
    layers = small_layers()
    x = torch.randn(2, 5, 24)
    plain = run(layers, x)
    basis, personal = LiDB(layers), Personal(layers)
    theta = torch.zeros(1, *basis.shape, requires_grad=True)
    personal.factors = basis.factors(theta)
    y = run(layers, x)
    assert torch.equal(y, plain)
    y.square().sum().backward()
    assert (theta.grad[:, :, basis.a:].abs().amax(2) > 0).all()  # B_train of every layer hears of the loss at once
    personal.factors = {}
    assert torch.equal(run(layers, x), plain)


def test_joined_factors_add_up_and_scale():
    layers = small_layers()
    basis = LiDB(layers)
    one, two = basis.factors(some_theta(basis, 1)), lora(layers, 4, torch.Generator().manual_seed(2))
    two = {k: (a, b + .1) for k, (a, b) in two.items()}
    for name, (a, b) in join(one, scale(two, .5)).items():
        expected = one[name][0] @ one[name][1] + .5 * two[name][0] @ two[name][1]
        assert a.shape[2] == b.shape[1] == 5 and torch.allclose(a @ b, expected, atol=1e-6)


def test_fresh_lora_changes_nothing_and_can_be_trained():
    layers = small_layers()
    factors = lora(layers, 2, torch.Generator().manual_seed(0), people=3)
    assert all((a @ b == 0).all() and a.requires_grad and b.requires_grad and len(a) == 3 for a, b in factors.values())


def test_merging_is_exact_and_reversible():
    layers = small_layers()
    before = {k: m.weight.clone() for k, m in layers.items()}
    basis = LiDB(layers)
    factors = basis.factors(some_theta(basis, 1))
    merge(layers, factors)
    for k, m in layers.items():
        assert torch.allclose(m.weight, before[k] + (factors[k][0][0] @ factors[k][1][0]).T, atol=1e-7)
        assert not torch.equal(m.weight, before[k])
    merge(layers, scale(factors, -1))
    assert all(torch.allclose(m.weight, before[k], atol=1e-6) for k, m in layers.items())
    with pytest.raises(ValueError, match="one person"):
        merge(layers, basis.factors(some_theta(basis, 2)))


def test_misfits_are_refused():
    layers = small_layers()
    with pytest.raises(ValueError, match="narrowest"):
        LiDB(layers, a=17)
    with pytest.raises(ValueError, match="this basis needs"):
        LiDB(layers).factors(torch.zeros(1, 3, 5))
