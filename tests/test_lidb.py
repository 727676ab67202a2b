"""Eq. 1 by numbers: the basis, the start, and what θ does to a layer."""
import pytest
import torch
from torch import nn

import clip
import lidb
import unet
from adapters import LowRank, adapted, merge
from lidb import LiDB, personal_layers


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
    assert (basis.a, basis.b) == (100, 50) and basis.shape == (192, 150)  # 28,800, "28k"
    assert LiDB(layers, rank=2).shape == (192, 300)


def test_sizes_come_from_the_paper_or_from_the_narrowest_layer():
    layers = small_layers()
    assert (LiDB(layers).a, LiDB(layers).b) == (16, 16) and LiDB(layers, a=16, b=16).shape == (3, 32)
    middle = {"one": nn.Linear(70, 80)}
    assert (LiDB(middle).a, LiDB(middle).b, LiDB(middle, a=3).a, LiDB(middle, b=4).b) == (70, 50, 3, 4)
    for wrong in ({"a": 17}, {"b": 17}):
        with pytest.raises(ValueError, match="must not exceed the narrowest layer's width, 16"):
            LiDB(layers, **wrong)


def test_the_basis_written_out():
    """One generator, in float64 but for A₀; Gram and Schmidt's matrices, so that diag(R) is positive."""
    g = torch.Generator().manual_seed(5)
    a0 = torch.randn(8, 2, generator=g) / 8 ** .5
    columns = []
    for rows, count in ((24, 8), (40, 8), (16, 8), (40, 6), (16, 6), (16, 6)):
        m = torch.randn(rows, count, generator=g, dtype=torch.float64)
        q = torch.zeros_like(m)
        for i in range(count):
            rest = m[:, i] - q[:, :i] @ (q[:, :i].T @ m[:, i])
            q[:, i] = rest / rest.norm()
        columns.append(q.float())
    found_a0, a_aux, b_aux = LiDB(small_layers(), a=8, b=6, rank=2, seed=5).basis
    assert torch.equal(found_a0, a0)
    for found, expected in zip((*a_aux, *b_aux), (*columns[:3], *(q.T for q in columns[3:])), strict=True):
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(a_aux, b_aux):
        assert torch.allclose(a.T @ a, torch.eye(8), atol=1e-5)
        assert torch.allclose(b @ b.T, torch.eye(6), atol=1e-5)


def test_basis_depends_on_its_seed_alone_and_is_made_when_it_is_used():
    layers = small_layers()
    lidb.make_basis.cache_clear()
    state = torch.get_rng_state()
    first, again, other = LiDB(layers, seed=5), LiDB(layers, seed=5), LiDB(layers, seed=6)
    assert first.shape == (3, 32) and lidb.make_basis.cache_info().misses == 0
    known = first.checksum
    assert known == again.checksum != other.checksum and lidb.make_basis.cache_info().misses == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert LiDB(layers, seed=0, a=4, b=3).checksum == 4031387682  # saved files rely on it
    assert LiDB(layers, a=4, b=3).seed == 0
    lidb.make_basis.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert LiDB(layers, seed=5).checksum == known
        assert LiDB(layers, seed=5).basis[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    lidb.make_basis.cache_clear()
    with torch.device("meta"):
        assert LiDB(layers, seed=5, device="cpu").checksum == known
    there = LiDB(layers, seed=5, device="meta").basis
    assert all(t.device.type == "meta" for t in (there[0], *there[1], *there[2]))


def test_eq_1():
    layers = small_layers()
    basis = LiDB(layers, a=8, b=6, rank=2)
    theta, (a0, a_aux, b_aux) = some_theta(basis), basis.basis
    adapters = basis.adapters(theta)
    assert list(adapters) == list(layers) == basis.names
    for i, (name, layer) in enumerate(layers.items()):
        for person in range(3):
            a_train = a0 + theta[person, i, :16].view(8, 2)
            b_train = theta[person, i, 16:].view(2, 6)
            delta = a_aux[i] @ a_train @ b_train @ b_aux[i]  # (in, out)
            a, b = adapters[name]
            assert isinstance(adapters[name], LowRank)
            assert delta.shape == (layer.in_features, layer.out_features)
            assert torch.allclose(a[person] @ b[person], delta, atol=1e-6)
    half = basis.adapters(theta.bfloat16())["one"]
    assert half.a.dtype == half.b.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"θ is \(1, 3, 5\), but this basis needs \(people, 3, 28\)"):
        basis.adapters(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="this basis needs"):
        basis.adapters(theta[:, :2])


@pytest.mark.parametrize("rank", [1, 3])
def test_every_sample_its_own_person_equals_merging(rank):
    layers, x = small_layers(), torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    basis = LiDB(layers, a=8, b=8, rank=rank)
    adapters = basis.adapters(some_theta(basis))
    with adapted(layers, adapters):
        together = run(layers, x)
    for person in range(3):
        copies = small_layers()
        one = slice(person, person + 1)
        merge(copies, {k: LowRank(a[one], b[one]) for k, (a, b) in adapters.items()})
        assert torch.allclose(together[person], run(copies, x[person]), atol=1e-5)


def test_theta_zero_is_the_untouched_model_with_a_gradient():
    layers = small_layers()
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    basis = LiDB(layers)
    theta = torch.zeros(1, *basis.shape, requires_grad=True)
    with adapted(layers, basis.adapters(theta)):
        y = run(layers, x)
        assert torch.equal(y, run(small_layers(), x))
        y.square().sum().backward()
    assert (theta.grad[:, :, basis.a:].abs().amax(2) > 0).all()  # B_train of every layer hears of it at once
