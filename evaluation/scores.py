"""What is measured of a picture: by nano's judge, who knows, or by the paper's metrics.

Either has `prompts`, name -> prompt; `photos` (P, N, 3, H, W) of the people, of which the systems get the
first; `names` of the numbers; and is called with pictures (B, 3, H, W) in [-1, 1] and a list of B pairs, the
name of the prompt and the number of the person. It gives a dict of name -> a list of B numbers, None where a
number has no meaning.
"""
import torch
import torch.nn.functional as F

import clip
from evaluation.measures import copied, error, spread
from files.encoders import load_clip, load_vit
from nano import faces, instrument, seeds, wording
from nano.people import ASKED, PROMPTS, STYLES, UNSEEN, HeldOut
from vit import encode_face

# The paper's prompts; a person's name is [V]
PAPERS = ("a [V] face", "an instagram selfie of a [V] face", "a pixar character of a [V] face",
          "a [V] face with bark skin", "a [V] face as a rock star", "a professional photo of a [V] face",
          "a [V] face in impressionist style", "a [V] face as a king", "a [V] face as an astronaut",
          "a [V] face at the beach")
# Asked of everybody, counted of those who lack it: what is said of looks -> (attribute, category)
LOOKS = {wording.phrase(*asked): asked for asked in ASKED}
# Prompts that ask for no person
OTHERS = {prompt: prompt for prompt in ("a face", f"a {wording.RARE[-1]} face")}
MORE = 8  # photos of everybody beside the first; the last is the one that no system sees


ABOUT = """nano: test people whom no training has seen and nothing was chosen by. Every system gets one photo
of each. A picture of a person and prompt starts from the same noise in every row. ± is the standard error
over people. A number in brackets says how many people a cell is of, where that is not the row's.

* **plain**, **styled**: likeness of "a [V] face" and of ten styled prompts: the judge's cosine of identities
  to *another* photo of the person, which no system has seen (two photos of one person: .95, strangers: .00).
* **style**: the share of styled pictures in which the judge recognises the prompt's style.
* **both**: likeness where the style is right and 0 elsewhere, over the styled prompts. **beach**: the same of
  "a [V] face at the beach" alone, which train.py leaves out (but see the lines under the tables).
* **missed**: the share of styled pictures whose likeness is below .3.
* **copied**: how much of the photo's circumstances (pose, zoom, place, light, colours of background and
  clothes) comes back in "a [V] face": 1 for the photo itself, 0 for another photo.
* **error**: mean error of 13 numbers of identity, each from 0 to 1, that draw "a [V] face" again.
* **obeyed**: the share of pictures of "a [V] face with round glasses", "… a full beard", "… blond hair" and
  "… a mohawk" that show it, of people who don't have it.
* **leaked**: the likeness that "a face" and "a nqz face" gain from the person's being applied.
* **given, plain**, **given, both**: plain and both by likeness to the photo given, which rewards copying it.
* **seconds**: one person, alone, on one core. **KB**: the person's file.
* **paper**: Face Rec. / DINO / CLIP-I / CLIP-T in the paper's own table, of photographs."""
SEEN = """Seen before the one photo: by HyperDreamBooth, Only Hyper and k = … other people in all eleven
styles, with these prompts (the shipped network's weights are older than the rule that the beach is left out),
and by E4T likewise; by all others nothing but the model."""


class Judged:
    """nano. `likeness` and `another`: the judge's cosine of identities to the photo given and to one that no
    system has seen (two photos of one person .95, strangers 0). `style`: 1 where the judge recognises the
    prompt's. `obeyed`: 1 where it sees the look that the prompt asks for, of people who lack it. Of plain
    pictures also what the instrument reads: `copied`, the circumstances that the photo given and the picture
    share (1 for the photo itself, 0 for another one), and `error`, the mean error of the 13 sure numbers of
    identity, of a range of 1."""
    names = "likeness", "another", "style", "copied", "error", "obeyed"
    prompts = dict(zip(STYLES, PROMPTS)) | {"photo again": PROMPTS[0]}
    prompts |= {look: wording.caption(0, "[V]", [look]) for look in LOOKS} | OTHERS
    styles, plain, others, unseen = STYLES, ("photo", "photo again"), list(OTHERS), UNSEEN
    few = ("photo", "pixar", "bark", "rock star", "professional", "king")  # of curves and --quick
    more = ("photo again", *LOOKS, *OTHERS)                                # of --quick alone
    about, seen = ABOUT, SEEN

    def __init__(self, people, device):
        held = HeldOut(people, device, seeds.TEST)
        self.judge, self.identity, self.circumstances = held.judge, held.identity, held.circumstances
        self.spread = spread(held.circumstances)
        self.photos = torch.cat([held.photos[:, None], another_photos(held, MORE)], 1)

    def __call__(self, pictures, drawn):
        people = torch.tensor([who for _, who in drawn])
        _, style, attributes = self.judge(F.interpolate(pictures.float(), (128, 128), mode="area"))
        seen = {name: logits.argmax(1).tolist() for name, logits in attributes.items()}
        known = {name: kinds.tolist() for name, kinds in faces.attributes(self.identity).items()}

        def right(i):
            name, _ = drawn[i]
            return float(style[i].argmax() == STYLES.index(name)) if name in STYLES else None

        def obeyed(i):
            name, who = drawn[i]
            attribute, kind = LOOKS.get(name, (None, None))
            lacking = attribute and known[attribute][who] != kind
            return float(seen[attribute][i] == kind) if lacking else None
        which = range(len(drawn))
        plain = [i for i in which if drawn[i][0] in self.plain]
        copies, errors = {}, {}
        if plain:
            read, around = (numbers.cpu() for numbers in instrument.read(pictures[plain]))
            given = people[plain]
            copies = dict(zip(plain, copied(around, self.circumstances[given], self.spread).tolist()))
            errors = dict(zip(plain, error(read, self.identity[given]).tolist()))
        return {"likeness": self.judge.likeness(pictures, self.photos[people, 0]).tolist(),
                "another": self.judge.likeness(pictures, self.photos[people, -1]).tolist(),
                "copied": [copies.get(i) for i in which], "error": [errors.get(i) for i in which],
                "style": [right(i) for i in which], "obeyed": [obeyed(i) for i in which]}


def another_photos(held, count):
    """`count` further photos (P, count, 3, 128, 128) of everybody, which don't depend on how many people
    there are."""
    first = held.first + seeds.STEPS
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(held.photos))]
    each = [faces.photos(one.expand(count, -1), generator, held.device)
            for one, generator in zip(held.identity[:, None], generators)]
    return torch.stack(each)


class Paper:
    """The paper's metrics, but for Face Rec., whose network comes as a pickle: DINO and CLIP-I, cosines of
    features of picture and photo; CLIP-T, the cosine of picture and prompt, whose [V] is left out as it means
    nothing to CLIP."""
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
