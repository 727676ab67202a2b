"""files/merged.py on small models: a person merged into a folder is still the person."""
import json

import pytest
import torch
from rule import difference
from safetensors.torch import load_file
from personal import LAYER, lora_of, method, refused, small, someone

import sd
from adapters import LowRank, merge, stack
from files.merged import merge_to_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_folder_is_the_person(tmp_path, dtype):
    adapters = someone().adapters(method())
    model = small()
    for module in (model.unet, model.text, model.vae):
        module.to(dtype)
    parts = model.unet, model.text, model.vae
    before = [{k: p.clone() for k, p in part.state_dict().items()} for part in parts]
    (tmp_path / "out").mkdir()
    merge_to_folder(model, adapters, None, tmp_path / "out")
    for part, was in zip(parts, before):
        assert all(torch.equal(p, was[k]) for k, p in part.state_dict().items())
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    merge(model.layers, adapters)
    back = sd.load(tmp_path / "out", "cpu", dtype)
    for mine, theirs in (model.unet, back.unet), (model.text, back.text), (model.vae, back.vae):
        assert mine.config == theirs.config
        ours, read = mine.state_dict(), theirs.state_dict()
        assert ours.keys() == read.keys() and all(torch.equal(ours[k], read[k]) for k in ours)
    assert torch.equal(model.tokenizer(["a face"]), back.tokenizer(["a face"]))


def test_a_person_merged_in_bfloat16_survives(tmp_path):
    model, adapters = small(), someone().adapters(method())
    for module in (model.unet, model.text, model.vae):
        module.bfloat16()
    before = model.unet.state_dict()
    with pytest.warns(UserWarning, match="small: cannot be read again"):
        merge_to_folder(model, adapters, None, tmp_path / "out")
    after = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    a, b = adapters[LAYER]
    key = f"{LAYER[5:]}.weight"
    assert after[key].dtype == torch.float16
    assert difference(after[key].float() - before[key].float(), (a[0] @ b[0]).T) < 2e-3


def test_what_a_merge_in_bfloat16_leaves_alone_is_as_in_the_files(tmp_path):
    merge_to_folder(small(), {}, None, tmp_path / "source")
    adapters = lora_of(someone())
    merge_to_folder(sd.load(tmp_path / "source", "cpu", torch.bfloat16), adapters, None, tmp_path / "half")
    full = sd.load(tmp_path / "source", "cpu", torch.float32)
    merge(full.layers, adapters)
    for folder, part in ("unet", full.unet), ("text_encoder", full.text), ("vae", full.vae):
        (file,) = (tmp_path / "half" / folder).glob("*.safetensors")
        written = load_file(file)
        for key, p in part.state_dict().items():
            untouched = f"{folder[:4]}.{key.rpartition('.')[0]}" not in adapters
            bar = 0 if untouched else 2e-3
            assert difference(written[key].float(), p.half().float()) <= bar, key


def test_a_merged_folder_keeps_its_sources_settings(tmp_path):
    merge_to_folder(method().model, {}, None, tmp_path / "source")
    theirs = {"scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "clip_sample": True},
              "model_index.json": {"safety_checker": ["stable_diffusion", "Checker"]}}
    for name, changes in theirs.items():
        path = tmp_path / "source" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    merge_to_folder(method().model, lora_of(someone()), tmp_path / "source", tmp_path / "out")
    scheduler, index = (json.loads((tmp_path / "out" / name).read_text()) for name in theirs)
    assert scheduler["clip_sample"] is True
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["safety_checker"] == [None, None]


def test_a_model_merged_for_few_steps_says_so(tmp_path):
    merge_to_folder(method().model, lora_of(someone()), None, tmp_path / "out", few_steps=True)
    with pytest.warns(UserWarning, match="made for LCMScheduler and few steps"):
        sd.load(tmp_path / "out", "cpu")
    assert json.loads((tmp_path / "out/model_index.json").read_text())["scheduler"][1] == "LCMScheduler"


def test_a_merge_that_cannot_be_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    refused(lambda: merge_to_folder(method().model, {}, None, tmp_path / "out"), "exists already")
    refused(lambda: merge_to_folder(method().model, {}, None, tmp_path / "out/mine.txt"), "exists already")
    two = stack([lora_of(someone(1)), lora_of(someone(2))])
    changed = {LAYER: lambda layer, x, y: 2 * y}
    for adapters, why in (two, "1 person"), (changed, f"{LAYER}: only changes of weights"):
        with pytest.raises(ValueError, match=why):
            merge_to_folder(method().model, adapters, None, tmp_path / "new")
    infinite = {LAYER: LowRank(torch.ones(1, 16, 1), torch.full((1, 1, 16), torch.inf))}
    refused(lambda: merge_to_folder(method().model, infinite, None, tmp_path / "new"), LAYER, "infinite")
    (tmp_path / "source/scheduler").mkdir(parents=True)
    (tmp_path / "source/scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(ValueError):
        merge_to_folder(method().model, {}, tmp_path / "source", tmp_path / "new")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "source"]
