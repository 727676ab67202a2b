"""program/memory.py: when activations are computed twice, by what is free and what a step would hold."""
import re
from types import SimpleNamespace

import pytest
import torch

from program import memory
from program.memory import fitting, free_memory, plan_memory


def large(dtype=torch.float32, sample_size=64):
    """As plan_memory sees a full-size model: 860 million parameters of a UNet, 123 of a text encoder."""
    network = torch.nn.Linear(860_000, 1000, bias=False, device="meta", dtype=dtype)
    network.config, network.gradient_checkpointing = SimpleNamespace(sample_size=sample_size), None
    text = torch.nn.Linear(123_000, 1000, bias=False, device="meta", dtype=dtype)
    return SimpleNamespace(unet=network, text=text)


@pytest.mark.parametrize("dtype, side, samples, whole, least", [
    (torch.float32, 64, 1, False, 2.5), (torch.float32, 64, 4, False, 10),
    (torch.bfloat16, 64, 4, False, 4.5), (torch.float16, 32, 4, False, 4.5 / 4),
    (torch.float32, 96, 4, False, 22.5),
    (torch.bfloat16, 64, 2, True, 5 + 16 * .983)])
def test_activations_that_would_not_fit_are_computed_twice(monkeypatch, dtype, side, samples, whole, least):
    for free, expected in (least * 1.01, False), (least * .99, True):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free * 1e9)
        model = large(dtype, side)
        said = plan_memory(model, samples, whole)
        needed = re.fullmatch(r"([\d.]+) GB of memory are free, a step needs about ([\d.]+) GB without the "
                              r"model(, so activations are computed twice)?", said)
        assert bool(needed[3]) is expected is model.unet.gradient_checkpointing
        assert float(needed[2]) == pytest.approx(.8 * (least - whole * 15.7) + whole * 15.7, abs=.06)
        assert float(needed[1]) == pytest.approx(free, abs=.06)


@pytest.mark.parametrize("samples, free, people", [
    (4, 40, 4), (16, 40, 1), (4, 1, 1), (1, 40, 8), (4, 80, 8)])
def test_people_side_by_side_by_what_fits(monkeypatch, samples, free, people):
    monkeypatch.setattr(memory, "free_memory", lambda device: free * 1.01e9)
    assert fitting(large(), samples, 8) == people  # each sample takes 2 GB of .8 of what is free


def test_those_of_a_small_model_always_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    model = large()
    model.unet.weight = torch.nn.Parameter(model.unet.weight[:100])
    model.text.weight = torch.nn.Parameter(model.text.weight[:1])
    assert plan_memory(model, 1000) == "how much memory is free is not known"
    assert not model.unet.gradient_checkpointing
    assert fitting(model, 1000, 8) == 8


def test_what_is_free_on_this_machine_is_more_than_a_test_holds():
    held = torch.zeros(10 ** 8, dtype=torch.uint8) + 1  # so that its pages are there
    before = free_memory(held.device)
    assert before == 0 or 1e8 < before < 1e14  # 0 on systems that don't say
