"""Words for people's looks, captions of their pictures, and the reverse: the looks that words describe."""
import re

import torch

import clip
from nano.faces import ATTRIBUTES, IDENTITY, STYLES, WORDS, attributes, number
from program.console import UserError

# Rare words; no training sees the first, which is [V]
RARE = "sks zwx ohwx qvj xjy vbk wqz kfj pzx jqk dvx gzq hxw bqj lzk mxq tvz yqk rjx nqz".split()


def words_of(identity):
    """The words for each person: a list of dicts name -> word from WORDS."""
    return [{name: WORDS[name][kind - ATTRIBUTES[name]] for name, kind in zip(WORDS, kinds)}
            for kinds in zip(*(kinds.tolist() for kinds in attributes(identity).values()))]


def phrases(words):
    """Phrases, such as ["tan skin", "long red hair"], of a dict name -> word; a word may be empty."""
    skin, colour, hair, *worn = (words[name] for name in WORDS)
    if colour and hair != "bald":
        hair = hair.replace(" ", f" {colour} ") or f"{colour} hair"
    return list(filter(None, [skin and f"{skin} skin", hair, *worn]))


def describe(identity):
    """Each person's list of phrases, such as ["tan skin", "long red hair"]."""
    return list(map(phrases, words_of(identity)))


def vocabulary():
    """The words that understood() knows: name -> word -> category index."""
    return {name: {re.sub("^a | (hair|glasses|beard)$", "", word) or "no": kind
                   for kind, word in enumerate(words[-ATTRIBUTES[name]:])} for name, words in WORDS.items()}


def vocabulary_text():
    """These words in one line for the user."""
    return "; ".join(f"{name.replace('_', ' ')}: {', '.join(words)}" for name, words in vocabulary().items())


def understood(text):
    """name -> category that a description such as "short grey hair" gives. UserError for an unknown word."""
    known, said = vocabulary(), {}
    for phrase in re.split(",| and | with ", text.lower()):
        words = set(phrase.split())
        facial = words & {"beard", "moustache", "goatee"}
        about = words & {"skin", "glasses"} or facial and {"beard"} or {"hair_colour", "hair_style"}
        for word in sorted(words - {"a", "an", "skin", "hair", "glasses", "beard"}, key="no".__eq__):
            meant = {name: known[name][word] for name in about if word in known[name]}
            if not meant:
                raise UserError(f'--look: "{word}" in "{phrase.strip()}" is an unknown word. Known are '
                                + vocabulary_text())
            said |= meant
    return said


def captions(identity, style, generator, words=.6, rare=.5, drop=.1, names=RARE[1:]):
    """Training captions: always the style; attributes in a share `words`; a rare word of `names` before
    "face" in a share `rare`, so that an unseen identifier does no harm; "" in a share `drop`, for
    guidance."""
    result = []
    coins = torch.rand(len(identity), 3, generator=generator).tolist()
    pick = torch.randint(len(names), (len(identity),), generator=generator).tolist()
    for phrases, s, p, (worded, named, dropped) in zip(describe(identity), style.tolist(), pick, coins):
        text = caption(s, names[p] if named < rare else "", phrases if worded < words else [])
        result.append("" if dropped < drop else text)
    return result


def caption(style, name="", phrases=()):
    """The caption of a style, an index, with a word before "face" and phrases about looks."""
    text = list(STYLES.values())[style].replace("{}", name).replace("  ", " ")
    if not phrases:
        return text
    return text + (" and " if " with " in text else " with ") + " ".join(phrases)


def phrase(name, kind):
    """The phrase for one category of an attribute: "blond hair"."""
    nothing = dict.fromkeys(WORDS, "")
    return phrases(nothing | {name: WORDS[name][kind - ATTRIBUTES[name]]})[0]


def changed(identity, generator):
    """The same people (B, 27) with one attribute of each changed to one that has a phrase; and B phrases."""
    looks, said = identity.clone(), []
    names = torch.randint(len(WORDS), (len(looks),), generator=generator).tolist()
    coins = torch.rand(len(looks), generator=generator).tolist()
    for person, which, coin in zip(looks, names, coins):
        name, words = list(WORDS.items())[which]
        first = int("" in words)  # there is no phrase for no glasses or no beard
        kind = first + int(coin * (ATTRIBUTES[name] - first))
        person[IDENTITY.index(name)] = number(name, kind)
        said.append(phrase(name, kind))
    return looks, said


def tokenizer():
    """CLIP's tokenizer with one token for every word of the captions; other text takes many tokens. UserError
    if the text encoder has room for another number of tokens: a new word needs a new one."""
    texts = [*STYLES.values(), *(word for words in WORDS.values() for word in words)]
    words = {word for text in texts for word in text.replace("{}", "").split()}
    vocab, merges = clip.learn_bpe(sorted(words | {"skin", "with", "and", *RARE}))
    if len(vocab) != clip.NANO.vocab_size:
        raise UserError(f"the captions' words make {len(vocab)} tokens: set vocab_size of NANO in clip.py to "
                        "that, and train the text encoder and the UNet again")
    return clip.Tokenizer(vocab, merges, clip.NANO.max_position_embeddings)
