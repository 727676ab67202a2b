"""CLIP: the tokenizer and text encoder that Stable Diffusion 1.5 is conditioned on, and the image tower used to measure likeness.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. Parameter names are those of
the hub's files (transformers' CLIPTextModel and CLIPModel), so official checkpoints load with strict=True once KNOWN_EXTRAS are dropped.
"""
import json
import re
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------------------
# Text to token ids: byte-pair encoding (Sennrich et al., arXiv 1508.07909) over UTF-8 bytes, each byte written as a printable character

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # stand for themselves; the other bytes for U+0100, U+0101, ...
BYTES = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space; Python's \s has \x1c-\x1f as well
# CLIP's pattern is 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+; split_words() puts every \p{N} between spaces beforehand, so that
# what is left of Python's letters-and-numbers class [^\W_] is \p{L}+ or one \p{N}
WORD = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w{SPACE}]|_)+")


def split_words(text):
    """Lower-case `text` and split it as CLIP does: a list of words, each a tuple of byte symbols, the last one ending in </w>."""
    # letter by letter, because str.lower() of a whole word makes a final Σ into ς, which CLIP's tokenizer doesn't
    lower = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    spaced = "".join(f" {c} " if unicodedata.category(c)[0] == "N" else c for c in lower)
    words = [[BYTES[b] for b in word.encode()] for word in WORD.findall(spaced)]
    return [(*word[:-1], word[-1] + END_OF_WORD) for word in words]


def merge(word, pair):
    """Replace each occurrence of the two symbols `pair` in the tuple `word`, from the left, with their concatenation."""
    out, i = [], 0
    while i < len(word):
        n = 2 if word[i:i + 2] == pair else 1
        out.append("".join(word[i:i + n]))
        i += n
    return tuple(out)


def learn_bpe(words):
    """Learn byte pairs from a list of words, most frequent pair first, until every word is one token. Returns (vocab, merges).

    vocab has CLIP's order: 256 bytes, 256 bytes that end a word, one entry per merge, start and end of text. Deterministic: among
    equally frequent pairs the alphabetically first is taken. A word that CLIP's pattern splits is learnt as its parts.
    """
    counts = Counter(part for word in words for part in split_words(word))
    merges = []
    while counts := Counter({word: n for word, n in counts.items() if len(word) > 1}):
        pairs = Counter()
        for word, n in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        counts = Counter({merge(word, best): n for word, n in counts.items()})
    symbols = [BYTES[b] for b in PRINTABLE] + [BYTES[b] for b in range(256) if b not in PRINTABLE]
    tokens = symbols + [s + END_OF_WORD for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges  # two pairs may make the same token


class Tokenizer:
    """CLIP's tokenizer, equal to transformers' CLIPTokenizer with Stable Diffusion 1.5's settings."""

    def __init__(self, vocab, merges, max_length=77):
        """vocab: {token: id} with both special tokens (KeyError without); merges: pairs of tokens, the most frequent first."""
        self.vocab, self.merges, self.max_length = vocab, merges, max_length
        # pairs that make no token are the surplus lines some copies of the file end with
        self.rank = {tuple(pair): i for i, pair in enumerate(merges) if "".join(pair) in vocab}
        self.start, self.end = vocab[START], vocab[END]

    @classmethod
    def load(cls, vocab_path, merges_path, max_length=77):
        """Read the hub's vocab.json and merges.txt."""
        lines = Path(merges_path).read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if not line.startswith("#version") and len(line.split()) == 2]
        return cls(json.loads(Path(vocab_path).read_text(encoding="utf-8")), merges, max_length)

    def save(self, folder):
        """Write vocab.json and merges.txt, as load() and other programs read them, into an existing folder."""
        Path(folder, "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def tokens(self, text):
        """The tokens of a text of any length, as strings, without start and end."""
        out = []
        for part in re.split(f"({re.escape(START)}|{re.escape(END)})", text):
            if part in (START, END):  # typed by the user
                out.append(part)
                continue
            for word in split_words(part):
                while len(word) > 1:
                    best = min(zip(word, word[1:]), key=lambda pair: self.rank.get(pair, float("inf")))
                    if best not in self.rank:
                        break
                    word = merge(word, best)
                out += word
        return out

    def __call__(self, texts):
        """A list of B strings to ids (B, max_length): start, tokens, end, then end again as padding. Unknown symbols are end as well.

        What doesn't fit is cut, with a warning that names it. TypeError for a lone string, which would be taken for a list of letters.
        """
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one text")
        ids = torch.full((len(texts), self.max_length), self.end)
        ids[:, 0] = self.start
        for row, text in zip(ids, texts):
            tokens, room = self.tokens(text), self.max_length - 2
            if tokens[room:]:
                symbols = {symbol: byte for byte, symbol in BYTES.items()}
                cut = bytes(symbols[c] for c in "".join(tokens[room:]).replace(END_OF_WORD, BYTES[32])).decode(errors="replace")
                warnings.warn(f"prompt is longer than {room} tokens; cut: “{cut.strip()}”", stacklevel=2)
            kept = torch.tensor([self.vocab.get(token, self.end) for token in tokens[:room]], dtype=torch.long)
            row[1:1 + len(kept)] = kept
        return ids


# ---------------------------------------------------------------------------------------------------------------------------------
# The transformers

@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 768
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


SD15 = TextConfig()  # Stable Diffusion 1.5's text encoder is the text tower of openai/clip-vit-large-patch14
NANO = TextConfig(vocab_size=705, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                  max_position_embeddings=24)
VIT_L14 = VisionConfig()  # goes with SD15
VIT_B32 = VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
                       projection_dim=512)
VIT_B32_TEXT = TextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8)


def quick_gelu(x):
    """OpenAI's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.hidden_size} channels cannot be shared among {config.num_attention_heads} heads")
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, h, n, d/h)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, n, d)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocab_size, config.hidden_size),
            "position_embedding": nn.Embedding(config.max_position_embeddings, config.hidden_size)})
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids):
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:ids.shape[1]]  # (B, n, d)
        return self.final_layer_norm(self.encoder(x))


class TextTransformer(nn.Module):
    """Stable Diffusion's text encoder."""

    def __init__(self, config=SD15):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)

    def forward(self, ids):
        """Token ids (B, n), n ≤ max_position_embeddings, to the last hidden state (B, n, d) after the final layer norm."""
        return self.text_model(ids)


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, n, d)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class VisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # so spelt in the official files
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels):
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(x[:, 0])  # (B, d)


class CLIP(TextTransformer):
    """Both towers, and the projections into the space where texts and images are compared (by the cosine)."""

    def __init__(self, text=SD15, vision=VIT_L14):
        super().__init__(text)
        self.vision_model = VisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / .07).log())

    def image_features(self, pixels):
        """Pixels (B, 3, 224, 224) from preprocess() to features (B, projection_dim), not normalised."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids):
        """Token ids (B, n) to features (B, projection_dim), not normalised."""
        # end-of-text is the greatest id; a causal model sees nothing of what stands after the first one
        return self.text_projection(self(ids)[torch.arange(len(ids), device=ids.device), ids.argmax(1)])


def preprocess(images, size=224):
    """Images (B, 3, H, W) in [-1, 1] to CLIP's pixels (B, 3, size, size): shorter side resized, centre cropped, normalised.

    The same as CLIP's image processor but for its rounding to 8 bits while resizing.
    """
    h, w = images.shape[-2:]
    h, w = int(size * h / min(h, w)), int(size * w / min(h, w))
    x = F.interpolate(images / 2 + .5, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (h - size) // 2, (w - size) // 2
    mean = x.new_tensor([.48145466, .4578275, .40821073]).view(3, 1, 1)
    std = x.new_tensor([.26862954, .26130258, .27577711]).view(3, 1, 1)
    return (x[..., top:top + size, left:left + size] - mean) / std


# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints

KNOWN_EXTRAS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}  # 0, 1, 2, ...: nothing learnt


def from_compvis(name):
    """The name here of a text-encoder tensor of the single-file layout, less its `cond_stage_model.transformer.`; None if not needed.

    The same for text_encoder/model.safetensors, where transformers from 5.6 on leaves out `text_model.`, as some old single files do.
    """
    if name == "text_projection.weight":  # into the space shared with pictures, where nothing is compared here
        return None
    name = "text_model." + name.removeprefix("text_model.")
    return None if name in KNOWN_EXTRAS else name
