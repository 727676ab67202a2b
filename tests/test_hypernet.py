"""Eq. 3 by numbers: the decoder's loop, its start and its gradients."""
from dataclasses import replace

import pytest
import torch
from tiny import VIT, generator, tiny_hypernet
from torch import nn

from adapters import adapted
from hypernet import HyperConfig, HyperNetwork
from lidb import LiDB
from training.trainer import global_seed
from vit import NANO_VIT, ViT


def untrained(**options):
    with global_seed(0):
        options = {"layers": 3, "size": 20, "width": 16, "heads": 2, "vit": VIT, **options}
        return HyperNetwork(HyperConfig(**options))


def photos(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=generator(seed))


def written_out(net, features, steps, scale):
    """Eq. 3 for one person (n, d), with the decoder's layers as PyTorch documents them for norm_first."""
    face = features @ net.face.weight.T + net.face.bias
    theta = torch.zeros(3, 20)
    for _ in range(steps):
        h = theta / scale @ net.estimate.weight.T + net.position
        for layer in net.decoder.layers:
            y = layer.norm1(h)
            h = h + layer.self_attn(y[None], y[None], y[None])[0][0]
            y = layer.norm2(h)
            h = h + layer.multihead_attn(y[None], face[None], face[None])[0][0]
            y = nn.functional.gelu(layer.linear1(layer.norm3(h)))
            h = h + layer.linear2(y)
        h = net.decoder.norm(h)
        theta = theta + scale * torch.stack([h[i] @ net.heads[i] + net.bias[i] for i in range(3)])
    return theta


@pytest.mark.parametrize("scale", [.1, .7])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_eq_3_written_out(steps, scale):
    net = tiny_hypernet(3, 20, iterations=4, output_scale=scale)
    nn.init.normal_(net.bias, generator=generator(3))
    features = net.vit(photos(2))
    expected = torch.stack([written_out(net, f, steps, scale) for f in features])
    assert torch.allclose(net.refine(features, steps), expected, atol=1e-5)
    assert torch.allclose(net(photos(2), steps), expected, atol=1e-5)
    if steps == 4:  # config's own number
        assert torch.allclose(net.refine(features), expected, atol=1e-5)
        assert torch.allclose(net(photos(2)), expected, atol=1e-5)
    else:
        assert not torch.allclose(net.refine(features), expected, atol=1e-2)


def test_all_passes_and_the_last():
    net = tiny_hypernet(3, 20, iterations=4)
    features = net.vit(photos(2))
    passes = net.passes(features)
    assert passes.shape == (5, 2, 3, 20) and torch.equal(passes[4], net.refine(features))
    for k in range(5):
        expected = torch.stack([written_out(net, f, k, .1) for f in features])
        assert torch.allclose(passes[k], expected, atol=1e-5)
    assert torch.equal(net.passes(features, 2), passes[:3])


def test_a_sample_that_is_left_early_trains_the_passes_before():
    """One index into the passes: the gradient of a sample that is left after one pass is that of s = 1."""
    net = tiny_hypernet(3, 20, iterations=3).requires_grad_()
    features = net.vit(photos(2)).detach()
    net.passes(features)[torch.tensor([1, 3]), torch.arange(2)].square().sum().backward()
    ours = net.heads.grad.clone()
    net.zero_grad()
    for f, k in zip(features, (1, 3)):
        written_out(net, f, k, .1).square().sum().backward()
    assert torch.allclose(ours, net.heads.grad, rtol=1e-3, atol=1e-5)


def test_the_loop_starts_at_nothing_and_an_untrained_prediction_is_nobody():
    assert (tiny_hypernet(3, 20).passes(torch.randn(2, 5, 16), 0)[-1] == torch.zeros(2, 3, 20)).all()
    theta = untrained()(photos(2))
    assert theta.shape == (2, 3, 20) and (theta == 0).all()


def test_the_shape_of_the_network():
    net = untrained(depth=3)
    assert HyperConfig(1, 1) == HyperConfig(1, 1, width=160, heads=4, depth=2, iterations=4, output_scale=.1,
                                            vit=NANO_VIT, basis_seed=0, encoder="")
    assert net.estimate.bias is None and net.position.shape == (3, 16)
    assert net.heads.shape == (3, 16, 20) and net.bias.shape == (3, 20)
    assert len(net.decoder.layers) == 3 and net.decoder.layers[0].linear1.out_features == 64
    assert net.decoder.layers[0].self_attn.num_heads == 2 and net.decoder.layers[0].dropout.p == 0
    many = untrained(layers=400)
    assert .015 < many.position.std() < .025
    vit = ViT(replace(VIT, num_hidden_layers=2))
    assert HyperNetwork(HyperConfig(3, 20, width=16, heads=2, vit=vit.config), vit).vit is vit
    assert net.vit.config == VIT and net.config.layers == 3


@pytest.mark.parametrize("iterations", [1, 4])
def test_a_loss_on_the_model_reaches_the_heads_through_the_loop_from_the_start(iterations):
    layers = {"one": nn.Linear(12, 12), "two": nn.Linear(12, 12)}
    basis, net = LiDB(layers, a=10, b=10), untrained(layers=2, iterations=iterations)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, losses = torch.randn(2, 4, 12, generator=generator(4)), []
    for step in range(8):
        with adapted(layers, basis.adapters(net(photos(2)))):
            loss = (layers["two"](layers["one"](x)) - 1).square().mean()
            loss.backward()
        if step == 0:
            assert net.heads.grad.abs().sum() > 0 and net.bias.grad.abs().sum() > 0
        losses.append(loss.item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    net(photos(2)).sum().backward()
    assert net.vit.embeddings.cls_token.grad.abs().sum() > 0  # once the heads have moved, the ViT learns too


def test_the_gradient_goes_back_through_every_pass():
    net = tiny_hypernet(3, 20, iterations=3).requires_grad_()
    features = net.vit(photos(1)).detach()
    net.refine(features).square().sum().backward()
    ours = net.estimate.weight.grad.clone()
    net.zero_grad()
    written_out(net, features[0], 3, .1).square().sum().backward()
    assert ours.norm() > 0 and torch.allclose(ours, net.estimate.weight.grad, rtol=1e-3, atol=1e-5)


def test_people_in_a_batch_do_not_mix():
    net = tiny_hypernet(3, 20)
    assert torch.allclose(net(photos(3))[1:2], net(photos(3)[1:2]), atol=1e-5)
    assert not torch.allclose(net(photos(3))[1], net(photos(3))[2], atol=1e-2)
