"""files/tokenizers.py: what it reads it reads exactly, and what it can't it refuses in one line."""
import json
import warnings

import pytest
import torch

from clip import END, TextConfig, Tokenizer, learn_bpe
from files.disk import LoadError
from files.tokenizers import read_tokenizer, vocabulary_in, write_tokenizer

VOCAB, MERGES = learn_bpe(["a", "face", "as", "rock", "star"])
CONFIG = TextConfig(vocab_size=len(VOCAB), max_position_embeddings=24)


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(Tokenizer(VOCAB, MERGES), tmp_path)
    return tmp_path


def read(folder):
    return read_tokenizer(vocabulary_in(folder), CONFIG, "small")


def test_written_and_read_again(folder):
    assert (folder / "merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    with open(folder / "merges.txt", "a", encoding="utf-8") as file:
        file.write("q j\nqj q</w>\n\n")  # surplus pairs that make no token
    tokenizer = read(folder)
    assert tokenizer.vocab == VOCAB and tokenizer.merges[:len(MERGES)] == MERGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tokenizer(["qjq face"]), Tokenizer(VOCAB, MERGES, 24)(["qjq face"]))


@pytest.mark.parametrize("content", [
    "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "<!DOCTYPE html>\n<p>Not found",
    "", "\n".join(map(" ".join, MERGES[:-1]))])
def test_merges_that_are_not_the_vocabularys(folder, content):
    """Every word would be spelt in letters, without a sign."""
    (folder / "merges.txt").write_text(content)
    with pytest.raises(LoadError, match="merges.txt: these merges make none of .* download it again"):
        read(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_what_a_tokenizers_settings_say(folder, name):
    for known in END, {"content": END, "lstrip": False}, None:
        (folder / name).write_text(json.dumps({"model_max_length": 77, "pad_token": known}))
        assert read(folder).vocab == VOCAB
    for key, odd in ("pad_token", "!"), ("pad_token", {"content": "!"}), ("do_lower_case", False), (
            "eos_token", "</s>"):
        (folder / name).write_text(json.dumps({key: odd}))
        with pytest.raises(LoadError, match=f"{name}: {key} is .*; only .* is implemented"):
            read(folder)


@pytest.mark.parametrize("merges", [MERGES, [" ".join(pair) for pair in MERGES]])
def test_the_one_file_of_transformers_5(tmp_path, merges):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCAB, "merges": merges}}))
    assert vocabulary_in(tmp_path) == [tmp_path / "tokenizer.json"]
    tokenizer = read(tmp_path)
    assert (tokenizer.vocab, tokenizer.merges, tokenizer.max_length) == (VOCAB, MERGES, 24)


def test_the_pair_goes_before_the_one(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert vocabulary_in(folder) == [folder / "vocab.json", folder / "merges.txt"]
    (folder / "merges.txt").unlink()
    assert vocabulary_in(folder) == [folder / "tokenizer.json"]
    (folder / "tokenizer.json").unlink()
    assert vocabulary_in(folder) == []
    with pytest.raises(LoadError, match="^small: has no vocab.json and merges.txt$"):
        read(folder)


@pytest.mark.parametrize("content", [
    "[]", "{", '{"a": 0}', json.dumps(VOCAB | {"a": -1}), json.dumps(VOCAB | {"a": 1.5})])
def test_what_is_no_tokenizer(folder, content):
    (folder / "vocab.json").write_text(content)
    with pytest.raises(LoadError, match="vocab.json: not a CLIP tokenizer"):
        read(folder)


def test_more_tokens_than_the_encoder_knows(folder):
    (folder / "vocab.json").write_text(json.dumps(VOCAB | {"surplus": len(VOCAB)}))
    with pytest.raises(LoadError, match=f"{len(VOCAB) + 1} tokens, but small's text encoder has"):
        read(folder)


@pytest.mark.parametrize("name, one, known", [
    ("added_tokens.json", {"<my-cat>": len(VOCAB)}, {END: 0}),
    ("tokenizer.json",
     {"added_tokens": [{"id": 0, "content": "<my-cat>"}]}, {"added_tokens": [{"content": END}]})])
def test_added_tokens_are_refused(folder, name, one, known):
    (folder / name).write_text(json.dumps(one))
    with pytest.raises(LoadError, match=r"added to CLIP's \(<my-cat>\) are not implemented$"):
        read(folder)
    (folder / name).write_text(json.dumps(known))
    assert read(folder).vocab == VOCAB
