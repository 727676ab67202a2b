"""CLIP: Stable Diffusion's tokenizer and text encoder, and the image tower that measures likeness.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020).
Parameters carry the names of transformers' CLIPModel, so official files load with strict=True."""
import re
import unicodedata
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Text to token ids: byte-pair encoding (Sennrich et al., arXiv 1508.07909) over UTF-8 bytes, each byte
# written as a printable character: itself, or for the rest U+0100, U+0101, ...
START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}

# CLIP's pattern is 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+. Python's re has no \p. But
# split_words() puts spaces around every \p{N} first, so that [^\W_]+ matches \p{L}+ or one \p{N}. CLIP's \s
# is Unicode's White_Space; Python's also has \x1c-\x1f.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
WORD = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w{SPACE}]|_)+")
IDENTIFIER = "sks"  # replaces [V] in a prompt: a token that means nothing to text-to-image models


def canonical(prompt):
    """The prompt with its [V] in capitals."""
    return prompt.replace("[v]", "[V]")


def with_identifier(prompt, identifier=IDENTIFIER):
    """The prompt for the text encoder, with the identifier as a separate word in place of [V]."""
    return canonical(prompt).replace("[V]", f" {identifier} ")


def split_words(text):
    """The words of `text` in lower case, split as CLIP does: tuples of byte symbols, the last with </w>."""
    # letter by letter: str.lower() of a whole word turns a final Σ into ς, CLIP doesn't
    lower = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    spaced = "".join(f" {c} " if unicodedata.category(c)[0] == "N" else c for c in lower)
    words = [[BYTES[byte] for byte in word.encode()] for word in WORD.findall(spaced)]
    return [(*word[:-1], word[-1] + END_OF_WORD) for word in words]


def merge_pair(word, pair):
    """The tuple `word` with the two symbols `pair` joined into one wherever they occur, from the left."""
    out, i = [], 0
    while i < len(word):
        n = 2 if word[i:i + 2] == pair else 1
        out.append("".join(word[i:i + n]))
        i += n
    return tuple(out)


def learn_bpe(words):
    """Learn byte pairs from words until every word is one token: (vocab, merges).

    vocab has CLIP's order: 256 bytes, 256 bytes that end a word, one entry per merge, start and end of text.
    It merges the most frequent pair first, and of equally frequent ones the alphabetically first."""
    counts = Counter(part for word in words for part in split_words(word))
    merges = []
    while counts := Counter({word: n for word, n in counts.items() if len(word) > 1}):
        pairs = Counter()
        for word, n in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        counts = Counter({merge_pair(word, best): n for word, n in counts.items()})

    symbols = [symbol + end for end in ("", END_OF_WORD) for symbol in BYTES.values()]
    tokens = dict.fromkeys(symbols + ["".join(pair) for pair in merges])  # two pairs may make one token
    return {token: i for i, token in enumerate([*tokens, START, END])}, merges


class Tokenizer:
    """CLIP's tokenizer, equal to transformers' CLIPTokenizer with Stable Diffusion 1.5's settings."""

    def __init__(self, vocab, merges, max_length=77):
        """vocab: {token: id}, KeyError without both special tokens; merges: pairs, most frequent first."""
        self.vocab, self.merges, self.max_length = vocab, merges, max_length
        # some copies of the file end with surplus lines, pairs that make no token
        self.rank = {tuple(pair): i for i, pair in enumerate(merges) if "".join(pair) in vocab}
        self.start, self.end = vocab[START], vocab[END]
        self.known = {}  # words merged before: trainings ask for the same ones again and again

    def tokens(self, text):
        """The tokens of a text of any length, as strings, without start and end."""
        out = []
        for part in re.split(f"({re.escape(START)}|{re.escape(END)})", text):
            words = [(part,)] if part in (START, END) else split_words(part)  # a user may type these
            for word in words:
                if word not in self.known:
                    self.known[word] = self.merged(word)
                out += self.known[word]
        return out

    def merged(self, word):
        """The tokens of a word, a tuple of symbols."""
        while len(word) > 1:
            best = min(zip(word, word[1:]), key=lambda pair: self.rank.get(pair, float("inf")))
            if best not in self.rank:
                break
            word = merge_pair(word, best)
        return word

    def __call__(self, texts):
        """B strings → ids (B, max_length): start, tokens, end, and end again for padding and unknown symbols.
        It cuts what does not fit, with a warning that names it. TypeError for a string outside a list."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one text")
        room = self.max_length - 2
        ids = torch.full((len(texts), self.max_length), self.end)
        ids[:, 0] = self.start
        for row, text in zip(ids, texts):
            tokens = self.tokens(text)
            if len(tokens) > room:
                symbols = {symbol: byte for byte, symbol in BYTES.items()}
                rest = "".join(tokens[room:]).replace(END_OF_WORD, BYTES[32])
                cut = bytes(symbols[c] for c in rest).decode(errors="replace").strip()
                warnings.warn(f"prompt is longer than {room} tokens; cut: “{cut}”", stacklevel=2)
            kept = [self.vocab.get(token, self.end) for token in tokens[:room]]
            row[1:1 + len(kept)] = torch.tensor(kept, dtype=torch.long)
        return ids


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


SD15 = TextConfig()  # the text tower of openai/clip-vit-large-patch14
NANO = TextConfig(vocab_size=705, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                  num_attention_heads=4, max_position_embeddings=24)
VIT_L14 = VisionConfig()  # the image tower beside SD15
VIT_B32 = VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       patch_size=32, projection_dim=512)
VIT_B32_TEXT = TextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # OpenAI's approximation of the GELU


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ValueError(f"{width} channels cannot be shared among {heads} heads")
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)  # (B, heads, n, d/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, n, d)


class Layer(nn.Module):
    """Attention and a two-layer perceptron: each a residual with a norm before it."""

    def __init__(self, config, causal):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = Attention(config, causal)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.activation(self.mlp.fc1(self.layer_norm2(x)))
        return x + self.mlp.fc2(hidden)


def encoder(config, causal):
    layers = (Layer(config, causal) for _ in range(config.num_hidden_layers))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))


class TextTransformer(nn.Module):
    """Stable Diffusion's text encoder."""

    def __init__(self, config=SD15):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_position_embeddings, width)}),
            "encoder": encoder(config, causal=True),
            "final_layer_norm": nn.LayerNorm(width, config.layer_norm_eps)})

    def forward(self, ids):
        """Token ids (B, n), n ≤ max_position_embeddings → the last hidden state (B, n, d), normalised."""
        return self.read(self.text_model.embeddings.token_embedding(ids))

    def read(self, words):
        """The tokens' embeddings (B, n, d) → the same as forward(their ids)."""
        parts = self.text_model
        places = torch.arange(words.shape[1], device=words.device)
        x = words + parts.embeddings.position_embedding(places)
        return parts.final_layer_norm(parts.encoder(x))


class VisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width, patch = config, config.hidden_size, config.patch_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.embeddings.class_embedding)
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width, config.layer_norm_eps)  # spelt as in the files
        self.encoder = encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixels):
        parts = self.embeddings
        patches = parts.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, n, d)
        x = torch.cat([parts.class_embedding.expand(len(pixels), 1, -1), patches], 1)
        x = self.encoder(self.pre_layrnorm(x + parts.position_embedding.weight))
        return self.post_layernorm(x[:, 0])  # (B, d)


class CLIP(TextTransformer):
    """Both towers, and the projections to the space in which the cosine compares texts and images."""

    def __init__(self, text=SD15, vision=VIT_L14):
        super().__init__(text)
        self.vision_model = VisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / .07).log())

    def image_features(self, pixels):
        """Pixels (B, 3, 224, 224) from preprocess() → features (B, projection_dim), not normalised."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids):
        """Token ids (B, n) → features (B, projection_dim), not normalised."""
        # end-of-text is the greatest id; a causal model sees nothing after the first one
        rows = torch.arange(len(ids), device=ids.device)
        return self.text_projection(self(ids)[rows, ids.argmax(1)])


def preprocess(images, size=224):
    """Images (B, 3, H, W) in [-1, 1] → CLIP's pixels (B, 3, size, size): resizes the shorter side to `size`,
    crops the centre, normalises. Like CLIP's image processor, without its rounding to 8 bits."""
    h, w = images.shape[-2:]
    h, w = int(size * h / min(h, w)), int(size * w / min(h, w))
    x = F.interpolate(images / 2 + .5, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (h - size) // 2, (w - size) // 2
    x = x[..., top:top + size, left:left + size]
    mean = x.new_tensor([.48145466, .4578275, .40821073]).view(3, 1, 1)
    std = x.new_tensor([.26862954, .26130258, .27577711]).view(3, 1, 1)
    return (x - mean) / std
