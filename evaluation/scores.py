"""Scores of a picture: by nano's judge, or the paper's metrics.

Both have `prompts`, name -> prompt; `photos` (P, N, 3, H, W) of the people, of which the systems get the
first; and `names` of the scores. A call takes pictures (B, 3, H, W) in [-1, 1] and a list of B pairs (name of
the prompt, number of the person), and returns name -> a list of B scores, None where a score has no meaning.
"""
import math

import torch
import torch.nn.functional as F

import clip
from files.encoders import load_clip, load_vit
from nano import faces, instrument, seeds, wording
from nano.people import ASKED, PROMPTS, STYLES, UNSEEN, HeldOut
from vit import encode_face

# The paper's prompts
PAPERS = ("a [V] face", "an instagram selfie of a [V] face", "a pixar character of a [V] face",
          "a [V] face with bark skin", "a [V] face as a rock star", "a professional photo of a [V] face",
          "a [V] face in impressionist style", "a [V] face as a king", "a [V] face as an astronaut",
          "a [V] face at the beach")
# Looks to ask for, phrase -> (attribute, category): scored for the people who lack them
LOOKS = {wording.phrase(*asked): asked for asked in ASKED}
# Prompts without the person
OTHERS = {prompt: prompt for prompt in ("a face", f"a {wording.RARE[-1]} face")}
UNIFORM = "yaw", "roll", "zoom", "x", "y", "light", "light_side"
MORE = 8  # more photos of each person; no system sees the last


ABOUT = """nano's test people. No training has seen them, and no choice was made on them. Every system gets
one photo of each. Pictures of one person and prompt start from the same noise in every row. ± is the
standard error over people. A number in brackets is the cell's number of people, where the row's differs.

* **plain**, **styled**: likeness of "a [V] face" and of nine styled prompts. Likeness is the judge's cosine
  similarity to *another* photo of the person, which no system has seen (one person: .95, strangers: .00).
* **style**: the share of styled pictures in which the judge recognises the prompt's style.
* **both**: the mean over the styled prompts of likeness where the style is right, and 0 where it is wrong.
* **beach**: the same for "a [V] face at the beach", the style that trainings leave out (but see under the
  tables). No other number includes it.
* **missed**: the share of styled pictures whose likeness is below .3.
* **copied**: how much of the photo's circumstances (pose, zoom, place, light, colours of background and
  clothes) comes back in "a [V] face": 1 for the photo itself, 0 for another photo.
* **error**: the mean error of 13 identity numbers, each from 0 to 1, as the instrument reads "a [V] face".
* **obeyed**: the share of pictures of "a [V] face with round glasses", "… a full beard", "… blond hair" and
  "… a mohawk" that show what was asked for, among people who don't have it.
* **leaked**: the likeness that "a face" and "a nqz face" gain when the person's weights are applied.
* **given, plain**, **given, both**: plain and both with likeness to the photo given, which rewards copying.
* **seconds**: for one person, alone, on one core. **KB**: the size of the person's file.
* **paper**: Face Rec. / DINO / CLIP-I / CLIP-T on photographs, from the paper's own table.
* **training**: the pictures of four other networks (docs/experiment.md, "How fair it is")."""
SEEN = """Training data beside the one photo: HyperDreamBooth, Only Hyper and k = … (from the prediction of k
passes) have seen other people in all styles with these prompts, the beach too, because the shipped weights
were trained before train.py left it out; a network that has not is under "by training". E4T has seen all
but the beach. All others know only the model."""


class Judged:
    """nano's scores, which ABOUT defines. `likeness` is to the photo given, `another` to one that no system
    has seen. The instrument measures `copied` and `error` in plain pictures, the judge all others."""
    names = "likeness", "another", "style", "copied", "error", "obeyed"
    prompts = dict(zip(STYLES, PROMPTS)) | {"photo again": PROMPTS[0]}
    prompts |= {look: wording.caption(0, "[V]", [look]) for look in LOOKS} | OTHERS
    styles, unseen = [style for style in STYLES if style != UNSEEN], UNSEEN
    plain, others = ("photo", "photo again"), list(OTHERS)
    few = ("photo", "pixar", "bark", "rock star", "professional", "king")  # of curves and --quick
    more = ("photo again", *LOOKS, *OTHERS)                                # of --quick alone
    about, seen = ABOUT, SEEN

    def __init__(self, people, device):
        held = HeldOut(people, device, seeds.TEST)
        self.judge, self.identity, self.circumstances = held.judge, held.identity, held.circumstances
        self.spread = spread(held.circumstances)
        self.photos = torch.cat([held.photos[:, None], held.more_photos(MORE)], 1)

    def __call__(self, pictures, drawn):
        people = torch.tensor([who for _, who in drawn])
        _, style, attributes = self.judge(pictures.float())
        known = faces.attributes(self.identity)
        found = {name: [None] * len(drawn) for name in self.names}
        found["likeness"] = self.judge.likeness(pictures, self.photos[people, 0]).tolist()
        found["another"] = self.judge.likeness(pictures, self.photos[people, -1]).tolist()
        for i, (name, who) in enumerate(drawn):
            attribute, kind = LOOKS.get(name, (None, None))
            if name in STYLES:
                found["style"][i] = float(style[i].argmax() == STYLES.index(name))
            elif attribute and known[attribute][who] != kind:
                found["obeyed"][i] = float(attributes[attribute][i].argmax() == kind)
        plain = [i for i, (name, _) in enumerate(drawn) if name in self.plain]
        if plain:
            read, around = (numbers.cpu() for numbers in instrument.read(pictures[plain]))
            copies = copied(around, self.circumstances[people[plain]], self.spread).tolist()
            errors = error(read, self.identity[people[plain]]).tolist()
            for i, copy, wrong in zip(plain, copies, errors):
                found["copied"][i], found["error"][i] = copy, wrong
        return found


def standardised(circumstances):
    """Circumstances (B, 17) as eleven numbers (B, 11) of mean 0 and variance 1: yaw, roll, zoom, x, y, light
    and its side, which are uniform in [0, 1], and cosine and sine of the hues of background and clothes."""
    column = dict(zip(faces.CIRCUMSTANCES, circumstances.unbind(1)))
    uniform = [(column[name] - .5) * 12 ** .5 for name in UNIFORM]
    angles = [2 * math.pi * column[name] for name in instrument.HUES]
    return torch.stack(uniform + [wave(a) * 2 ** .5 for a in angles for wave in (torch.cos, torch.sin)], 1)


def spread(circumstances):
    """The mean over people of Σt², for standardised circumstances t (P, 17) of their photos: about 11."""
    return standardised(circumstances).square().sum(1).mean()


def copied(read, known, spread):
    """Σrt / spread (B,) over eleven standardised circumstances, for r read in pictures (B, 17) and t of the
    photos that they were made from (B, 17). Its mean over the people of `spread` is Σrt / Σt², the slope of r
    against t: 0 for another photo, 1 for the photo itself."""
    return (standardised(read) * standardised(known)).sum(1) / spread


def error(read, identity):
    """The mean error (B,) of identities read (B, 27) against known ones (B, 27), over the 13 numbers in [0,
    1] that the instrument reads well. A random number has 1/3."""
    sure = [faces.IDENTITY.index(name) for name in instrument.SURE]
    return (read - identity)[:, sure].abs().mean(1)


class Paper:
    """The paper's metrics without Face Rec., whose network comes as a pickle: DINO and CLIP-I, cosines of the
    features of picture and photo; CLIP-T, the cosine of picture and prompt, without [V], which means nothing
    to CLIP."""
    names = "DINO", "CLIP-I", "CLIP-T"
    prompts = {prompt: prompt for prompt in PAPERS}
    few, more, about, seen = PAPERS[:6], (), "± is the standard error over people.", ""

    def __init__(self, photos, clip_source, dino_source, device):
        self.photos = photos
        self.clip, self.tokenizer = load_clip(clip_source, device)
        self.dino = load_vit(dino_source, device)

    @torch.no_grad()
    def __call__(self, pictures, drawn):
        device, side = self.clip.logit_scale.device, self.clip.vision_model.config.image_size
        pictures, photos = (x.to(device) for x in (pictures, self.photos[[who for _, who in drawn], 0]))
        prompts = [" ".join(self.prompts[name].replace("[V]", "").split()) for name, _ in drawn]
        seen, known = (self.clip.image_features(clip.preprocess(x, side)) for x in (pictures, photos))
        said = self.clip.text_features(self.tokenizer(prompts).to(device))
        features = {"DINO": [encode_face(self.dino, x)[:, 0] for x in (pictures, photos)],
                    "CLIP-I": [seen, known], "CLIP-T": [seen, said]}
        return {name: F.cosine_similarity(*features[name]).tolist() for name in self.names}
