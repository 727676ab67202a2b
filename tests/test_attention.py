"""attention.py: the form in large matrices by numbers, and where it is used."""
import pytest
import torch
import torch.nn.functional as F
from tiny import generator

import attention
import unet
import vae


def inputs(queries, keys, dtype=torch.bfloat16):
    """q, k, v of 2 samples and 3 heads, laid out as the UNet's are, and a gradient of the result."""
    g = generator()
    q, k, v, dy = (torch.randn(2, n, 3, 24, generator=g).to(dtype).transpose(1, 2)
                   for n in (queries, keys, keys, queries))
    return [t.requires_grad_() for t in (q, k, v)], dy


def run(function, qkv, dy):
    """The result and its three gradients."""
    result = function(*qkv)
    return result, *torch.autograd.grad(result, qkv, dy)


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.bfloat16, .01)])
@pytest.mark.parametrize("queries, keys", [(70, 50), (64, 64), (9, 130)])
def test_large_matrices_give_the_same(monkeypatch, dtype, off, queries, keys):
    monkeypatch.setattr(attention, "ROWS", 32)
    qkv, dy = inputs(queries, keys, dtype)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    expected = run(F.scaled_dot_product_attention, exact, dy.double())
    for found, right in zip(run(attention.InLargeMatrices.apply, qkv, dy), expected):
        assert found.dtype == dtype and found.shape == right.shape
        assert (found - right).norm() < off * right.norm()


@pytest.mark.parametrize("capable, dtype, keys, used", [
    ({"avx512_bf16": True}, torch.bfloat16, 64, True),
    ({"avx512_bf16": True}, torch.bfloat16, 63, False),
    ({"avx512_bf16": True}, torch.float32, 64, False),
    ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, 64, False),
    ({}, torch.bfloat16, 64, False)])
def test_where_large_matrices_are_used(monkeypatch, capable, dtype, keys, used):
    monkeypatch.setattr(attention, "LONG", 64 * 64)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    attention.multiplies_bfloat16.cache_clear()
    result = attention.attention(*inputs(64, keys, dtype)[0])
    assert (type(result.grad_fn).__name__ == "InLargeMatricesBackward") is used
    attention.multiplies_bfloat16.cache_clear()


def test_the_networks_use_it(monkeypatch):
    def instead(q, k, v):
        asked.append((q.shape, k.shape))
        return F.scaled_dot_product_attention(q, k, v)
    asked = []
    for module in unet, vae:
        monkeypatch.setattr(module, "attention", instead)
    unet.Attention(12, 8, 3)(torch.zeros(2, 5, 12), torch.zeros(2, 7, 8))
    vae.Attention(16, 4)(torch.zeros(2, 16, 3, 2))
    assert asked == [((2, 3, 5, 4), (2, 3, 7, 4)), ((2, 1, 6, 16), (2, 1, 6, 16))]
