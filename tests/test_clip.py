"""clip.py against transformers: same weights (by rule.py), same outputs; same vocabulary, same ids."""
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rule import difference, draw, fill, generator
from safetensors.torch import load_file, save_file

import clip
from clip import CLIP, VIT_B32, VIT_B32_TEXT, TextConfig, TextTransformer, Tokenizer, VisionConfig, learn_bpe
from files.disk import LoadError
from files.encoders import load_clip
from files.tokenizers import write_tokenizer

REFERENCE = Path(__file__).parent / "reference"
HARD = json.loads((REFERENCE / "hard_texts.json").read_text(encoding="utf-8"))
SMALL = TextConfig(vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                   num_attention_heads=4)
VOCAB, MERGES = learn_bpe(HARD["words"])


def shapes(build):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build().state_dict().items()}


def size(build):
    return sum(torch.Size(shape).numel() for shape in shapes(build).values())


def test_sd15_names_and_shapes():
    got = shapes(TextTransformer)
    layer = {"self_attn.q_proj": (768, 768), "self_attn.k_proj": (768, 768), "self_attn.v_proj": (768, 768),
             "self_attn.out_proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072),
             "layer_norm1": (768,), "layer_norm2": (768,)}
    expected = {"text_model.embeddings.token_embedding.weight": (49408, 768),
                "text_model.embeddings.position_embedding.weight": (77, 768),
                "text_model.final_layer_norm.weight": (768,), "text_model.final_layer_norm.bias": (768,)}
    for i in range(12):
        for name, shape in layer.items():
            expected[f"text_model.encoder.layers.{i}.{name}.weight"] = shape
            expected[f"text_model.encoder.layers.{i}.{name}.bias"] = shape[:1]
    assert got == expected
    assert size(TextTransformer) == 123_060_480
    assert clip.SD15 == TextConfig()


def test_clip_names_and_sizes():
    assert size(CLIP) == 427_616_513
    assert size(lambda: CLIP(VIT_B32_TEXT, VIT_B32)) == 151_277_313
    got = shapes(CLIP)
    assert {name.split(".")[0] for name in got} == {
        "text_model", "vision_model", "visual_projection", "text_projection", "logit_scale"}
    assert got["vision_model.embeddings.class_embedding"] == (1024,)
    assert got["vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert got["vision_model.embeddings.position_embedding.weight"] == (257, 1024)
    assert got["vision_model.pre_layrnorm.bias"] == got["vision_model.post_layernorm.weight"] == (1024,)
    assert got["vision_model.encoder.layers.23.mlp.fc1.weight"] == (4096, 1024)
    assert got["visual_projection.weight"] == (768, 1024) and got["text_projection.weight"] == (768, 768)
    assert got["logit_scale"] == ()


@torch.no_grad()
def test_text_transformer_equals_reference():
    reference, model = load_file(REFERENCE / "clip_text.safetensors"), TextTransformer(SMALL)
    fill(model.text_model)
    ids = torch.randint(300, (2, 77), generator=generator("clip_text"))
    assert difference(model(ids), reference["full"]) < 1e-4
    assert difference(model(ids[:, :9]), reference["short"]) < 1e-4


@torch.no_grad()
def test_clip_equals_reference():
    reference = load_file(REFERENCE / "clip_model.safetensors")
    text = TextConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                      num_attention_heads=4)
    vision = VisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
                          image_size=32, patch_size=8, projection_dim=40, hidden_act="gelu")
    model = fill(CLIP(text, vision))
    ids = torch.randint(298, (3, 20), generator=generator("clip_model"))
    for row, end in zip(ids, (4, 11, 19)):
        row[end:] = 299
    assert difference(model.text_features(ids), reference["text_2"]) < 1e-4
    assert difference(model.text_features(ids), reference["text_299"]) < 1e-4
    assert difference(model.image_features(draw((2, 3, 32, 32), "clip_model")), reference["image"]) < 1e-4


def test_preprocess_equals_reference_up_to_its_8_bit_rounding():
    reference = load_file(REFERENCE / "clip_model.safetensors")
    for h, w in (67, 50), (20, 31):
        image = (draw((h, w, 3), "photo") * 25 + 128).byte()
        ours = clip.preprocess(image.permute(2, 0, 1)[None] / 127.5 - 1, size=32)
        error = (ours[0] - reference[f"pixels_{h}_{w}"]).abs() * .27 * 255  # in grey levels
        assert error.max() < 2 and error.mean() < .5


@torch.no_grad()
def test_causal():
    model = fill(TextTransformer(SMALL))
    ids = torch.randint(300, (1, 20), generator=generator("causal"))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 300
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert (a[:, 12:] - b[:, 12:]).abs().amax(-1).min() > 1e-4  # all that follows has changed


def test_clip_from_a_folder(tmp_path):
    text = replace(SMALL, vocab_size=len(VOCAB), hidden_act="gelu")
    vision = VisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                          image_size=64, patch_size=16, projection_dim=40)
    model = fill(CLIP(text, vision))

    def unusual(config, usual):
        return {k: v for k, v in asdict(config).items() if v != asdict(usual)[k]}
    towers = {"text_config": unusual(text, VIT_B32_TEXT), "vision_config": unusual(vision, VIT_B32)}
    (tmp_path / "config.json").write_text(json.dumps(towers | {"projection_dim": 40}))
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None],
           "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(model.state_dict() | ids, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="no vocab.json"):
        load_clip(tmp_path, "cpu")
    write_tokenizer(Tokenizer(VOCAB, MERGES), tmp_path)
    loaded, tokenizer = load_clip(tmp_path, "cpu")
    assert loaded.config == text
    assert torch.equal(tokenizer(["a woman"]), Tokenizer(VOCAB, MERGES)(["a woman"]))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert loaded.image_features(torch.zeros(1, 3, 64, 64)).shape == (1, 40)
    assert loaded.text_features(tokenizer(["a woman"])).shape == (1, 40)
    state = dict(model.state_dict())
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"no tensor for visual_projection.weight, expected shape \(40, 48\)"):
        load_clip(tmp_path, "cpu")


def test_tokenizer_equals_reference():
    reference = load_file(REFERENCE / "tokenizer.safetensors")
    fewer = {token: i for i, token in enumerate(t for t in VOCAB if t not in ("#", "#</w>", "ð"))}
    for name, vocab in ("known", VOCAB), ("unknown", fewer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = Tokenizer(vocab, MERGES)(HARD["texts"])
        rows = zip(HARD["texts"], ids, reference[name].long(), strict=True)
        wrong = [text for text, a, b in rows if not torch.equal(a, b)]
        assert not wrong


def test_what_is_cut_is_named():
    tokenizer = Tokenizer(VOCAB, MERGES, max_length=6)
    with pytest.warns(UserWarning, match="longer than 4 tokens; cut: “with glasses , 日本語”"):
        ids = tokenizer(["a photo", "a woman smiling portrait with glasses, 日本語"])
    assert ids.shape == (2, 6) and ids.dtype == torch.long
    kept = "<|startoftext|>", "a</w>", "woman</w>", "smiling</w>", "portrait</w>", "<|endoftext|>"
    assert ids[1].tolist() == [VOCAB[token] for token in kept]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a woman smiling portrait"])  # fits exactly


def test_a_lone_text_is_refused():
    with pytest.raises(TypeError, match="list of texts"):
        Tokenizer(VOCAB, MERGES)("a woman")


def test_learn_bpe():
    tokenizer = Tokenizer(VOCAB, MERGES)
    for word in HARD["words"]:
        assert len(tokenizer.tokens(word)) == len(clip.split_words(word)), word
    assert list(VOCAB.values()) == list(range(len(VOCAB))) and len(VOCAB) == 512 + len(MERGES) + 2
    assert list(VOCAB)[:2] == ["!", '"'] and list(VOCAB)[256] == "!</w>"
    assert list(VOCAB)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert learn_bpe(HARD["words"][::-1]) == (VOCAB, MERGES)  # the order of the words doesn't matter
    assert learn_bpe(["hug", "hug", "pug"])[1] == [("u", "g</w>"), ("h", "ug</w>"), ("p", "ug</w>")]
