"""Read and write a CLIP tokenizer: vocab.json and merges.txt, or the one tokenizer.json of transformers 5."""
import json
from pathlib import Path

from clip import END, START, Tokenizer
from files.checkpoints import require_settings
from files.disk import LoadError, read_json, read_text, refusing, whole_files

SETTINGS = "tokenizer_config.json", "special_tokens_map.json"
FILES = "vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json", *SETTINGS
IMPLEMENTED = {"pad_token": END, "bos_token": START, "eos_token": END, "do_lower_case": True}


def vocabulary_in(folder):
    """The vocabulary's files in `folder`: vocab.json and merges.txt, else tokenizer.json, else []."""
    choices = ["vocab.json", "merges.txt"], ["tokenizer.json"]
    paths = ([Path(folder, name) for name in names] for names in choices)
    return next((files for files in paths if all(file.is_file() for file in files)), [])


def read_tokenizer(vocabulary, text_config, name):
    """The Tokenizer in the files of vocabulary_in(), for a text encoder with this config. LoadError if they
    hold none, more tokens than the encoder of the model `name` knows, or added tokens."""
    if not vocabulary:
        raise LoadError(f"{name}: has no vocab.json and merges.txt")
    file, folder = vocabulary[0], vocabulary[0].parent
    with refusing(f"{file}: not a CLIP tokenizer"):
        vocab, merges = read_bpe(*vocabulary)
        tokenizer = Tokenizer(vocab, merges, text_config.max_position_embeddings)
        if not all(type(token) is int and token >= 0 for token in vocab.values()):
            raise ValueError("a token's id is not a whole number")
        # Tokens may be added beside the vocabulary, as textual inversions are
        files = [folder / "tokenizer.json", folder / "added_tokens.json"]
        listed, more = (read_json(file) if file.is_file() else {} for file in files)
        named = {str(token["content"]) for token in listed.get("added_tokens") or []} | set(map(str, more))
    if added := sorted(named - vocab.keys()):
        raise LoadError(f"{folder}: tokens added to CLIP's ({', '.join(added)[:100]}) are not implemented")
    tokens = max(vocab.values()) + 1
    if tokens > text_config.vocab_size:
        raise LoadError(f"{file}: {tokens} tokens, but {name}'s text encoder has {text_config.vocab_size}")
    check_merges(vocab, merges, vocabulary[-1])
    for file in (folder / name for name in SETTINGS):
        found = read_json(file) if file.is_file() else {}
        # A token may be a dictionary
        found |= {key: value["content"] for key, value in found.items()
                  if isinstance(value, dict) and "content" in value}
        require_settings({key: found[key] for key in found if found[key] is not None}, IMPLEMENTED, file)
    return tokenizer


def check_merges(vocab, merges, file):
    """LoadError unless `merges` make every token of `vocab`. Otherwise words would be spelt in letters."""
    made = {first + second for first, second in merges} | {START, END}
    if lost := [token for token in vocab if len(token.removesuffix("</w>")) > 1 and token not in made]:
        raise LoadError(f"{file}: these merges make none of {len(lost)} tokens, such as {lost[0][:50]!r}: "
                        "truncated, a git-lfs pointer or a web page; download it again")


def read_bpe(file, merges_file=None):
    """(vocab, merges) from vocab.json and merges.txt, or from tokenizer.json alone."""
    if merges_file is None:
        bpe = read_json(file)["model"]
        return bpe["vocab"], [tuple(m.split() if isinstance(m, str) else m) for m in bpe["merges"]]
    lines = read_text(merges_file).split("\n")
    pairs = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    return json.loads(read_text(file)), [pair for pair in pairs if len(pair) == 2]


def write_tokenizer(tokenizer, folder):
    """Write vocab.json and merges.txt into a folder."""
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    vocab = json.dumps(tokenizer.vocab, ensure_ascii=False)
    with whole_files(Path(folder, "vocab.json"), Path(folder, "merges.txt")) as files:
        for text, file in zip((vocab, "\n".join(merges) + "\n"), files):
            file.write_text(text, encoding="utf-8")
