"""adapters.py by numbers: what an adapter does to a layer, when it is in force, and how adapters are
combined."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny import Changed, deltas, generator, shared_model, tiny_model
from torch import nn
from torch.func import functional_call

import clip
import adapters
from files.lora import adaptable_layers
from training.fit import as_changes
from adapters import (
    Change,
    LowRank,
    detach,
    adapted,
    fresh_lora,
    join,
    require_low_rank,
    merge,
    scale,
    shared,
    stack,
)


def some(n_in, n_out, rank=2, people=1, seed=0):
    g = generator(seed)
    return LowRank(torch.randn(people, n_in, rank, generator=g),
                   torch.randn(people, rank, n_out, generator=g))


def small_layers():
    torch.manual_seed(0)
    return {"one": nn.Linear(24, 40), "two": nn.Linear(40, 16), "three": nn.Conv2d(16, 8, 1)}


def x_of(*shape, seed=5):
    return torch.randn(*shape, generator=generator(seed))


def test_v_is_a_word_of_its_own():
    assert clip.IDENTIFIER == "sks"
    assert clip.canonical("a [v] face, a [V]") == "a [V] face, a [V]"
    assert clip.with_identifier("a [v]face") == "a  sks face"
    assert clip.with_identifier("a [V] face", "ohwx") == "a  ohwx  face"


@pytest.mark.parametrize("shape", [(6, 24), (6, 5, 24), (6, 2, 3, 24)])
def test_one_person_is_the_whole_batch(shape):
    layer, adapter, x = nn.Linear(24, 40), some(24, 40), x_of(*shape)
    y = layer(x)
    expected = x @ (layer.weight.T + adapter.a[0] @ adapter.b[0]) + layer.bias
    assert torch.allclose(adapter(layer, x, y), expected, atol=1e-4) and adapter(layer, x, y).shape == y.shape


def test_people_take_turns_in_a_batch():
    layer, adapter, x = nn.Linear(24, 40), some(24, 40, people=2), x_of(6, 5, 24)
    y = layer(x)
    got = adapter(layer, x, y)
    for i, person in enumerate((0, 1, 0, 1, 0, 1)):
        assert torch.allclose(got[i], y[i] + x[i] @ adapter.a[person] @ adapter.b[person], atol=1e-4)
    alone = adapter(layer, x[:2], y[:2])  # as many people as samples
    assert torch.allclose(alone, got[:2], atol=1e-5)


@pytest.mark.parametrize("people, batch", [(4, 6), (4, 2), (2, 3)])
def test_a_batch_that_cannot_be_shared(people, batch):
    with pytest.raises(ValueError, match=f"a batch of {batch} cannot be shared among {people} people"):
        some(3, 3, people=people)(None, torch.zeros(batch, 3), torch.zeros(batch, 3))


def test_a_one_by_one_convolution_is_a_linear_layer_at_each_pixel():
    layer, adapter, x = nn.Conv2d(16, 8, 1), some(16, 8, people=2), x_of(4, 16, 3, 5)
    got = adapter(layer, x, layer(x))
    for i in range(4):
        delta = (adapter.a[i % 2] @ adapter.b[i % 2]).T[:, :, None, None]
        expected = nn.functional.conv2d(x[i:i + 1], layer.weight + delta, layer.bias)
        assert torch.allclose(got[i:i + 1], expected, atol=1e-4)


def test_the_layer_s_own_dtype_is_kept():
    layer, adapter, x = nn.Linear(24, 40).bfloat16(), some(24, 40), x_of(2, 24).bfloat16()
    y = layer(x)
    got = adapter(layer, x, y)
    expected = y.float() + (x @ adapter.a[0].bfloat16()).float() @ adapter.b[0].bfloat16().float()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected.bfloat16(), rtol=2 ** -7, atol=0)


def run(layers, x):
    y = torch.tanh(layers["two"](torch.tanh(layers["one"](x))))
    return layers["three"](y.mT.unflatten(2, (1, -1)))


def test_edits_are_in_force_inside_and_nowhere_else():
    layers, x = small_layers(), x_of(2, 5, 24)
    plain, adapter = run(layers, x), {"one": some(24, 40), "three": some(16, 8)}
    with adapted(layers, adapter):
        inside = run(layers, x)
    changed = copy.deepcopy(layers)
    merge(changed, adapter)
    assert torch.allclose(inside, run(changed, x), atol=1e-4) and not torch.allclose(inside, plain, atol=1e-2)
    with adapted(layers, {}):
        assert torch.equal(run(layers, x), plain)
    with pytest.raises(KeyboardInterrupt), adapted(layers, adapter):
        raise KeyboardInterrupt
    assert torch.equal(run(layers, x), plain) and not any(m._forward_hooks for m in layers.values())


def test_what_is_fixed_and_one_person_s_is_in_the_weights_inside():
    layers, fixed = small_layers(), some(24, 40)
    layers["one"].requires_grad_(False)
    own = layers["one"].weight.clone()
    with pytest.raises(ZeroDivisionError), adapted(layers, {"one": fixed}):
        assert torch.allclose(layers["one"].weight, own + (fixed.a[0] @ fixed.b[0]).T)
        with adapted(layers, {"one": fixed.scaled(2.)}):
            assert torch.allclose(layers["one"].weight, own + 3 * (fixed.a[0] @ fixed.b[0]).T, atol=1e-5)
        raise ZeroDivisionError
    assert torch.equal(layers["one"].weight, own) and not layers["one"]._forward_hooks


def test_what_is_trained_several_people_s_or_half_stays_beside_the_weights():
    layer, fixed = nn.Linear(24, 40).requires_grad_(False), some(24, 40)
    assert adapters.fits_weights(layer, fixed)
    a, b = (t.clone().requires_grad_() for t in fixed)
    for adapter in (LowRank(a, fixed.b), LowRank(fixed.a, b), some(24, 40, people=2), lambda layer, x, y: y):
        assert not adapters.fits_weights(layer, adapter)
    for adapter in fixed, Change({"weight": torch.ones(40, 24)}):
        assert adapters.fits_weights(layer.float(), adapter)
        assert not adapters.fits_weights(nn.Linear(24, 40), adapter)
        assert not adapters.fits_weights(layer.bfloat16(), adapter)
    half_frozen = nn.Linear(24, 40)
    half_frozen.bias.requires_grad_(False)
    assert not adapters.fits_weights(half_frozen, fixed)


def test_a_low_rank_stays_beside_a_large_weight_and_a_high_one_does_not():
    """Full-size layers: 1,280 × 1,280 weights are changed from rank 40 on, 1,280 × 320 from rank 16 on."""
    assert adapters.SMALL == 512 * 512 and adapters.fits_weights(nn.Linear(512, 512).requires_grad_(False),
                                                                 some(512, 512, rank=1))
    assert not adapters.fits_weights(nn.Linear(512, 513).requires_grad_(False), some(512, 513, rank=1))
    for outputs, rank in (1280, 40), (320, 16):
        large = nn.Linear(1280, outputs).requires_grad_(False)
        assert not adapters.fits_weights(large, some(1280, outputs, rank=rank - 1))
        assert adapters.fits_weights(large, some(1280, outputs, rank=rank))
        assert adapters.fits_weights(large, Change({"weight": torch.ones(outputs, 1280)}))


def test_changes_are_in_all_weights_inside_and_give_gradients():
    """Of a layer with a bias, one within the other; afterwards it has its own parameters, in their order."""
    layer, x = nn.Linear(3, 4).requires_grad_(False), x_of(2, 3)
    own, names = dict(layer.named_parameters()), list(layer.state_dict())
    weight, bias = torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    layers = {"one": layer}
    with adapted(layers, {"one": Change({"weight": weight, "bias": bias})}):
        assert torch.allclose(layer(x), F.linear(x, own["weight"] + weight, own["bias"] + bias), atol=1e-6)
        layer(x).sum().backward()
        with adapted(layers, {"one": some(3, 4)}):
            a, b = some(3, 4)
            expected = F.linear(x, own["weight"] + weight, own["bias"] + bias) + x @ a[0] @ b[0]
            assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(weight.grad, x.sum(0).expand(4, 3), atol=1e-6)
    assert torch.equal(bias.grad, torch.full((4,), 2.))
    assert list(layer.state_dict()) == names and all(p is own[k] for k, p in layer.named_parameters())


def test_low_rank_edits_in_weights_do_and_learn_the_same():
    layers, x = small_layers(), x_of(2, 5, 24)
    layers["alike"] = nn.Linear(24, 40)
    for layer in layers.values():
        layer.requires_grad_(False)
    adapter = {"one": some(24, 40), "three": some(16, 8), "alike": some(24, 40, seed=1)}
    gradients, outputs = [], []
    for as_weights in False, True:
        trained = {name: LowRank(*(t.clone().requires_grad_() for t in one)) for name, one in adapter.items()}
        with adapted(layers, as_changes(trained, layers) if as_weights else trained):
            outputs.append(torch.cat([run(layers, x).flatten(), layers["alike"](x).flatten()]))
            outputs[-1].square().sum().backward()
        gradients.append([t.grad for one in trained.values() for t in one])
    assert torch.allclose(*outputs, atol=1e-4)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(*gradients))
    with pytest.raises(ValueError, match="1 person's adapters are needed, not 2 people's"):
        as_changes({"one": some(24, 40, people=2)}, layers)


def test_any_callable_is_an_edit_and_inner_ones_see_what_outer_ones_made():
    layers, x = {"one": nn.Linear(3, 4)}, x_of(2, 3)
    y = layers["one"](x)

    def first(layer, inputs, output):
        assert layer is layers["one"] and torch.equal(inputs, x) and torch.equal(output, y)
        return output + 1

    def second(layer, inputs, output):
        return output * 10

    with adapted(layers, {"one": first}), adapted(layers, {"one": second}):
        assert torch.equal(layers["one"](x), (y + 1) * 10)
    with adapted(layers, {"one": some(3, 4)}), adapted(layers, {"one": some(3, 4, seed=1)}):
        both = layers["one"](x)
    with adapted(layers, join({"one": some(3, 4)}, {"one": some(3, 4, seed=1)})):
        assert torch.allclose(layers["one"](x), both, atol=1e-5)


@pytest.mark.parametrize("by_hooks", [False, True])
def test_two_may_be_left_in_any_order_and_no_copy_stays_adapted(by_hooks):
    layer = nn.Linear(3, 4).requires_grad_(by_hooks)  # whose own gradient is wanted is not changed
    layers, own, x = {"one": layer}, layer.weight.clone(), x_of(2, 3)
    plain, pairs = layer(x), [{"one": some(3, 4, seed=seed)} for seed in (0, 1, 2)]
    outer, middle, inner = (adapted(layers, pair) for pair in pairs)
    outer.__enter__(), middle.__enter__(), inner.__enter__()
    with pytest.raises(ValueError, match="this model is adapted: copy it outside"):
        copy.deepcopy(layers)
    middle.__exit__(None, None, None)
    rest = join(pairs[0], pairs[2])["one"]
    assert torch.allclose(layer(x), plain + x @ rest.a[0] @ rest.b[0], atol=1e-5)
    outer.__exit__(None, None, None)
    assert torch.allclose(layer(x), plain + x @ pairs[2]["one"].a[0] @ pairs[2]["one"].b[0], atol=1e-5)
    inner.__exit__(None, None, None)
    assert torch.equal(layer.weight, own) and torch.equal(copy.deepcopy(layers)["one"](x), plain)


def test_a_layer_that_is_not_there():
    layers = small_layers()
    mistaken = {"one": some(24, 40), "four": None}
    with pytest.raises(ValueError, match="no such layer here: four"), adapted(layers, mistaken):
        pass
    assert not any(m._forward_hooks for m in layers.values())


def test_a_copy_of_a_model_is_nobody_s_and_a_model_can_be_pickled_after_use():
    model = tiny_model()
    before = model.context(["a face"])
    layer = "text.text_model.encoder.layers.0.self_attn.q_proj"
    with model.adapted({layer: some(32, 32)}):
        inside = model.context(["a face"])
        assert torch.equal(tiny_model().context(["a face"]), before)
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(copy.deepcopy(model).context(["a face"]), before)
    assert torch.equal(pickle.loads(pickle.dumps(model.text))(model.tokenizer(["a face"])), before)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_backward_pass_inside_has_the_gradient_of_changed_weights(checkpointing):
    """Through every layer of the UNet that can take factors, convolutions too, and recomputed or not."""
    model = tiny_model()
    model.unet.gradient_checkpointing = checkpointing
    layers = {k: m for k, m in adaptable_layers(model).items() if k.startswith("unet.")}
    pairs = {}
    for i, (name, layer) in enumerate(layers.items()):
        a, b = some(layer.weight[0].numel(), len(layer.weight), seed=i)
        pairs[name] = LowRank((.1 * a).requires_grad_(), (.1 * b).requires_grad_())
    factors = [t for pair in pairs.values() for t in pair]
    x, context = x_of(2, 4, 8, 8), x_of(2, 12, 32, seed=6)
    with model.adapted(pairs):
        ours = torch.autograd.grad(model.unet(x, 7, context).square().mean(), factors)
    model.unet.gradient_checkpointing = False  # functional_call's weights are gone in the backward pass
    reference = Changed(model, deltas(pairs))
    theirs = torch.autograd.grad(reference.unet(x, 7, context).square().mean(), factors)
    assert max((a - b).norm() / b.norm() for a, b in zip(ours, theirs)) < 1e-4


def test_which_layers_can_take_factors():
    found = adaptable_layers(shared_model())
    assert "unet.down_blocks.0.attentions.0.proj_in" in found  # a 1×1 convolution
    assert "unet.time_embedding.linear_1" in found and "text.text_model.encoder.layers.1.mlp.fc2" in found
    assert "unet.conv_in" in found and "unet.down_blocks.0.downsamplers.0.conv" in found
    assert not any("embeddings" in name for name in found)
    assert not any("norm" in name for name in found)


def test_a_fresh_lora_changes_nothing_and_can_be_trained():
    layers = {"one": nn.Linear(24, 40), "two": nn.Linear(40, 16)}
    state = torch.get_rng_state()
    lora = fresh_lora(layers, 3, [generator(4), generator(5)], 2)
    assert torch.equal(torch.get_rng_state(), state) and list(lora) == ["one", "two"]
    each = generator(4), generator(5)  # nobody's numbers depend on the company
    for name, (n_in, n_out) in {"one": (24, 40), "two": (40, 16)}.items():
        a, b = lora[name]
        assert torch.equal(a, torch.cat([torch.randn(1, n_in, 3, generator=g) for g in each]) / n_in ** .5)
        assert b.shape == (2, 3, n_out) and (b == 0).all()
        assert a.requires_grad and b.requires_grad and a.is_leaf
    assert len(fresh_lora(layers, 1, generator())["one"].a) == 1
    away = {"one": nn.Linear(2, 2, device="meta")}  # the numbers come from the CPU and go where the layer is
    assert all(t.device.type == "meta" for t in fresh_lora(away, 1, generator())["one"])


def test_joined_edits_add_up():
    one = {"a": some(6, 5, 1), "b": some(4, 3, 2)}
    two = {"a": some(6, 5, 4, people=3, seed=1), "c": some(2, 2)}
    joined = join(one, {}, two)
    assert list(joined) == ["a", "b", "c"]
    assert joined["a"].a.shape == (3, 6, 5) and joined["a"].b.shape == (3, 5, 5)
    for person in range(3):
        expected = one["a"].a[0] @ one["a"].b[0] + two["a"].a[person] @ two["a"].b[person]
        assert torch.allclose(joined["a"].a[person] @ joined["a"].b[person], expected, atol=1e-5)
    assert joined["b"] is one["b"] and joined["c"] is two["c"] and join() == {}
    swapped = join(two, one)["a"]
    assert torch.allclose(swapped.a @ swapped.b, joined["a"].a @ joined["a"].b, atol=1e-5)


def test_scaled_and_detached():
    pair = LowRank(*(t.requires_grad_() for t in some(6, 5)))
    half = scale({"a": pair}, .5)["a"]
    assert isinstance(half, LowRank) and torch.allclose(half.a @ half.b, .5 * pair.a @ pair.b)
    still = detach({"a": pair})["a"]
    assert isinstance(still, LowRank) and not still.a.requires_grad and not still.b.requires_grad
    assert torch.equal(still.a, pair.a) and torch.equal(still.b, pair.b)


def test_people_are_stacked_in_order():
    me, you = {"a": some(6, 5, 2), "b": some(4, 3, 1)}, {"a": some(6, 5, 3, people=2, seed=1)}
    both = stack([me, you, {}])
    assert both["a"].a.shape == (4, 6, 3) and both["a"].b.shape == (4, 3, 5)
    assert both["b"].a.shape == (4, 4, 1) and both["b"].b.shape == (4, 1, 3)
    product = both["a"].a @ both["a"].b
    assert torch.allclose(product[0], me["a"].a[0] @ me["a"].b[0], atol=1e-5)
    assert torch.allclose(product[1:3], you["a"].a @ you["a"].b, atol=1e-5) and (product[3] == 0).all()
    other = both["b"].a @ both["b"].b
    assert torch.allclose(other[0], me["b"].a[0] @ me["b"].b[0], atol=1e-6) and (other[1:] == 0).all()
    assert isinstance(both["a"], LowRank) and stack([{}]) == {} and stack([]) == {}


def test_merging_is_exact_and_reversible():
    layers = small_layers()
    before = {k: m.weight.clone() for k, m in layers.items()}
    person = {"one": some(24, 40), "three": some(16, 8)}
    merge(layers, person)
    for name, (a, b) in person.items():
        expected = before[name] + (a[0] @ b[0]).T.view(before[name].shape)
        assert torch.allclose(layers[name].weight, expected, atol=1e-6) and layers[name].weight.requires_grad
    assert torch.equal(layers["two"].weight, before["two"])
    merge(layers, scale(person, -1))
    assert all(torch.allclose(m.weight, before[k], atol=1e-5) for k, m in layers.items())
    half = {"one": nn.Linear(24, 40).bfloat16()}
    weight = half["one"].weight.float()
    merge(half, {"one": person["one"]})
    assert torch.equal(half["one"].weight, (weight + (person["one"].a[0] @ person["one"].b[0]).T).bfloat16())


@pytest.mark.parametrize("use, can", [
    (lambda e: join(e), "low-rank adapters can be joined, stacked or exported"),
    (detach, "low-rank adapters can"), (require_low_rank, "low-rank adapters can"),
    (lambda e: stack([e]), "low-rank adapters can"),
    (lambda e: scale(e, 1), "changes of weights can be scaled or merged"),
    (lambda e: merge({"one": nn.Linear(2, 2)}, e), "changes of weights can be scaled or merged")])
def test_what_an_edit_is_not_made_for_is_refused(use, can):
    with pytest.raises(ValueError, match=f"^one: only {can}"):
        use({"one": lambda layer, x, y: y})


LAYERS = {"linear": nn.Linear(6, 5), "convolution": nn.Conv2d(3, 4, 3, 2, padding=1),
          "rows": nn.Embedding(9, 4), "groups": nn.GroupNorm(2, 4), "norm": nn.LayerNorm(5),
          "unbiased": nn.Linear(6, 5, bias=False)}
INPUTS = {"linear": (2, 7, 6), "convolution": (2, 3, 8, 8), "groups": (2, 4, 5, 5), "norm": (2, 7, 5),
          "unbiased": (2, 7, 6)}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_is_other_parameters(kind):
    """Of every kind of layer, of the weight alone as well, at half strength, and merged."""
    layer, g = LAYERS[kind], generator(3)
    x = torch.randint(9, (2, 7), generator=g) if kind == "rows" else torch.randn(INPUTS[kind], generator=g)
    everything = {name: torch.randn(p.shape, generator=g) for name, p in layer.named_parameters()}
    for tensors in everything, {"weight": everything["weight"]}:
        person = {"it": Change(tensors)}
        for strength in 1, .5:
            changed = {name: p + strength * tensors.get(name, 0) for name, p in layer.named_parameters()}
            expected = functional_call(layer, changed, x)
            with adapted({"it": layer}, scale(person, strength)):
                assert torch.allclose(layer(x), expected, atol=1e-5)
        merged = {"it": copy.deepcopy(layer)}
        merge(merged, person)
        whole = {name: p + tensors.get(name, 0) for name, p in layer.named_parameters()}
        assert torch.allclose(merged["it"](x), functional_call(layer, whole, x), atol=1e-5)


def test_a_change_beside_other_edits_and_in_half_precision():
    layer, x, g = nn.Linear(6, 5).bfloat16(), torch.randn(2, 7, 6).bfloat16(), generator(4)
    change, pair = Change({"weight": torch.randn(5, 6, generator=g)}), some(6, 5)
    with adapted({"it": layer}, {"it": change}):
        alone = layer(x)
        with adapted({"it": layer}, {"it": pair}):
            both = layer(x)
    assert alone.dtype == torch.bfloat16
    assert torch.equal(alone, layer(x) + torch.nn.functional.linear(x, change.tensors["weight"].bfloat16()))
    assert torch.equal(both, pair(layer, x, alone))


def test_an_edit_may_change_what_goes_in():
    class Doubled:
        def before(self, layer, inputs):
            return 2 * inputs[0], *inputs[1:]

        def __call__(self, layer, x, y):
            return y + x

    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    expected = layer(2 * x) + 2 * x
    with adapted({"it": layer}, {"it": Doubled()}):
        assert torch.equal(layer(x), expected)
    assert not layer._forward_pre_hooks and not layer._forward_hooks


def test_what_is_shared_by_a_batch():
    people = torch.arange(6.).view(3, 2)
    assert torch.equal(shared(people, 6), torch.cat([people, people]))
    assert torch.equal(shared(people, 3), people)
    assert shared(people[:1], 5) is not None and len(shared(people[:1], 5)) == 1
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared among 3 people"):
        shared(people, 4)


def test_one_person_s_edits_where_one_is_needed():
    two = {"one": some(2, 2, people=2)}
    assert require_low_rank(two) is two and require_low_rank(two, people=2) is two
    for use in (lambda: require_low_rank(two, people=1), lambda: merge({"one": nn.Linear(2, 2)}, two)):
        with pytest.raises(ValueError, match="1 person's adapters are needed, not 2 people's"):
            use()
